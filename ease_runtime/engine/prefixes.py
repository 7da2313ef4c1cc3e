"""Keys and values of beginnings that several requests share, kept after the requests.

    prefixes = PrefixCache(cache, limit_bytes=256 << 20)
    prefixes.store(sequence)              # what all segments have of it
    shared = prefixes.load(sequence)      # into the slot of another, that has not run

A prompt runs every segment whatever the catch-up, so what is kept of it is what full depth computes. Of an
answer it is that under `recompute` and `verify` only: `propagate` leaves others. Entries are told apart by
who may share them, and the one that was used longest ago goes first. Where there is no memory, all of them
go, and requests run as without. Meant for caches in the host's memory.
"""

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import DeviceError
from ease_runtime.engine.sequence import Int64s, TokenSequence
from ease_runtime.ort.buffers import RowCache
from ease_runtime.ort.stack import Cache, Stack

LEAST = 16  # tokens that are worth keeping, or taking over


class Prefix:
    """Tokens with their keys and values."""

    def __init__(self, owner: str, tokens: Int64s, layers: list[NDArray[Any]]) -> None:
        self.owner = owner
        self.tokens = tokens
        self.layers = layers  # of each layer (2, heads, tokens, width)

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(values.nbytes for values in self.layers)

    def shared(self, tokens: Int64s) -> int:
        """How many tokens two texts begin with alike."""
        count = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(self.tokens[:count] != tokens[:count])
        return int(differ[0]) if len(differ) else count


class PrefixCache:
    """At most `limit_bytes` of a cache's keys and values."""

    def __init__(self, cache: RowCache, limit_bytes: int) -> None:
        self.cache = cache
        self.limit_bytes = limit_bytes
        self.entries: OrderedDict[int, Prefix] = OrderedDict()  # the one used last at the end
        self.num_bytes = 0
        self.next_key = 0

    def store(self, sequence: TokenSequence) -> None:
        """Keep what all segments have of a sequence, unless most of it is there."""
        request = sequence.request
        if request.sharing is None or sequence.slot is None:
            return
        count = min(sequence.counters.done[-1], sequence.num_final)
        if request.catch_up == "propagate":
            count = min(count, sequence.num_prompt)
        if count < LEAST or count * self.cache.position_bytes > self.limit_bytes:
            return
        tokens = np.array(sequence.tokens[:count], np.int64)
        key, shared = self._best(request.sharing, tokens)
        if count - shared < LEAST:
            self.entries.move_to_end(key)
            return
        if key >= 0 and shared == len(self.entries[key].tokens):
            self._drop(key)  # the new one goes on from it
        while self.entries and self.num_bytes + count * self.cache.position_bytes > self.limit_bytes:
            self._drop(next(iter(self.entries)))
        try:
            layers = self.cache.copy_out(sequence.slot, count)
        except MemoryError:
            self._clear()
            return
        entry = Prefix(request.sharing, tokens, layers)
        self.entries[self.next_key] = entry
        self.next_key += 1
        self.num_bytes += entry.num_bytes

    def load(self, sequence: TokenSequence) -> int:
        """Give a sequence, which has a slot and has not run, what is kept of its beginning; how many tokens
        that is. Its last token always runs.
        """
        request = sequence.request
        if request.sharing is None or request.score_prompt or sequence.slot is None:
            return 0
        tokens = np.array(sequence.tokens[:-1], np.int64)
        key, shared = self._best(request.sharing, tokens)
        if shared < LEAST:
            return 0
        self.entries.move_to_end(key)
        try:
            self.cache.copy_in(sequence.slot, self.entries[key].layers, shared)
        except DeviceError:  # the slot is empty: the sequence runs its prompt, and may find no memory itself
            self._clear()
            return 0
        sequence.counters.done = [shared] * len(sequence.counters.done)
        return shared

    def _best(self, owner: str, tokens: Int64s) -> tuple[int, int]:
        """The entry that has most of a text's beginning, and how many tokens; -1 and 0 where none has any."""
        found = ((entry.shared(tokens), key) for key, entry in self.entries.items() if entry.owner == owner)
        shared, key = max(found, default=(0, -1))
        return key, shared

    def _clear(self) -> None:
        """Keep nothing."""
        self.entries.clear()
        self.num_bytes = 0

    def _drop(self, key: int) -> None:
        self.num_bytes -= self.entries.pop(key).num_bytes


def open_prefixes(stack: Stack, cache: Cache, limit_bytes: int) -> PrefixCache | None:
    """None where a stack's keys and values cannot be kept: tokens that go around layers, and exits' own
    layers, have entries that differ from text to text; nor are those in a device's memory.
    """
    routed = any(segment.routed for segment in stack.layout)
    blocks = any(leave.block is not None for leave in stack.exits)
    if limit_bytes < 1 or routed or blocks or not isinstance(cache, RowCache):
        return None
    return PrefixCache(cache, limit_bytes)
