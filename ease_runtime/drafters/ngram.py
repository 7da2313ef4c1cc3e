"""What followed when the text last ended as it ends now: lookup of the longest match in the prompt and the
answer.

Prompt lookup (Saxena 2023; LLMA, Yang et al. 2023, arXiv 2304.04487) with matches of any length. The index is
a suffix automaton (Blumer et al. 1985), which grows by a token in constant time and knows the longest suffix
that was there before.
"""

from collections.abc import Sequence

from ease_runtime.drafters.protocol import Drafter, Proposal


class SuffixIndex:
    """A text that grows, and the longest suffix of it that it also has elsewhere.

    A state stands for the substrings that end at the same places; its `end` is the place after one of them.
    """

    def __init__(self) -> None:
        self.size = 0  # tokens read
        self.match = 0  # length of the longest suffix that was there before
        self.place = 0  # where its other occurrence, the latest that is known, goes on
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]
        self._last = 0

    def add(self, token: int) -> None:
        """Read one token more."""
        self.size += 1
        before = self._last
        self._last = self._state({}, self._length[before] + 1, self.size)
        while before != -1 and token not in self._next[before]:
            self._next[before][token] = self._last
            before = self._link[before]
        found = 0 if before == -1 else self._reached(before, token)
        self._link[self._last] = found
        self.match = self._length[found]
        self.place = self._end[found]
        self._end[found] = self.size

    def _reached(self, state: int, token: int) -> int:
        """The state of what `state` stands for with a token more: split off, where that is more than it."""
        to = self._next[state][token]
        length = self._length[state] + 1
        if self._length[to] == length:
            return to
        part = self._state(dict(self._next[to]), length, self._end[to])
        self._link[part] = self._link[to]
        self._link[to] = part
        while state != -1 and self._next[state].get(token) == to:
            self._next[state][token] = part
            state = self._link[state]
        return part

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._length) - 1


class NgramLookup(Drafter):
    """Goes on as the text did when it last ended as it ends now."""

    name = "ngram"

    def begin(self) -> SuffixIndex:
        """Nothing is read."""
        return SuffixIndex()

    def propose(self, tokens: Sequence[int], limit: int, state: SuffixIndex) -> Proposal:
        """What followed the longest match, over again where that is the end of the text."""
        for token in tokens[state.size :]:
            state.add(token)
        if not state.match:
            return Proposal()
        period = len(tokens) - state.place
        return Proposal([tokens[state.place + i % period] for i in range(limit)], state.match)
