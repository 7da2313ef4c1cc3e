"""Tokens become text as they come: whole characters only, and nothing that may turn out to begin a stop string.

    writer = TextWriter(tokenizer, prompt_ids, [StopPattern("\\n\\n")])
    for piece in writer.add(token, last=False):      # the tokens whose text is certain by now
        print(piece.text, end="")

Knows nothing about models or requests.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from ease_runtime.sequence import Token

CONTEXT_TOKENS = 8  # before the answer: some decoders treat the first token of a text unlike the others
LONGEST_WINDOW = 32  # tokens that are decoded together at most
BROKEN = "\ufffd"  # what stands for bytes that are no character (yet)
LONGEST_BROKEN = 3  # bytes of a character that lacks its last


class Detokenizer:
    """The text of tokens, a piece a token: '' while a character is incomplete. Special tokens have no text.

    Only the last few tokens are decoded anew for each, and what they had shown before is taken away.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.window = list(context[-CONTEXT_TOKENS:])
        self.num_old = len(self.window)  # tokens of the window that were complete when the last one came
        self.shown = _whole(self._decode(self.window))

    def step(self, token: int) -> str:
        """The text that became complete with a token."""
        self.window.append(token)
        text = self._decode(self.window)
        whole = _whole(text)
        piece = whole[len(self.shown) :]
        self.shown = max(self.shown, whole, key=len)
        if whole == text or len(self.window) > LONGEST_WINDOW:
            self._forget()
        return piece

    def flush(self) -> str:
        """What is left of a character that was never completed, as replacement characters."""
        return self._decode(self.window)[len(self.shown) :]

    def _forget(self) -> None:
        """Let go of the tokens that the next one's text cannot depend on."""
        recent = self.window[max(self.num_old, len(self.window) - CONTEXT_TOKENS) :]
        if text := _whole(self._decode(recent)):
            self.window, self.shown = recent, text
        self.num_old = len(self.window)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _whole(text: str) -> str:
    """A text without the characters at its end that may be incomplete."""
    end = len(text)
    while end > max(0, len(text) - LONGEST_BROKEN) and text[end - 1] == BROKEN:
        end -= 1
    return text[:end]


class StopPattern:
    """A stop string with its failure table (Knuth, Morris and Pratt 1977): however long it is, a character costs a step or two.

    Special tokens, which have no text, stand in it and in what it is looked for in as their ids.
    """

    def __init__(self, text: Sequence[str | int]) -> None:
        self.text = text
        self.fallback = [0] * len(text)  # [i]: the longest beginning of the text that also ends its first i + 1 characters
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self.fallback[length - 1]
            length += text[i] == text[length]
            self.fallback[i] = length

    def advance(self, length: int, character: str | int) -> int:
        """How much of the stop string the text ends with after one more character, from how much before it."""
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
        """Where the first stop string to be completed begins in the whole text, if one is; of two that end together, the longer."""
        if not self.patterns:
            self.length += len(text)
            return None
        for character in text:
            self.length += 1
            self.matched = [pattern.advance(n, character) for pattern, n in zip(self.patterns, self.matched, strict=True)]
            complete = [n for pattern, n in zip(self.patterns, self.matched, strict=True) if n == len(pattern.text)]
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
    """Tokens in, pieces out, as soon as it is certain that their text belongs to the answer. Once `stopped` it takes no more."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int],
        patterns: Sequence[StopPattern] = (),
        special: Container[int] = (),
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer, context)
        self.matcher = StopMatcher(patterns)
        self.special = special  # the ids of the tokens that have no text
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
        start = self.matcher.feed(seen)
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
        pieces, out = [], self.num_out
        for piece in self.rest():
            pieces.append(Piece(piece.token, piece.text[: max(0, start - out)], piece.length))
            out += piece.length
        return pieces
