"""Text in, text out, over the engine.

    llm = LLM("runs/demo/bundle")
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
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ease_runtime.chat import ChatTemplate, Message
from ease_runtime.costs import DEFAULT_CAP
from ease_runtime.device import choose_device
from ease_runtime.engine import Engine
from ease_runtime.errors import BundleError, DeviceError, RequestError
from ease_runtime.generation import Choice, Generation, Timing, TokenEvent
from ease_runtime.manifest import Manifest
from ease_runtime.options import Options
from ease_runtime.own import is_own
from ease_runtime.policies import ExitPolicy, make_policy
from ease_runtime.sampling import Sampler
from ease_runtime.sequence import TokenSequence
from ease_runtime.stack import OrtStack, Stack
from ease_runtime.text import StopPattern, TextWriter


class TextEngine:
    """An engine that reads and writes text. `stop_ids` end an answer; `start_id`, where there is one, stands before every raw text."""

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
    ) -> None:
        self.stack, self.tokenizer = stack, tokenizer
        self.start_id, self.stop_ids, self.template = start_id, stop_ids, template
        self.engine = Engine(stack, num_slots=num_slots, cap=cap, adapt=adapt)
        self.choices: dict[TokenSequence, Choice] = {}

    @property
    def busy(self) -> bool:
        """Whether some request has not finished."""
        return self.engine.busy

    def encode(self, text: str, *, raw: bool = True) -> list[int]:
        """A text's ids; before a raw one comes the token that stands before every text in training. Raises RequestError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is no valid Unicode: half of a surrogate pair at character {error.start}") from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.start_id, *ids] if raw and self.start_id is not None else ids

    def encode_chat(self, messages: Many[Message]) -> list[int]:
        """The ids of a conversation, up to where the answer begins. Raises RequestError, also where the bundle has no template."""
        if self.template is None:
            raise RequestError("this bundle has no chat template (a base model); give a prompt to continue instead of messages")
        return self.encode(self.template.render(messages), raw=False)

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

    def prepare(self, options: Options, policy: ExitPolicy | None = None) -> Options:
        """What a request's options become before it starts, with a policy of one's own or without."""
        return options

    def check(self, options: Options) -> None:
        """Raises RequestError for options that this bundle cannot run."""
        self.engine.check(self.policy(options), options.catch_up)
        for token in options.logit_bias:
            if token >= self.stack.vocab_size:
                raise RequestError(f"logit_bias has the token id {token}, outside the vocabulary of {self.stack.vocab_size}")

    def submit(
        self,
        prompt: str | Many[int],
        options: Options | None = None,
        *,
        policy: ExitPolicy | None = None,
        sampler: Sampler | None = None,
        after: Generation | None = None,
        keep: bool = False,
    ) -> Generation:
        """Queue a request for a text or for ids. Raises RequestError when it cannot run.

        A `policy` or `sampler` of one's own stands in place of what the options say; all completions share it. With `keep`
        what it has computed stays, for a request `after` it whose prompt begins alike.
        """
        options = options or Options()
        if not prompt:
            raise RequestError("the prompt is empty; give at least one character")
        options = self.prepare(options, policy)
        self.check(options)
        notes = self.notes(options) if policy is None else []
        policy = policy or self.policy(options)
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        patterns = [StopPattern(stop) for stop in options.stop]
        choices = []
        for index in range(options.n):
            sequence = self.engine.start(
                ids,
                max_new_tokens=options.max_tokens,
                policy=policy,
                catch_up=options.catch_up,
                sampler=sampler or options.make_sampler(len(ids), index),
                stop_ids=self.stop_ids,
                num_logprobs=options.logprobs,
                keep=keep,
                after=after.choices[0].sequence if after else None,
                notes=notes,
            )
            choices.append(Choice(index, sequence, TextWriter(self.tokenizer, ids, patterns)))
            self.choices[sequence] = choices[-1]
        return Generation(ids, choices)

    def step(self) -> list[tuple[Choice, list[TokenEvent]]]:
        """One pass: the completions that went on or ended in it, with their new events."""
        read = []
        for sequence in self.engine.step():
            choice = self.choices.get(sequence)
            if choice is None:
                continue
            read.append((choice, choice.read()))
            if choice.finish_reason is not None:
                del self.choices[sequence]
                if sequence.finish_reason is None:  # at a stop string, of which the engine knows nothing
                    self.engine.end(sequence, "stop")
        return read

    def cancel(self, generation: Generation) -> None:
        """Give a request up, or what a finished one has kept."""
        for choice in generation.choices:
            self.choices.pop(choice.sequence, None)
            self.engine.release(choice.sequence)

    def generate(
        self,
        prompt: str | Many[int],
        options: Options | None = None,
        timing: Timing | None = None,
        *,
        policy: ExitPolicy | None = None,
        sampler: Sampler | None = None,
    ) -> Iterator[TokenEvent]:
        """Continue a prompt, token by token; fills `timing` when given. Raises RequestError before the first token.

        `policy` and `sampler` are as for `submit`. Meant for one request at a time: what others get
        meanwhile is lost. Raises DeviceError when the model's logits are no numbers.
        """
        generation = self.submit(prompt, options, policy=policy, sampler=sampler)
        timing = timing or Timing()
        timing.num_prompt_tokens = len(generation.prompt)
        try:
            yield from self.follow(generation, timing)
        finally:
            self.cancel(generation)

    def follow(self, generation: Generation, timing: Timing) -> Iterator[TokenEvent]:
        """The events of a request, until it has finished. Raises DeviceError when the model's logits are no numbers."""
        before, seconds = 0, 0.0
        while not generation.finished:
            start = time.perf_counter()
            read = self.step()
            seconds += time.perf_counter() - start
            after = sum(choice.num_read for choice in generation.choices)
            if after > before:
                timing.add(seconds, after - before)
                before, seconds = after, 0.0
            for choice, events in read:
                if choice.error:
                    raise DeviceError(choice.error)
                if choice.finish_reason is not None:
                    timing.note_end(choice.sequence)
                yield from (event for event in events if choice in generation.choices)


