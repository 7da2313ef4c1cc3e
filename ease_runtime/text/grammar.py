"""Answers that follow a grammar: a JSON schema, a grammar in Lark's notation, or a regular expression.

    grammars = Grammars(tokenizer, vocab_size=49152, stop_ids=frozenset({2}))
    sampler = Constrained(Greedy(), grammars.follow(JsonSchema('{"type": "object"}')), num_prompt=7)

llguidance knows which tokens may come next (https://github.com/guidance-ai/llguidance; the extra `grammar`).
A sampler chooses among these, at an exit as at full depth, so that `verify` under a grammar says what full
depth says under it. The end of the text is allowed where the grammar is complete. An answer that `max_tokens`
cuts off is the beginning of one that follows it.

JSON is written as Python's `json.dumps` writes it, with one space after a comma and a colon and none
elsewhere: small models that may write any white space write it for ever. A schema's own "x-guidance"
(https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md) says otherwise where it should be.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ease_common.errors import RequestError, shown
from ease_common.extras import missing_extra
from ease_runtime.drafters.protocol import Drafter, Proposal
from ease_runtime.engine.sampling import Sampler
from ease_runtime.text.token_bytes import TokenBytes

if TYPE_CHECKING:
    import llguidance

LONGEST_GRAMMAR = 2**16  # characters
LONGEST_REASON = 160  # characters of what llguidance says
KEPT = 16  # compiled grammars, of those that were asked for last
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
CERTAIN = 8  # the match of what the grammar alone leaves no choice about


class Grammar(str):
    """A grammar's text. Raises RequestError when it is too long."""

    kind = "grammar"

    def __new__(cls, text: str) -> "Grammar":
        if len(text) > LONGEST_GRAMMAR:
            raise RequestError(f"{cls.kind} has {len(text)} characters; up to {LONGEST_GRAMMAR} are read")
        return super().__new__(cls, text)

    @classmethod
    def read(cls, name: str, value: Any) -> "Grammar":
        """A value of JSON. Raises RequestError."""
        if not isinstance(value, str):
            raise RequestError(f"{name} {shown(value)} is not a text")
        return cls(value)


class LarkGrammar(Grammar):
    """A grammar in Lark's notation, as llguidance has it."""


class Regex(Grammar):
    """A regular expression, which the whole answer matches."""

    kind = "regex"


class JsonSchema(Grammar):
    """A JSON schema. Raises RequestError when it is no JSON."""

    kind = "json_schema"

    def __new__(cls, text: str) -> "JsonSchema":
        made = super().__new__(cls, text)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict | bool):
            raise RequestError(f'json_schema {shown(text)} is no JSON object like {{"type": "object"}}')
        return made  # type: ignore[return-value]

    @classmethod
    def read(cls, name: str, value: Any) -> "Grammar":
        """A schema, or its text."""
        return cls(json.dumps(value)) if isinstance(value, Mapping | bool) else super().read(name, value)


ANY_OBJECT = JsonSchema('{"type": "object"}')  # OpenAI's json_object


class Vocabulary:
    """A tokenizer as llguidance asks for it: the bytes of every token, special ones apart."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = min(stop_ids)
        content = TokenBytes(tokenizer)
        self.tokens = [content(token) for token in range(vocab_size)]
        added = tokenizer.get_added_tokens_decoder()
        special = {token for token, what in added.items() if what.special and token < vocab_size}
        self.special_token_ids = sorted(special | stop_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        whole = text.decode(errors="replace") if isinstance(text, bytes) else text
        ids: list[int] = self.tokenizer.encode(whole, add_special_tokens=False).ids
        return ids


class Grammars:
    """Compiles grammars for a model's vocabulary, and keeps the last few.

    Raises RequestError, when one is asked for, where llguidance is not installed or the model has no token
    that ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.stop_ids = stop_ids
        self.compiled: dict[tuple[type, str], llguidance.LLMatcher] = {}

    @cached_property
    def vocabulary(self) -> "llguidance.LLTokenizer":
        """The model's tokens; takes about a second for 50,000."""
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from None
        if not self.stop_ids:
            raise RequestError("a grammar needs a token that ends the text, and this model has none")
        words: Any = Vocabulary(self.tokenizer, self.vocab_size, self.stop_ids)
        return llguidance.LLTokenizer(words, n_vocab=self.vocab_size, eos_token=sorted(self.stop_ids))

    def follow(self, grammar: Grammar) -> "Follower":
        """At the beginning of an answer. Raises RequestError for what is no grammar, or none of those that
        llguidance knows.
        """
        key = (type(grammar), str(grammar))
        found = self.compiled.pop(key, None) or self._compile(grammar)
        self.compiled[key] = found
        while len(self.compiled) > KEPT:
            del self.compiled[next(iter(self.compiled))]
        return Follower(found.deep_copy())

    def _compile(self, grammar: Grammar) -> "llguidance.LLMatcher":
        vocabulary = self.vocabulary
        from llguidance import LLMatcher

        match grammar:
            case JsonSchema():
                form: Any = JSON_FORM
                source = LLMatcher.grammar_from_json_schema(str(grammar), defaults=form)
            case Regex():
                source = LLMatcher.grammar_from_regex(str(grammar))
            case _:
                source = LLMatcher.grammar_from_lark(str(grammar))
        made = LLMatcher(vocabulary, source, log_level=0)
        if made.is_error():
            raise RequestError(f"{grammar.kind} cannot be followed: {first_line(made.get_error())}")
        return made


