"""What passes cost, and whether leaving early pays at these prices (probe.py times them).

Costs depend on the machine and the bundle. A pass over few tokens costs little more than one over one (the weights are
read once), until it is bound by arithmetic: then `recompute` and `verify` save nothing, and with several rows in a pass
that point comes sooner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ease_runtime.layout import SegmentShape
from ease_runtime.policies import ExitPolicy

SIZES = (1, 2, 4, 8, 16)  # tokens of the passes that are timed
SLOTS = 8  # rows of the pass that tells what one row more costs
CACHE_LENGTH = 256  # T of the passes that are timed
LONGEST_DRAFT = 16
FIRST_LOOK = 12  # tokens of a request before it is judged whether leaving early pays


@dataclass
class Costs:
    """Seconds of passes: a table at SIZES for each graph and number."""

    layout: Sequence[SegmentShape]
    tables: dict[tuple[str, int], NDArray[np.float64]]
    per_slot: dict[int, float] = field(default_factory=dict)  # of a segment: one row more in a pass over as many tokens

    @property
    def last_exit(self) -> int:
        """The number of full depth's exit."""
        return max(shape.exit_index or 0 for shape in self.layout)

    def seconds(self, graph: str, number: int, num_tokens: float, num_slots: float = 1.0) -> float:
        """The time of a pass over some tokens (any number: a mean) of some rows; straight lines between and past SIZES."""
        table = self.tables[graph, number]
        slope = (table[-1] - table[-2]) / (SIZES[-1] - SIZES[-2])
        past = max(0.0, num_tokens - SIZES[-1]) * max(0.0, float(slope))
        rows = (num_slots - 1.0) * self.per_slot.get(number, 0.0) if graph == "segment" else 0.0
        return float(np.interp(num_tokens, SIZES, table)) + past + rows

    def over_slots(self, number: int, num_slots: int, length: int) -> float:
        """The time a pass takes longer for slots that it only steps over, with `length` tokens in the cache: all of it attention."""
        return num_slots * self.per_slot[number] * length / CACHE_LENGTH


@dataclass
class Pace:
    """How a request's tokens leave, and what that costs against full depth, a token and row.

    `entered[k]` of its tokens have gone into segment k themselves; the others passed later, as pending ones. With
    r = entered[k] / entered[0], a pass there takes 1 / r tokens in the mean, and a token pays for r of it.
    """

    costs: Costs
    policy: ExitPolicy
    catch_up: str
    entered: list[float] = field(default_factory=list)
    drafted: float = 4.0  # two numbers to begin with: three of four drafts are accepted
    accepted: float = 3.0

    def __post_init__(self) -> None:
        self.entered = [0.0] * len(self.costs.layout)

    def asks(self, exit_index: int) -> bool:
        """Whether tokens are asked at an exit."""
        return exit_index < self.costs.last_exit and self.policy.thresholds.at(exit_index) is not None

    def judged(self, drafted: int, accepted: int) -> None:
        """Note what became of some drafts; what is long ago counts less."""
        self.drafted, self.accepted = 0.95 * self.drafted + drafted, 0.95 * self.accepted + accepted

    def reach(self) -> list[float]:
        """The share of the tokens that go into each segment themselves, at least one in LONGEST_DRAFT."""
        return [max(count / max(self.entered[0], 1.0), 1.0 / LONGEST_DRAFT) for count in self.entered]

    def full_depth(self, num_rows: int) -> float:
        """Seconds of a token at full depth, in passes over `num_rows` rows with a token each."""
        layout, costs = self.costs.layout, self.costs
        seconds = sum(costs.seconds("segment", k, num_rows, num_rows) for k in range(len(layout)))
        return (seconds + costs.seconds("exit", costs.last_exit, num_rows)) / num_rows

    def early(self, num_rows: int) -> float:
        """Seconds of a token that leaves as the request's tokens do, with its share of the catch-up."""
        costs, reach, last = self.costs, self.reach(), len(self.entered) - 1
        seconds = self._to_the_exits(num_rows, last + 1)
        seconds += reach[last] * costs.seconds("exit", costs.last_exit, num_rows * reach[last])
        return seconds / num_rows

    def pays(self, num_rows: int) -> bool:
        """Whether leaving early is faster than full depth."""
        return self.early(num_rows) < self.full_depth(num_rows)

    def draft_length(self, num_rows: int) -> int:
        """The drafts after which full depth is best asked; 0 when it is best not to draft.

        A cycle drafts while tokens leave, at most `limit`; j drafts cost j early tokens and one pass over j + 1, and give
        (1 - a^(j+1)) / (1 - a) tokens at acceptance a (Leviathan et al. 2023, arXiv 2211.17192, equation 1).
        """
        accepted, leaves = min(self.accepted / self.drafted, 0.999), 1.0 - self.reach()[-1]
        best, length = 1.0 / self.full_depth(num_rows), 0
        for limit in range(1, LONGEST_DRAFT + 1):
            chances = [(1.0 - leaves) * leaves**j for j in range(limit)] + [leaves**limit]
            tokens = sum(chance * (1.0 - accepted ** (j + 1)) / (1.0 - accepted) for j, chance in enumerate(chances))
            seconds = sum(chance * self.cycle(j, num_rows) for j, chance in enumerate(chances))
            if tokens / seconds > best:
                best, length = tokens / seconds, limit
        return length

    def cycle(self, num_drafts: int, num_rows: int) -> float:
        """Seconds, a row, of drafting and then judging some tokens."""
        last, judged = len(self.entered) - 1, (num_drafts + 1) * num_rows
        deep = self.costs.seconds("segment", last, judged, num_rows)
        deep += self.costs.seconds("exit", self.costs.last_exit, judged)
        return ((num_drafts + 1) * self._to_the_exits(num_rows, last) + deep) / num_rows

    def _to_the_exits(self, num_rows: int, stop: int) -> float:
        """Seconds of a token of each row through segments [0, stop), as far as it goes, and of what is asked at their early exits."""
        costs, reach, layout, seconds = self.costs, self.reach(), self.costs.layout, 0.0
        for k in range(stop):
            entering = max(1.0, num_rows * reach[k])  # rows that go in together
            passes = num_rows * reach[k] / entering
            tokens = entering if self.catch_up == "propagate" else entering / reach[k]
            seconds += passes * costs.seconds("segment", k, tokens, entering)
            if self.catch_up == "propagate" and k:
                seconds += passes * costs.seconds("kv", k, max(1.0, entering * (1.0 / reach[k] - 1.0)))
            exit_index = layout[k].exit_index
            if exit_index is not None and self.asks(exit_index):
                seconds += passes * self._ask(exit_index, entering, reach[k] - reach[k + 1])
                if layout[k].block:
                    seconds += passes * costs.seconds("block", exit_index, entering / reach[k])
        return seconds

    def _ask(self, exit_index: int, num_tokens: float, leaving: float) -> float:
        """Seconds of what an exit is asked; a head after a gate only for those that leave."""
        head = self.costs.seconds("exit", exit_index, num_tokens)
        if self.policy.asks == "head":
            return head
        number = exit_index if self.policy.asks == "gate" else 0
        return self.costs.seconds(self.policy.asks, number, num_tokens) + max(0.0, leaving) * head