class LLM(TextEngine):
    """A bundle ready to generate. Raises BundleError or DeviceError when it cannot run.

    `num_slots`: requests that run together; `adapt`: measure what passes cost, and leave early only where it pays.
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
    ) -> None:
        bundle, stack = Path(bundle), OrtStack(Path(bundle), num_threads=num_threads, device=choose_device(device))
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
        )

    def prepare(self, options: Options, policy: ExitPolicy | None = None) -> Options:
        """Calibrated thresholds where the bundle has some and none are given; costs measured where they are needed."""
        found = self.manifest.calibration
        if found and policy is None and self._may_use(found, options):
            catch_up = "verify" if options.catch_up == "verify" else found["catch_up"]
            options = replace(options, policy=found["policy"], threshold=found["thresholds"], catch_up=catch_up)
        if (policy or self.policy(options)).thresholds and (self.engine.adapt or options.catch_up == "verify"):
            self.engine.measure()
        return options

    def _may_use(self, found: dict[str, Any], options: Options) -> bool:
        """Whether a request takes over the calibrated thresholds. A bundle cannot name code: only who runs it can."""
        if is_own(found["policy"]):
            return replace(options, policy=Options.policy).leaves_unsaid and options.policy == found["policy"]
        return options.leaves_unsaid

    def notes(self, options: Options) -> list[str]:
        found = self.manifest.calibration
        if found and is_own(found["policy"]) and options.leaves_unsaid:
            return [f"this bundle was calibrated for a policy of one's own; to use it: --policy {found['policy']}"]
        if not found or options.catch_up not in (found["catch_up"], "verify") or options.policy != found["policy"]:
            return []
        if self.policy(options) != make_policy(found["policy"], found["thresholds"], self.stack.exit_layers):
            return []  # other thresholds, or these moved by a decay, a budget, a first exit
        promise = f"{found['risk']} at most {found['delta']:g} with probability {1 - found['epsilon']:g}, on {found['data']}"
        return [f"thresholds from the bundle's calibration: {promise} (--threshold off for full depth)"]


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises BundleError when the file is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path} cannot be read: {error}") from None


def load_template(bundle: Path, manifest: Manifest, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The bundle's chat template, if it has one. Raises BundleError."""
    if manifest.chat_template is None:
        return None
    begin, end = manifest.generation.get("bos_token_id", manifest.start_id), manifest.stop_ids[0] if manifest.stop_ids else None
    names = [tokenizer.id_to_token(token) or "" if type(token) is int else "" for token in (begin, end)]
    source = (bundle / manifest.chat_template).read_text(encoding="utf-8")
    return ChatTemplate(source, bos_token=names[0], eos_token=names[1])