def first_line(text: str) -> str:
    """The first line that says something, up to LONGEST_REASON."""
    found = next((line.strip() for line in text.splitlines() if line.strip()), "no reason is given")
    return found if len(found) <= LONGEST_REASON else f"{found[: LONGEST_REASON - 3]}..."


class Follower:
    """A grammar on its way along an answer, back and forth as drafts are said and refused."""

    def __init__(self, matcher: "llguidance.LLMatcher") -> None:
        self.matcher = matcher
        self.said: list[int] = []

    def copy(self) -> "Follower":
        """Another one, at the beginning."""
        matcher = self.matcher.deep_copy()
        matcher.reset()
        return Follower(matcher)

    def go_to(self, answer: Sequence[int]) -> None:
        """Stand behind these tokens. Raises RequestError where the grammar does not allow them."""
        shared = len(self.said)
        if list(answer[:shared]) != self.said:
            pairs = zip(self.said, answer, strict=False)
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(shared, len(answer)))
            self.matcher.rollback(len(self.said) - shared)
            del self.said[shared:]
        more = [int(token) for token in answer[shared:]]
        if more and not self.matcher.consume_tokens(more):
            raise RequestError(f"the answer left its grammar: {first_line(self.matcher.get_error())}")
        self.said += more

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Which of `size` tokens may come next. Raises RequestError where the grammar is too complex to
        tell.

        Shape: (V).
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise RequestError(f"the grammar cannot be followed: {first_line(self.matcher.get_error())}")
        return np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)


class Constrained:
    """A sampler that chooses among what a grammar allows."""

    def __init__(self, sampler: Sampler, follower: Follower, num_prompt: int) -> None:
        self.sampler = sampler
        self.follower = follower
        self.num_prompt = num_prompt

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        self.follower.go_to(tokens[self.num_prompt : position])
        allowed = self.follower.allowed(len(logits))
        masked = np.where(allowed, logits, np.float32(-np.inf))
        return self.sampler.pick(masked, int(masked.argmax()), tokens, position)


class Allowed:
    """A drafter's tokens up to the first that a grammar does not allow: nothing after it could stand."""

    def __init__(self, drafter: Drafter, follower: Follower, num_prompt: int) -> None:
        self.name = drafter.name
        self.drafter = drafter
        self.follower = follower
        self.num_prompt = num_prompt

    def begin(self) -> tuple[Any, Follower]:
        return self.drafter.begin(), self.follower.copy()

    def propose(self, tokens: Sequence[int], limit: int, state: tuple[Any, Follower]) -> Proposal:
        own, follower = state
        proposal = self.drafter.propose(tokens, limit, own)
        if not all(isinstance(token, int | np.integer) for token in proposal.tokens):
            return proposal  # the engine says what is wrong with it
        follower.go_to(tokens[self.num_prompt :])
        count = follower.matcher.validate_tokens([int(token) for token in proposal.tokens[:limit]])
        return Proposal(proposal.tokens[:count], proposal.match)


class GrammarDrafter:
    """Drafts what a grammar leaves no choice about, such as the keys of a schema, as the tokenizer would
    write it.
    """

    name = "grammar"

    def __init__(self, follower: Follower, num_prompt: int) -> None:
        self.follower = follower
        self.num_prompt = num_prompt

    def begin(self) -> Follower:
        return self.follower.copy()

    def propose(self, tokens: Sequence[int], limit: int, state: Follower) -> Proposal:
        state.go_to(tokens[self.num_prompt :])
        return Proposal(state.matcher.compute_ff_tokens()[:limit], CERTAIN)
