"""What everybody may know of the layers without running them: the shapes of segments, entries of a cache, a
call on record.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """New entries [start, stop) of one slot of a cache."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Call:
    """One graph call, for whoever traces them: what it ran, over how many tokens of how many slots, with
    which cache length.
    """

    # "segment", "kv", "route", "block", "similarity", or "exit" and "gate" (an exit's graph and the head or
    # gate after it)
    graph: str
    number: int  # of the segment or exit, from 0
    num_tokens: int
    cache_length: int = 0
    num_slots: int = 1  # the range that the pass covers, with the slots that it only steps over


@dataclass(frozen=True)
class SegmentShape:
    """A segment: its layers, the exit at its end (from 0) if there is one, and whether tokens go around it.

    `last`: the exit is that of full depth; `block`: it has a layer of its own.
    """

    num_layers: int
    exit_index: int | None
    routed: bool = False
    last: bool = False
    block: bool = False

    @property
    def early_exit(self) -> int | None:
        """The exit at its end, where tokens may leave before the last layer."""
        return None if self.last else self.exit_index
