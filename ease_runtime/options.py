"""How to continue a prompt: one frozen dataclass, from which flags, JSON keys, defaults and help texts all
come.

Options(max_tokens=50, threshold=0.7, catch_up="propagate", temperature=0.8, seed=1)
Options.from_json({"max_tokens": 50, "threshold": 0.7, "stop": "\\n"})
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from ease_common.errors import RequestError, did_you_mean
from ease_common.own import is_own, load_own
from ease_common.settings import setting
from ease_runtime.drafters import DRAFTS, check_draft
from ease_runtime.engine.sampling import AdjustedGreedy, Adjustments, Greedy, GumbelSampler, Sampler, seed_of
from ease_runtime.fields import check_name, leaving, read_value
from ease_runtime.policies import POLICIES, ExitPolicy, make_policy
from ease_runtime.policies.thresholds import OFF, ThresholdsLike
from ease_runtime.text.grammar import Grammar, JsonSchema, LarkGrammar, Regex

MAX_CHOICES = 64  # completions of one request
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_IDS = 256
TO_THE_END = -1  # as `max_tokens`
GRAMMARS = ("json_schema", "grammar", "regex")  # of which an answer follows one
FLAGS = {"exit": "exit_layer"}  # a flag whose name is not the field's, which JSON may say, too
MAX_STOP_LENGTH = 2**16  # characters of all stop strings together


@dataclass(frozen=True)
class Options:
    """How to continue a prompt. Raises RequestError for a value of another kind or outside its range, of
    Python as of JSON.

        Options(max_tokens=20, threshold=0.7, stop=("\\n",))

    `max_tokens` -1 goes on to the end of the text, or of the model's context; 0 only reads the prompt.
    `threshold` takes whatever `Thresholds.of` takes, and is `Thresholds` then; None is full depth, or what a
    bundle was calibrated to.
    `policy`, `draft` and `sampler` may name a class of one's own, `module:Class`. temperature 0 is greedy.
    Completion i of `n` draws from a stream of its own, made from the seed and i.
    """

    max_tokens: int = setting(
        128, "Longest answer, in tokens; -1 goes on to the end of the text, or of the model's context."
    )
    policy: str = leaving("max-prob", f"What confidence is: {', '.join(POLICIES)}, or your own module:Class.")
    threshold: ThresholdsLike | None = leaving(
        None,
        "A token leaves at this confidence: 0.7, or one an early exit, off,0.7 (off: not asked). Without "
        "it none leaves.",
    )
    catch_up: str = leaving(
        "recompute", "How tokens that left pay their K/V: propagate, recompute or verify."
    )
    draft: str = leaving(
        "exit",
        f"Who drafts under verify: {', '.join(DRAFTS)}, or your own module:Class. ngram and corpus draft "
        "from text, auto from whatever pays.",
    )
    draft_corpus: str | None = setting(
        None, "A text file, or a directory of them, for --draft corpus and auto to draft from."
    )
    sampler: str | None = setting(None, "Choose tokens with your own module:Class instead.")
    temperature: float = setting(0.0, "0 is greedy.")
    top_k: int = setting(0, "Keep the k most probable tokens; 0 (or -1) keeps all.")
    top_p: float = setting(1.0, "Keep the most probable tokens up to this mass.")
    seed: int = setting(0, "Seed of the sampling.")
    min_p: float = setting(0.0, "Keep tokens with at least this share of the largest probability.")
    repetition_penalty: float = setting(
        1.0, "Divide the logits of tokens that were there, the prompt included; 1 changes nothing."
    )
    presence_penalty: float = setting(0.0, "Taken off the logits of tokens that were generated.")
    frequency_penalty: float = setting(
        0.0, "Taken off the logits of tokens once for each time they were generated."
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "Added to the logit of a token id; may be repeated."}
    )
    json_schema: JsonSchema | None = setting(
        None, "The answer is JSON that follows this schema (needs the extra 'grammar')."
    )
    grammar: LarkGrammar | None = setting(
        None, "The answer follows this grammar, in Lark's notation as llguidance has it."
    )
    regex: Regex | None = setting(None, "The answer matches this regular expression as a whole.")
    stop: tuple[str, ...] = setting((), "End before this text; may be repeated.")
    stop_token_ids: tuple[int, ...] = setting(
        (), "End with one of these tokens, too, as with the model's own end tokens."
    )
    ignore_eos: bool = setting(False, "Go on past the model's end tokens: every answer has its full length.")
    min_tokens: int = setting(
        0, "Say no end token and look for no stop string before this many tokens have been said."
    )
    n: int = setting(1, "Completions of the prompt.")
    logprobs: int = setting(
        0,
        "Also give this many most probable tokens with their log-probabilities (in JSON), up to "
        f"{MAX_LOGPROBS}.",
    )
    min_exit: int | None = leaving(None, "First layer after which a token may leave.")
    patience: int | None = leaving(None, "Agreeing exits that policy 'patience' waits for; 1 by default.")
    decay: float | None = leaving(None, "Lower the thresholds along the answer, this fast (CALM's tau).")
    exit_layer: int | None = leaving(None, "The layer after which policy 'fixed' lets every token leave.")
    depth_budget: float | None = leaving(
        None, "Layers a token may use in the mean; moves the thresholds to hold it."
    )

    def __post_init__(self) -> None:
        for name, kind in field_kinds().items():
            if (value := getattr(self, name)) is not getattr(Options, name, None):
                object.__setattr__(self, name, read_value(name, kind, value))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if -(2**63) <= self.seed < 0:
            object.__setattr__(self, "seed", self.seed + 2**64)
        self.make_sampler(0)
        check_draft(self.draft)
        if self.max_tokens < 0 and self.max_tokens != TO_THE_END:
            raise RequestError(
                f"max_tokens {self.max_tokens} is below 0 (-1: to the end of the text or of the context)"
            )
        if self.min_tokens < 0 or 0 <= self.max_tokens < self.min_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is outside 0..max_tokens ({self.max_tokens})")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(
                f"{len(self.stop_token_ids)} stop_token_ids; up to {MAX_STOP_IDS} are looked for"
            )
        if len([1 for name in GRAMMARS if getattr(self, name) is not None]) > 1:
            raise RequestError(f"an answer follows one of {', '.join(GRAMMARS)}; leave the others out")
        if self.answer_grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos goes on past the end of the grammar; leave one of them out")
        if not 1 <= self.n <= MAX_CHOICES:
            raise RequestError(f"n {self.n} is outside 1..{MAX_CHOICES}")
        if not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs {self.logprobs} is outside 0..{MAX_LOGPROBS}")
        if "" in self.stop:
            raise RequestError("a stop string is empty; give at least one character")
        if len(self.stop) > MAX_STOPS or sum(map(len, self.stop)) > MAX_STOP_LENGTH:
            raise RequestError(
                f"more than {MAX_STOPS} stop strings, or more than {MAX_STOP_LENGTH} characters of them; "
                "give fewer"
            )

    @property
    def answer_grammar(self) -> Grammar | None:
        """What the answer follows."""
        return next((value for name in GRAMMARS if (value := getattr(self, name)) is not None), None)

    def at_full_depth(self) -> "Options":
        """The same request with no early exit, calibrated or not."""
        unsaid = {name: getattr(Options, name) for name in LEAVING}
        return replace(self, **{**unsaid, "threshold": OFF})

    @property
    def leaves_unsaid(self) -> bool:
        """Whether nothing is said of when tokens leave."""
        return (
            self.threshold is None
            and self.exit_layer is None
            and self.depth_budget is None
            and self.policy == Options.policy
            and not self.drafts_from_text
        )

    @property
    def drafts_from_text(self) -> bool:
        """Whether others than exits may draft, which `verify` judges."""
        return self.draft not in ("exit", "off")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], base: "Options | None" = None) -> "Options":
        """Options from JSON values, over those of `base`.

        Raises RequestError for an unknown name or a value of another kind.
        """
        hints = field_kinds()
        merged = {} if base is None else {f.name: getattr(base, f.name) for f in fields(cls)}
        if "exit" in values and "exit_layer" in values:
            raise RequestError("exit and exit_layer are two names of one option; leave one out")
        for said, value in values.items():
            name = FLAGS.get(said, said)
            if name not in hints:
                raise RequestError(f"unknown option {name[:80]!r}; {did_you_mean(name[:80], hints)}")
            off = name == "threshold" and value is None
            merged[name] = OFF if off else read_value(name, hints[name], value)
            if hints[name] in (str, str | None):
                check_name(said, value)
            if name in ("policy", "sampler", "draft") and is_own(str(value)):
                raise RequestError(
                    f"{name} {str(value)[:80]!r}: only who runs the command can name code of their own "
                    f"(--{name})"
                )
            if name == "draft_corpus":
                raise RequestError("draft_corpus: only who runs the command can name files (--draft-corpus)")
        asked = cls(**merged)
        if "catch_up" in values:
            asked.check_catch_up()
        return asked

    def check_catch_up(self) -> None:
        """Raises RequestError for a catch-up that was asked for, and under which drafts cannot be judged."""
        if self.drafts_from_text and self.catch_up != "verify":
            raise RequestError(
                f"draft '{self.draft}' needs full depth to judge it, which catch-up '{self.catch_up}' does "
                "not do; use verify (--catch-up verify), or draft nothing (--draft off)"
            )

    def end_ids(self, stop_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end an answer, of a model that has these."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else stop_ids)

    def make_sampler(
        self, num_prompt: int, choice: int = 0, end_ids: frozenset[int] = frozenset()
    ) -> Sampler:
        """What picks the tokens of a completion, from 0, of a prompt of `num_prompt` tokens.

        With `min_tokens` it says none of `end_ids` before. Raises RequestError.

        A class of one's own is called with these options, their seed the completion's.
        """
        bias = tuple(self.logit_bias.items())
        adjustments = Adjustments(
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            bias,
            num_prompt,
            min_tokens=self.min_tokens,
            end_ids=tuple(sorted(end_ids)) if self.min_tokens else (),
        )
        seed = seed_of(self.seed, choice) if 0 <= self.seed < 2**64 else self.seed
        if self.sampler is not None:
            made: Sampler = load_own(self.sampler, "sampler")(replace(self, seed=seed, sampler=None))
            return made
        sampler = GumbelSampler(
            self.temperature or 1.0, self.top_k, self.top_p, seed, self.min_p, adjustments
        )
        if self.temperature:
            return sampler
        return Greedy() if adjustments.change_nothing else AdjustedGreedy(adjustments)

    def exit_policy(self, exit_layers: Sequence[int]) -> ExitPolicy:
        """The policy, checked against a bundle's exits. Raises RequestError."""
        given = {
            "decay": self.decay,
            "min_exit": self.min_exit,
            "exit_layer": self.exit_layer,
            "depth_budget": self.depth_budget,
        }
        if self.patience is not None:
            given["patience"] = self.patience
        return make_policy(self.policy, self.threshold, exit_layers, **given)  # type: ignore[arg-type]


@cache
def field_kinds() -> dict[str, Any]:
    """The type of each option."""
    return typing.get_type_hints(Options)


LEAVING = tuple(f.name for f in fields(Options) if f.metadata.get("leaving"))
SAMPLING = tuple(f.name for f in fields(Options) if f.name not in LEAVING)
