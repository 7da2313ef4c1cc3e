"""What follows in texts of the user's where they have the end of this text: lookup in a corpus, indexed once.

REST (He et al. 2023, arXiv 2311.08252): a suffix array, here of the reversed texts, so that one binary search
finds the longest match.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError
from ease_runtime.drafters.protocol import Drafter, Proposal

LONGEST_MATCH = 32  # tokens
END = -1  # of a text


class CorpusLookup(Drafter):
    """Goes on as some text of a corpus does after the longest match."""

    name = "corpus"

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        """`texts` are ids. The index takes 12 bytes a token."""
        parts = [np.array([*text, END], np.int32) for text in texts]
        self.tokens = np.concatenate([np.array([END], np.int32), *parts])
        self.reversed = self.tokens[::-1].copy()
        self.order = sorted_suffixes(self.reversed, LONGEST_MATCH)

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        """What follows the longest match, up to the end of its text."""
        wanted = list(tokens[: -LONGEST_MATCH - 1 : -1])
        at = bisect_left(self.order, wanted, key=self._window)
        nearest = self.order[max(0, at - 1) : at + 1].tolist()
        proposals = (self._after(first, wanted, limit) for first in nearest)
        return max(
            proposals, key=lambda proposal: proposal.match if proposal.tokens else 0, default=Proposal()
        )

    def _window(self, first: int) -> list[int]:
        window: list[int] = self.reversed[first : first + LONGEST_MATCH].tolist()
        return window

    def _after(self, first: int, wanted: Sequence[int], limit: int) -> Proposal:
        """What follows the place whose reversed text begins at `first`."""
        pairs = zip(self._window(first), wanted, strict=False)
        match = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not match:
            return Proposal()
        place = len(self.tokens) - first
        following = self.tokens[place : place + limit].tolist()
        return Proposal(list(takewhile(lambda token: token != END, following)), match)


def sorted_suffixes(tokens: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    """Where the suffixes of a text begin, in the order of their first `length` (a power of two) tokens.

    Prefix doubling (Manber and Myers 1993). Shape: (n) -> (n).
    """
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64) + 1
    width = 1
    while width < length:
        later = np.zeros_like(rank)
        later[:-width] = rank[width:]
        rank = np.unique(rank * (len(rank) + 1) + later, return_inverse=True)[1] + 1
        width *= 2
    order: NDArray[np.int32] = np.argsort(rank, kind="stable").astype(np.int32)
    return order


def read_corpus(path: str, encode: Callable[[str], list[int]]) -> CorpusLookup:
    """The index of a text file, or of all in a directory and below but for hidden ones.

    Raises RequestError for what is not there, is no UTF-8, or is empty.
    """
    root = Path(path)
    if not root.exists():
        raise RequestError(
            f"the corpus {path} is not there; give --draft-corpus a text file or a directory of them"
        )
    files = [root] if root.is_file() else sorted(found for found in root.rglob("*") if _is_text(found, root))
    texts = [encode(_read(file)) for file in files]
    if not any(texts):
        raise RequestError(
            f"the corpus {path} has no text; give --draft-corpus a file or a directory that has"
        )
    return CorpusLookup(texts)


def _is_text(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{file} of the corpus is no UTF-8 text ({error}); give --draft-corpus text files only"
        ) from None
