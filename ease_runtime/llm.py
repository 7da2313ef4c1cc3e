"""Text in, text out, over the engine.

    llm = LLM("runs/demo/bundle")
    print(llm.complete("In the beginning", Options(threshold=0.7)).text)

Token by token, as they are said:

    for event in llm.generate("In the beginning", Options(threshold=0.7, catch_up="propagate")):
        print(event.text, end="", flush=True)

Several requests at once, as a server has them:

    llm = LLM("runs/demo/bundle", num_slots=8)
    generations = [llm.submit(prompt, Options()) for prompt in prompts]
    while llm.busy:
        for choice, events in llm.step():
            ...
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ease_common.chat import ChatTemplate, Message, Tool
from ease_common.errors import BundleError, DeviceError, RequestError, without_panics
from ease_common.own import is_own
from ease_common.tokenizers import whole_texts
from ease_runtime.bundle.manifest import Manifest
from ease_runtime.bundle.names import find_bundle
from ease_runtime.drafters import CorpusLookup, Drafter, NgramLookup, own_drafter, read_corpus
from ease_runtime.effect import check_effect, effect_notes
from ease_runtime.engine.costs import DEFAULT_CAP
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given, Sampler
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.generation import Choice, Completion, Generation, Timing, TokenEvent
from ease_runtime.options import Options
from ease_runtime.ort.stack import Stack, open_stack
from ease_runtime.policies import ExitPolicy, make_policy
from ease_runtime.text.grammar import Allowed, Constrained, GrammarDrafter, Grammars
from ease_runtime.text.special import SpecialTokens, check_unicode, encode_ids
from ease_runtime.text.streaming import StopPattern, TextWriter
from ease_runtime.text.token_bytes import TokenBytes
from ease_runtime.text.tool_calls import CallForm, form_of
from ease_runtime.text.unknown import unknown_id


class TextEngine:
    """An engine that reads and writes text.

    `stop_ids` end an answer; `start_id`, where there is one, stands before every raw text.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: Tokenizer,
        *,
        start_id: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        template: ChatTemplate | None = None,
        num_slots: int = 1,
        cap: int = DEFAULT_CAP,
        adapt: bool = False,
        exact: bool = False,
        prefix_bytes: int = 0,
    ) -> None:
        self.stack = stack
        self.tokenizer = tokenizer
        self.start_id = start_id
        self.stop_ids = stop_ids
        self.template = template
        self.special = SpecialTokens(tokenizer)
        self.engine = Engine(
            stack, num_slots=num_slots, cap=cap, adapt=adapt, exact=exact, prefix_bytes=prefix_bytes
        )
        self.choices: dict[TokenSequence, Choice] = {}
        self.corpora: dict[str, CorpusLookup] = {}
        self.grammars = Grammars(tokenizer, stack.vocab_size, stop_ids)

    @property
    def busy(self) -> bool:
        """Whether some request has not finished."""
        return self.engine.busy

    def encode(self, text: str) -> list[int]:
        """A prompt's ids, special tokens that are written in it being real; the start token comes first,
        unless it is written there.

        Raises RequestError.
        """
        check_unicode(text)
        ids = encode_ids(self.tokenizer, text)
        self._check_rows(ids)
        start = [] if self.start_id is None else [self.start_id]
        return ids if ids[:1] == start else [*start, *ids]

    def encode_text(self, text: str, *, parse_special: bool = False) -> list[int]:
        """A document's ids, as training reads it: special tokens that it mentions are text, unless
        `parse_special`. Raises RequestError.
        """
        if parse_special:
            return self.encode(text)
        ids = self.encode_part(text)
        return ids if self.start_id is None else [self.start_id, *ids]

    def _check_rows(self, ids: list[int]) -> None:
        if (last := max(ids, default=0)) >= self.stack.vocab_size:
            found = f"the text has {self.token_text(last)!r}, the token {last}"
            raise RequestError(
                f"{found}, for which this model has no row: its vocabulary has {self.stack.vocab_size}"
            )

    def encode_chat(
        self, messages: Many[Message], tools: Many[Tool] | None = None, *, go_on: bool = False
    ) -> list[int]:
        """The ids of a conversation, with the tools that may be called, up to where the answer begins; with
        `go_on` the answer continues the last message, an assistant's. Special tokens that a message or a tool
        mentions are text.

        Raises RequestError, also where the bundle has no template.
        """
        if self.template is None:
            raise RequestError(
                "this bundle has no chat template (a base model); give a prompt to continue instead of "
                "messages"
            )
        ids = self.special.encode_chat(self.template, messages, tools, go_on=go_on)
        self._check_rows(ids)
        return ids

    @cached_property
    def call_form(self) -> CallForm | None:
        """How this model writes calls of tools; None where it takes no tools, or in a form that is not
        known.
        """
        return form_of(self.template, self.special.ids.keys())

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of a token by itself, which may be a part of a character."""
        return TokenBytes(self.tokenizer)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def token_text(self, token: int) -> str:
        """A token by itself, special tokens too."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def policy(self, options: Options) -> ExitPolicy:
        """The checked policy for this bundle's exits."""
        return options.exit_policy(self.stack.exit_layers)

    def notes(self, options: Options) -> list[str]:
        """What a request should be told that it did not ask for."""
        return []

    def remarks(self, options: Options, prompt: Many[int]) -> list[str]:
        """What a request should be told of itself: options without effect, characters that the tokenizer does
        not know.
        """
        notes = effect_notes(options)
        count = self.count_unknown(prompt)
        if count:
            notes.append(
                f"{count} of the prompt's {len(prompt)} tokens stand for characters that this tokenizer "
                "does not know"
            )
        return notes

    def count_unknown(self, ids: Many[int]) -> int:
        """How many tokens stand for characters that the tokenizer does not know; 0 where that token has
        another meaning, too.
        """
        unknown = unknown_id(self.tokenizer)
        return (
            0 if unknown is None or unknown in (self.start_id, *self.stop_ids) else list(ids).count(unknown)
        )

    def leaves_early(self, options: Options) -> bool:
        """Whether a token may leave before the last layer. Raises RequestError."""
        return bool(self.policy(self.prepare(options)).thresholds)

    def drafts_or_leaves(self, options: Options) -> bool:
        """Whether anything but full depth says a token first. Raises RequestError."""
        return options.drafts_from_text or self.leaves_early(options)

    def prepare(
        self, options: Options, policy: ExitPolicy | None = None, drafter: Drafter | None = None
    ) -> Options:
        """What a request's options become before it starts, with a policy or a drafter of one's own or
        without: drafts from text imply verify, and verify without drafts is full depth.

        Reads a corpus where there is one. Raises RequestError.
        """
        if options.draft == "off" and options.catch_up == "verify":
            options = options.at_full_depth()
        if drafter or options.drafts_from_text:
            if options.catch_up == "propagate":
                options.check_catch_up()
            options = replace(options, catch_up="verify")
        if options.draft_corpus is not None:
            self.corpus(options.draft_corpus)
        elif options.draft == "corpus":
            raise RequestError("draft 'corpus' needs texts to draft from; give --draft-corpus FILE|DIR")
        return options

    def corpus(self, path: str) -> CorpusLookup:
        """A corpus, indexed once. Raises RequestError."""
        if path not in self.corpora:
            self.corpora[path] = read_corpus(path, self.encode_part)
        return self.corpora[path]

    def encode_part(self, text: str) -> list[int]:
        """The ids of a text that does not begin an input. Raises RequestError."""
        ids = self.special.encode_text(text)
        self._check_rows(ids)
        return ids

    def drafters(self, options: Options) -> list[Drafter]:
        """Who drafts from text, of prepared options. Raises RequestError."""
        corpus = [self.corpus(options.draft_corpus)] if options.draft_corpus is not None else []
        match options.draft:
            case "exit" | "off":
                return []
            case "ngram":
                return [NgramLookup()]
            case "corpus":
                return [*corpus]
            case "auto":
                return [NgramLookup(), *corpus]
            case own:
                return [own_drafter(own)]

    def check(self, options: Options) -> None:
        """Raises RequestError for options that this bundle cannot run, or under which none could leave early
        as they ask.
        """
        policy = self.policy(options)
        self.engine.check(policy, options.catch_up)
        if options.threshold is None or options.threshold:
            self.engine.check_asks(policy)
        check_effect(options, self.stack.exit_layers)
        for name, tokens in (("logit_bias", options.logit_bias), ("stop_token_ids", options.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < self.stack.vocab_size:
                    raise RequestError(
                        f"{name} has the token id {token}, outside the vocabulary of {self.stack.vocab_size}"
                    )

    def stop_patterns(self, options: Options) -> list[StopPattern]:
        """What stop strings are looked for with: their tables take a step a character."""
        return [
            StopPattern(form)
            for stop in options.stop
            for form in dict.fromkeys((tuple(stop), self.special.split(stop)))
        ]

    def submit(
        self,
        prompt: str | Many[int],
        options: Options | None = None,
        *,
        policy: ExitPolicy | None = None,
        sampler: Sampler | None = None,
        drafter: Drafter | None = None,
        after: Generation | None = None,
        keep: bool = False,
        score_prompt: bool = False,
        sharing: str | None = None,
        patterns: Many[StopPattern] | None = None,
    ) -> Generation:
        """Queue a request for a text or for ids. Raises RequestError when it cannot run.

        A `policy` or `sampler` of one's own stands in place of what the options say, a `drafter` beside it;
        all completions share them. With `keep` what it has computed stays, for a request `after` it whose
        prompt begins alike. `patterns` are what `stop_patterns` makes, for who asks for several prompts with
        the same options. `score_prompt`: its sequences have `prompt_scores`, how likely full depth makes the
        prompt, or the policy where tokens leave early. `sharing` names whose kept texts it may begin with.
        """
        options = options or Options()
        if not prompt:
            raise RequestError("the prompt is empty; give at least one character")
        options = self.prepare(options, policy, drafter)
        drafters = [*([drafter] if drafter else []), *self.drafters(options)]
        # A drafter beside the options is reason enough for verify.
        self.check(replace(options, catch_up=Options.catch_up) if drafter else options)
        notes = self.notes(options) if policy is None else []
        policy = policy or self.policy(options)
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if patterns is None:
            patterns = self.stop_patterns(options)
        end_ids = options.end_ids(self.stop_ids)
        grammar = options.answer_grammar
        follower = None if grammar is None else self.grammars.follow(grammar)
        if follower is not None:
            drafters = [Allowed(one, follower, len(ids)) for one in drafters]
        if follower is not None and options.drafts_from_text:
            drafters.append(GrammarDrafter(follower, len(ids)))
        apart = score_prompt and bool(policy.thresholds) and options.catch_up != "verify" and len(ids) > 1
        choices = []
        for index in range(options.n):
            scorer = self._scorer(ids, policy, options) if apart else None
            picks = sampler or options.make_sampler(len(ids), index, end_ids)
            sequence = self.engine.start(
                ids,
                max_new_tokens=options.max_tokens if options.max_tokens >= 0 else self.stack.max_positions,
                policy=policy,
                catch_up=options.catch_up,
                sampler=picks if follower is None else Constrained(picks, follower.copy(), len(ids)),
                drafters=drafters,
                stop_ids=end_ids,
                num_logprobs=options.logprobs,
                keep=keep,
                after=after.choices[0].sequence if after else None,
                score_prompt=score_prompt and not apart,
                sharing=sharing,
                notes=[*notes, *self.remarks(options, ids)],
            )
            writer = TextWriter(
                self.tokenizer, ids, patterns, self.special.tokens, min_tokens=options.min_tokens
            )
            choices.append(Choice(index, sequence, writer, scorer=scorer))
            self.choices |= {part: choices[-1] for part in (sequence, scorer) if part is not None}
        return Generation(ids, choices)

    def _scorer(self, ids: list[int], policy: ExitPolicy, options: Options) -> TokenSequence:
        """A sequence that says a prompt, token by token, as if it were an answer under the policy."""
        return self.engine.start(
            ids[:1],
            max_new_tokens=len(ids) - 1,
            policy=policy,
            catch_up=options.catch_up,
            sampler=Given(ids),
            num_logprobs=options.logprobs,
        )

    def step(self) -> list[tuple[Choice, list[TokenEvent]]]:
        """One pass: the completions that went on or ended in it, with their new events."""
        read = []
        for sequence in self.engine.step():
            choice = self.choices.get(sequence)
            if choice is None:
                continue
            if choice.scorer is not None and not self._take_scores(choice, choice.scorer):
                continue  # its answer waits for what comes before it
            read.append((choice, choice.read()))
            if choice.finish_reason is not None:
                del self.choices[choice.sequence]
                if choice.sequence.finish_reason is None:  # a stop string, of which the engine knows nothing
                    self.engine.end(choice.sequence, "stop")
        return read

    def _take_scores(self, choice: Choice, scorer: TokenSequence) -> bool:
        """Give a completion its prompt's scores once all are there; whether they are."""
        if scorer.finish_reason is None:
            return False
        del self.choices[scorer]
        choice.scorer = None
        choice.sequence.prompt_scores = scorer.produced
        if scorer.error is not None:
            choice.sequence.error = scorer.error
            self.engine.end(choice.sequence, "error")
        return True

    def cancel(self, generation: Generation) -> None:
        """Give a request up, or what a finished one has kept."""
        for choice in generation.choices:
            for sequence in (choice.sequence, choice.scorer):
                if sequence is not None:
                    self.choices.pop(sequence, None)
                    self.engine.release(sequence)

    def generate(
        self,
        prompt: str | Many[int],
        options: Options | None = None,
        timing: Timing | None = None,
        *,
        policy: ExitPolicy | None = None,
        sampler: Sampler | None = None,
        drafter: Drafter | None = None,
    ) -> Iterator[TokenEvent]:
        """Continue a prompt, token by token; fills `timing` when given.

        Raises RequestError before the first token.

        `policy`, `sampler` and `drafter` are as for `submit`. Meant for one request at a time: what others
        get meanwhile is lost. Raises DeviceError when the model's logits are no numbers.
        """
        generation = self.submit(prompt, options, policy=policy, sampler=sampler, drafter=drafter)
        timing = timing or Timing()
        timing.num_prompt_tokens = len(generation.prompt)
        try:
            yield from self.follow(generation, timing)
        finally:
            self.cancel(generation)

    def complete(
        self,
        prompt: str | Many[int],
        options: Options | None = None,
        *,
        policy: ExitPolicy | None = None,
        sampler: Sampler | None = None,
        drafter: Drafter | None = None,
    ) -> Completion:
        """Continue a prompt to its end, for one answer (`n` 1).

            llm.complete("In the beginning", Options(max_tokens=20, threshold=0.7)).text

        Raises and takes what `generate` does.
        """
        if options and options.n != 1:
            raise RequestError(f"n {options.n}: complete has one answer; submit has several")
        timing = Timing()
        events = self.generate(prompt, options, timing, policy=policy, sampler=sampler, drafter=drafter)
        return Completion(list(events), timing)

    def follow(self, generation: Generation, timing: Timing) -> Iterator[TokenEvent]:
        """The events of a request, until it has finished.

        Raises DeviceError when the model's logits are no numbers.
        """
        before = 0
        seconds = 0.0
        while not generation.finished:
            start = time.perf_counter()
            read = self.step()
            seconds += time.perf_counter() - start
            after = sum(choice.num_read for choice in generation.choices)
            if after > before:
                timing.add(seconds, after - before)
                before = after
                seconds = 0.0
            for choice, events in read:
                if choice.error:
                    raise DeviceError(choice.error)
                if choice.finish_reason is not None:
                    timing.note_end(choice.sequence)
                yield from (event for event in events if choice in generation.choices)


class LLM(TextEngine):
    """A bundle ready to generate. Raises BundleError or DeviceError when it cannot run.

    `num_slots`: requests that run together; `adapt`: measure what passes cost, and leave early only where it
    pays; `exact`: the same bits however tokens are divided into passes, in int4 and without verify, too;
    `prefix_bytes`: of keys and values that are kept of texts for requests that begin alike (`sharing`).
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        device: str = "auto",
        num_threads: int = 0,
        cap: int = DEFAULT_CAP,
        num_slots: int = 1,
        adapt: bool = False,
        exact: bool = False,
        prefix_bytes: int = 0,
    ) -> None:
        bundle = find_bundle(bundle)
        stack = open_stack(bundle, device=device, num_threads=num_threads)
        self.manifest = stack.manifest
        tokenizer = load_tokenizer(bundle / self.manifest.tokenizer)
        super().__init__(
            stack,
            tokenizer,
            start_id=self.manifest.start_id,
            stop_ids=frozenset(self.manifest.stop_ids),
            template=load_template(bundle, self.manifest, tokenizer),
            num_slots=num_slots,
            cap=cap,
            adapt=adapt,
            exact=exact,
            prefix_bytes=prefix_bytes,
        )

    def prepare(
        self, options: Options, policy: ExitPolicy | None = None, drafter: Drafter | None = None
    ) -> Options:
        """Calibrated thresholds where the bundle has some and none are given; costs measured where they are
        needed.
        """
        options = super().prepare(options, policy, drafter)
        found = self.manifest.calibration
        if found and policy is None and drafter is None and self._may_use(found, options):
            catch_up = "verify" if options.catch_up == "verify" else found["catch_up"]
            options = replace(
                options, policy=found["policy"], threshold=found["thresholds"], catch_up=catch_up
            )
        early = (policy or self.policy(options)).thresholds
        if (
            (early and (self.engine.adapt or options.catch_up == "verify"))
            or drafter
            or options.drafts_from_text
        ):
            self.engine.measure()
        return options

    def _may_use(self, found: dict[str, Any], options: Options) -> bool:
        """Whether a request takes over the calibrated thresholds.

        A bundle cannot name code: only who runs it can.
        """
        if is_own(found["policy"]):
            return replace(options, policy=Options.policy).leaves_unsaid and options.policy == found["policy"]
        return options.leaves_unsaid

    def notes(self, options: Options) -> list[str]:
        found = self.manifest.calibration
        if found and is_own(found["policy"]) and options.leaves_unsaid:
            return [
                f"this bundle was calibrated for a policy of one's own; to use it: --policy {found['policy']}"
            ]
        if (
            not found
            or options.catch_up not in (found["catch_up"], "verify")
            or options.policy != found["policy"]
        ):
            return []
        if self.policy(options) != make_policy(found["policy"], found["thresholds"], self.stack.exit_layers):
            return []  # other thresholds, or these moved by a decay, a budget, a first exit
        promise = (
            f"{found['risk']} at most {found['delta']:g} with probability {1 - found['epsilon']:g}, on "
            f"{found['data']}"
        )
        return [f"thresholds from the bundle's calibration: {promise} (--threshold off for full depth)"]


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer without the truncation and padding that its file may ask for.

    Raises BundleError when the file is none.
    """
    try:
        with without_panics():
            return whole_texts(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path} cannot be read: {error}") from None


def load_template(bundle: Path, manifest: Manifest, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The bundle's chat template, if it has one."""
    if manifest.chat_template is None:
        return None
    return ChatTemplate((bundle / manifest.chat_template).read_bytes(), **special_tokens(manifest, tokenizer))


def special_tokens(manifest: Manifest, tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of a bundle's special tokens by their names; older bundles know two of them, by their ids."""
    if manifest.special_tokens:
        return manifest.special_tokens
    ids = {
        "bos_token": manifest.generation.get("bos_token_id", manifest.start_id),
        "eos_token": next(iter(manifest.stop_ids), None),
    }
    known = {
        name: token for name, token in ids.items() if type(token) is int and 0 <= token < manifest.vocab_size
    }
    texts = {name: tokenizer.id_to_token(token) for name, token in known.items()}
    return {name: text for name, text in texts.items() if text is not None}
