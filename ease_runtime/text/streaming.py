"""Tokens become text as they come: whole characters only, and nothing that may turn out to begin a stop
string.

    writer = TextWriter(tokenizer, prompt_ids, [StopPattern("\\n\\n")])
    for piece in writer.add(token, last=False):      # the tokens whose text is certain by now
        print(piece.text, end="")

Knows nothing about models or requests.
"""

import json
import re
from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer

from ease_runtime.engine.sequence import Token

CONTEXT_TOKENS = 8  # before the answer: some decoders treat the first token of a text unlike the others
LONGEST_WINDOW = 32  # tokens that are decoded together at most
BROKEN = "\ufffd"  # what stands for bytes that are no character (yet)
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """The text of tokens, a piece a token: '' while later tokens may still change it.

    Special tokens have no text.

    The pieces together are what one decode of prompt and answer adds to the prompt's text; a character that
    the prompt began belongs to the answer that completes it. Only the last few tokens are decoded anew for
    each.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        steps = list(decoder_steps(tokenizer))
        self.byte_tokens = any(step["type"] == "ByteFallback" for step in steps)
        self.at_once = _rewrites(steps)
        spoken = [token for token in context if not self._silent(token)]
        start = 0 if self.at_once else max(0, len(spoken) - CONTEXT_TOKENS)
        while start > 0 and self._is_byte(spoken[start]):
            start -= 1
        self.window = spoken[start:]
        self.num_old = len(self.window)  # tokens of the window that were complete when the last one came
        self.shown = self._decode(self.window)

    def step(self, token: int) -> str:
        """The text that became certain with a token."""
        if self._silent(token):
            return ""
        self.window.append(token)
        if self.at_once or self._is_byte(token):  # bytes in a row become characters together, or none does
            return ""
        text = self._decode(self.window)
        piece = self._show(text.removesuffix(BROKEN))
        if not text.endswith(BROKEN) or len(self.window) > LONGEST_WINDOW:
            self._forget()
        return piece

    def flush(self) -> str:
        """The text that waited for later tokens, now that none will come."""
        return self._show(self._decode(self.window))

    def _show(self, text: str) -> str:
        """What a text adds to what was shown of it; the end of the prompt's may read otherwise by now."""
        if self.shown.startswith(text):
            return ""
        piece = text[num_shared(self.shown, text) :]
        self.shown = text
        return piece

    def _forget(self) -> None:
        """Let go of the tokens that the next one's text cannot depend on."""
        recent = self.window[max(self.num_old, len(self.window) - CONTEXT_TOKENS) :]
        if text := self._decode(recent).removesuffix(BROKEN):
            self.window = recent
            self.shown = text
        self.num_old = len(self.window)

    def _silent(self, token: int) -> bool:
        return token in self.special or self.tokenizer.id_to_token(token) is None

    def _is_byte(self, token: int) -> bool:
        return self.byte_tokens and BYTE_TOKEN.fullmatch(str(self.tokenizer.id_to_token(token))) is not None

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def num_shared(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def decoder_steps(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """What the decoder does, step by step, as tokenizer.json says it."""
    waiting = [] if tokenizer.decoder is None else [json.loads(tokenizer.decoder.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = step["decoders"] + waiting
        else:
            yield step


def _rewrites(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether a decoder reads the fused text again, so that any token may change what stands before it."""
    kinds = [step["type"] for step in steps]
    fused = min(
        (kinds.index(kind) + 1 for kind in ("ByteLevel", "Fuse") if kind in kinds), default=len(steps)
    )
    return not all(_keeps_beginnings(step) for step in steps[fused:])


def _keeps_beginnings(step: dict[str, Any]) -> bool:
    """Whether a longer text, decoded, begins as the shorter one does."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in ("Fuse", "Strip", "Metaspace")


class StopPattern:
    """A stop string with its failure table (Knuth, Morris and Pratt 1977): however long it is, a character
    costs a step or two.

    Special tokens, which have no text, stand in it and in what it is looked for in as their ids.
    """

    def __init__(self, text: Sequence[str | int]) -> None:
        self.text = text
        self.fallback = [0] * len(
            text
        )  # [i]: the longest beginning of the text that also ends its first i + 1 characters
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self.fallback[length - 1]
            length += text[i] == text[length]
            self.fallback[i] = length

    def advance(self, length: int, character: str | int) -> int:
        """How much of the stop string the text ends with after one more character, from how much
        before it.
        """
        while length and self.text[length] != character:
            length = self.fallback[length - 1]
        return length + (self.text[length] == character)


class StopMatcher:
    """Looks for stop strings in a text that comes in pieces."""

    def __init__(self, patterns: Sequence[StopPattern]) -> None:
        self.patterns = patterns
        self.matched = [0] * len(patterns)  # characters of each that the text ends with
        self.length = 0  # of the text so far

    @property
    def num_held(self) -> int:
        """How many characters at the text's end may be the beginning of a stop string."""
        return max(self.matched, default=0)

    def feed(self, text: Sequence[str | int]) -> int | None:
        """Where the first stop string to be completed begins in the whole text, if one is; of two that end
        together, the longer.
        """
        if not self.patterns:
            self.length += len(text)
            return None
        for character in text:
            self.length += 1
            self.matched = [
                pattern.advance(n, character) for pattern, n in zip(self.patterns, self.matched, strict=True)
            ]
            complete = [
                n for pattern, n in zip(self.patterns, self.matched, strict=True) if n == len(pattern.text)
            ]
            if complete:
                return self.length - max(complete)
        return None


@dataclass(frozen=True)
class Piece:
    """A token with the text that became complete with it."""

    token: Token
    text: str
    length: int  # of what stop strings are looked for in: the text, and one for a special token


class TextWriter:
    """Tokens in, pieces out, as soon as it is certain that their text belongs to the answer.

    Once `stopped` it takes no more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int],
        patterns: Sequence[StopPattern] = (),
        special: Container[int] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer, context)
        self.matcher = StopMatcher(patterns)
        self.special = special  # the ids of the tokens that have no text
        self.min_tokens = min_tokens  # from the first, in which no stop string is looked for
        self.num_tokens = 0
        self.held: deque[Piece] = deque()
        self.num_out = 0  # characters given away
        self.stopped = False

    def add(self, token: Token, last: bool) -> list[Piece]:
        """The pieces that are certain after one more token; all of them after the last."""
        text = self.detokenizer.step(token.id)
        if last:
            text += self.detokenizer.flush()
        seen = (*text, token.id) if token.id in self.special else text
        self.held.append(Piece(token, text, len(seen)))
        self.num_tokens += 1
        start = None
        if self.num_tokens > self.min_tokens:
            start = self.matcher.feed(seen)
        else:
            self.matcher.length += len(seen)
        if start is not None:
            self.stopped = True
            return self._cut(start)
        return self.rest() if last else self._release(self.matcher.length - self.matcher.num_held)

    def rest(self) -> list[Piece]:
        """The pieces that are still held."""
        pieces = list(self.held)
        self.held.clear()
        return pieces

    def _release(self, end: int) -> list[Piece]:
        """The pieces whose text ends before character `end` of the answer, or there."""
        pieces = []
        while self.held and self.num_out + self.held[0].length <= end:
            pieces.append(self.held.popleft())
            self.num_out += pieces[-1].length
        return pieces

    def _cut(self, start: int) -> list[Piece]:
        """Every piece that is held, without the text from character `start` on."""
        pieces = []
        out = self.num_out
        for piece in self.rest():
            pieces.append(Piece(piece.token, piece.text[: max(0, start - out)], piece.length))
            out += piece.length
        return pieces
