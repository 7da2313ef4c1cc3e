"""A text and its tokens: where each of them ends in the text, how many bytes it stands for, and which say
nothing of it.

Figures about a text are over the text itself. What its tokens decode to may be another: characters that the
tokenizer does not know, a normalizer's changes, a character that is cut between two tokens.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ease_runtime.llm import TextEngine
from ease_runtime.text.unknown import unknown_id


@dataclass(frozen=True)
class Document:
    """A text, and its ids or the first of them.

    `parse_special`: the special tokens that it mentions are real.
    """

    text: str
    ids: Sequence[int]
    parse_special: bool = False

    @classmethod
    def of(cls, llm: TextEngine, text: str, *, parse_special: bool = False) -> "Document":
        """A text's ids. Raises RequestError for one that is no valid Unicode."""
        return cls(text, llm.encode_text(text, parse_special=parse_special), parse_special)


@dataclass(frozen=True)
class Coverage:
    """What the scored tokens of some texts stand for."""

    num_bytes: float  # of the texts, in UTF-8
    num_tokens: int
    num_unknown: int  # tokens for characters that the tokenizer does not know
    num_lost: int  # characters but spaces that no token stands for

    @property
    def unknown_share(self) -> float:
        """Unknown tokens and lost characters among all."""
        return (self.num_unknown + self.num_lost) / max(1, self.num_tokens + self.num_lost)


def first_tokens(documents: Sequence[Document], num_tokens: int) -> Iterator[Document]:
    """Whole documents until `num_tokens` targets are reached; the last one is cut there."""
    left = num_tokens
    for document in documents:
        if left < 1:
            return
        if len(document.ids) > 1:
            yield replace(document, ids=document.ids[: left + 1])
            left -= len(document.ids) - 1


def coverage(tokenizer: Tokenizer, documents: Sequence[Document]) -> Coverage:
    """Of the tokens that are scored: all of a document's but its first."""
    parts = [_coverage(tokenizer, document) for document in documents]
    return Coverage(
        num_bytes=sum(part.num_bytes for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        num_unknown=sum(part.num_unknown for part in parts),
        num_lost=sum(part.num_lost for part in parts),
    )


def _coverage(tokenizer: Tokenizer, document: Document) -> Coverage:
    text = document.text
    unknown = unknown_id(tokenizer)
    encoding = encode_whole(tokenizer, text, parse_special=document.parse_special)
    before = num_before(document.ids, encoding)
    scored = slice(max(0, 1 - before), len(document.ids) - before)
    spans = encoding.offsets[scored]
    start = encoding.offsets[scored.start - 1][1] if scored.start else 0
    end = spans[-1][1] if spans else 0
    if scored.stop >= len(encoding.ids):
        end = len(text)
    covered = set().union(*(range(*span) for span in spans)) if spans else set()
    return Coverage(
        num_bytes=float(bytes_of_tokens(text, encoding)[scored].sum()),
        num_tokens=len(spans),
        num_unknown=encoding.ids[scored].count(unknown) if unknown is not None else 0,
        num_lost=sum(not text[place].isspace() for place in range(start, end) if place not in covered),
    )


def num_before(ids: Sequence[int], encoding: Encoding) -> int:
    """How many tokens stand before a text's own, given its first ids: the start token, where there is one."""
    return int(list(ids[:1]) != encoding.ids[:1]) if len(ids) else 0


def bytes_of_tokens(text: str, encoding: Encoding) -> NDArray[np.float64]:
    """UTF-8 bytes of the text that each token stands for; those of a character that several tokens write are
    shared out.

    What no token stands for counts with the next one, or the last. Shape: (tokens).
    """
    if not encoding.ids:
        return np.zeros(0, np.float64)
    sizes = np.array([0, *accumulate(len(character.encode()) for character in text)], np.float64)
    ends, place, counts = np.unique(
        [end for _, end in encoding.offsets], return_inverse=True, return_counts=True
    )
    until = sizes[ends]
    until[-1] = sizes[-1]
    shares: NDArray[np.float64] = (np.diff(until, prepend=0.0) / counts)[place]
    return shares


def encode_whole(tokenizer: Tokenizer, text: str, *, parse_special: bool) -> Encoding:
    """A text's own tokens, with the places in the text where each begins and ends, the spaces in them
    included.
    """
    return _untrimmed(tokenizer, parse_special).encode(text, add_special_tokens=False)


@functools.lru_cache(maxsize=4)
def _untrimmed(tokenizer: Tokenizer, parse_special: bool) -> Tokenizer:
    """The same without what comes after the tokens: a byte-level post-processor takes spaces out of their
    places.
    """
    other = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "post_processor": None}))
    other.encode_special_tokens = not parse_special
    return other
