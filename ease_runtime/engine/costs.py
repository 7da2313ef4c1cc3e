"""What passes cost, and whether leaving early pays at these prices (probe.py times them).

Costs depend on the machine and the bundle. A pass over few tokens costs little more than one over one (the
weights are read once), until it is bound by arithmetic: then `recompute` and `verify` save nothing, and with
several rows in a pass that point comes sooner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ease_runtime.engine.layout import SegmentShape
from ease_runtime.policies import FULL_DEPTH
from ease_runtime.policies.thresholds import Thresholds

SIZES = (1, 2, 4, 8, 16)  # tokens of the passes that are timed
SLOTS = 8  # rows of the pass that tells what one row more costs
CACHE_LENGTH = 256  # T of the passes that are timed
LONGEST_DRAFT = 16
DEFAULT_CAP = 64  # pending tokens at a boundary before they are settled without a token that needs it
FIRST_LOOK = 12  # tokens of a request before it is judged whether leaving early pays


Key = tuple[str, int]  # graph and number of a call


class Asking(Protocol):
    """What costs depend on of a policy: which exits it asks, and for what."""

    @property
    def thresholds(self) -> Thresholds: ...
    @property
    def asks(self) -> str: ...


@dataclass(frozen=True)
class AskedExits:
    """Some of the exits that a policy asks."""

    thresholds: Thresholds
    asks: str


def timed_sizes(kernel_steps: Sequence[int]) -> tuple[int, ...]:
    """Tokens of the passes to time, where another kernel computes products from `kernel_steps` tokens on.

    Both sides of a step are timed, so that no line runs over it, and one size past it, for its slope.
    """
    beside = {size for step in kernel_steps for size in (step - 1, step, 2 * (step - 1))}
    return tuple(sorted({*SIZES, *beside}))


@dataclass
class Costs:
    """Seconds of passes: a table at `sizes` for each graph and number (of one size, where only that was
    timed).

    A call costs more where others have run since its last time, and have taken its weights' place in the
    processor's cache: `again` holds what calls up to the first exit take one token after another, where that
    was timed apart.
    """

    layout: Sequence[SegmentShape]
    tables: dict[Key, NDArray[np.float64]]
    per_slot: dict[int, float] = field(
        default_factory=dict
    )  # of a segment: one row more in a pass over as many tokens
    again: dict[Key, float] = field(default_factory=dict)
    pass_seconds: float = 0.0  # the engine's own, a pass
    sizes: Sequence[int] = SIZES  # tokens of the passes in the tables

    @property
    def last_exit(self) -> int:
        """The number of full depth's exit."""
        return max(shape.exit_index or 0 for shape in self.layout)

    def seconds(self, graph: str, number: int, num_tokens: float, num_slots: float = 1.0) -> float:
        """The time of a pass over some tokens (any number: a mean) of some rows; straight lines between and
        past the sizes.
        """
        table = self.tables[graph, number]
        slope = (table[-1] - table[-2]) / (self.sizes[-1] - self.sizes[-2]) if len(table) > 1 else 0.0
        past = max(0.0, num_tokens - self.sizes[-1]) * max(0.0, float(slope))
        rows = (num_slots - 1.0) * self.per_slot.get(number, 0.0) if graph == "segment" else 0.0
        return float(np.interp(num_tokens, self.sizes[: len(table)], table)) + past + rows

    def token_seconds(
        self,
        reach: Sequence[float],
        policy: Asking,
        catch_up: str,
        *,
        num_rows: int = 1,
        cap: int = DEFAULT_CAP,
        stop: int | None = None,
    ) -> float:
        """Seconds of a token in the mean, with its share of the catch-up, in passes over `num_rows` rows.

        `reach[k]` is the share of the tokens that go into segment k before they leave, each independently of
        the others. To the end and full depth's head, or through segments [0, stop).
        """
        seconds = 0.0
        for k in range(len(reach) if stop is None else stop):
            rows = max(1.0, num_rows * reach[k])  # that go in together
            seconds += self._segment(k, reach, policy, catch_up, rows, cap) + self._ask(
                k, reach, policy, rows
            )
        if stop is None:
            rows = max(1.0, num_rows * reach[-1])
            seconds += reach[-1] * self.seconds("exit", self.last_exit, rows) / rows
        return seconds

    def _segment(
        self, k: int, reach: Sequence[float], policy: Asking, catch_up: str, rows: float, cap: int
    ) -> float:
        """What a segment, and the layer of the exit behind it, take of a token's time.

        A token that goes in takes along those of its row that have left before it since the last one did: a
        geometric number, where each leaves independently. When `cap` have left in a row, they are settled by
        themselves.
        """
        share = reach[k]
        shape = self.layout[k]
        settled = (1.0 - share) ** cap  # share of the passes in which no token goes in
        tokens = (1.0 - settled) / share if share > 0.0 else float(cap)  # of a row, in a pass

        def through(graph: str, num_tokens: float) -> float:
            exit_index = shape.exit_index
            block = (
                self.seconds("block", exit_index, num_tokens)
                if shape.block and exit_index is not None and asked
                else 0.0
            )
            return self._in_turn((graph, k), num_tokens, rows, reach, policy) + block + self.pass_seconds

        asked = self.asks(k, policy)
        if catch_up != "propagate" or k == 0:
            return through("segment", rows * tokens) / (rows * tokens)
        seconds = (1.0 - settled) * through("segment", rows)
        if share < 1.0:
            seconds += (1.0 - share) * through(
                "kv", rows * max(1.0, (tokens - 1.0 + settled) / (1.0 - share))
            )
        return seconds / (rows * tokens)

    def _ask(self, k: int, reach: Sequence[float], policy: Asking, rows: float) -> float:
        """What the exit behind a segment is asked, of a token's time; a head after a gate only for those that
        leave.
        """
        exit_index = self.layout[k].exit_index
        if exit_index is None or not self.asks(k, policy):
            return 0.0
        head: Key = ("exit", exit_index)
        if policy.asks == "head":
            return reach[k] * self._in_turn(head, rows, rows, reach, policy) / rows
        before = (policy.asks, exit_index if policy.asks == "gate" else 0)
        leaving = max(0.0, reach[k] - reach[k + 1]) * (
            self._in_turn(head, 1.0, 1.0, reach, policy) + self.pass_seconds
        )
        return reach[k] * self._in_turn(before, rows, rows, reach, policy) / rows + leaving

    def asks(self, k: int, policy: Asking) -> bool:
        """Whether tokens are asked at the exit behind a segment."""
        exit_index = self.layout[k].early_exit
        return exit_index is not None and policy.thresholds.at(exit_index) is not None

    def _in_turn(
        self, key: Key, num_tokens: float, rows: float, reach: Sequence[float], policy: Asking
    ) -> float:
        """A call's time; what is run for every token comes straight after another one where that has left at
        the first exit.
        """
        seconds = self.seconds(*key, num_tokens, rows)
        again = 1.0 - reach[1] if policy.thresholds and len(reach) > 1 else 0.0
        return (1.0 - again) * seconds + again * self.again.get(key, seconds)

    def over_slots(self, number: int, num_slots: int, length: int) -> float:
        """The time a pass takes longer for slots that it only steps over, with `length` tokens in the cache:
        all of it attention.
        """
        return num_slots * self.per_slot[number] * length / CACHE_LENGTH


@dataclass(frozen=True)
class Drafting:
    """Exits that may draft: the share of the tokens that goes into each segment itself, and of the drafts
    that full depth accepts.
    """

    policy: Asking
    reach: Sequence[float]
    accepted: float


@dataclass
class RequestCost:
    """How a request's tokens leave, and what that costs against full depth, a token and row.

    `entered[k]` of its tokens have gone into segment k themselves; the others passed later, as pending ones.
    `drafted` and `accepted` are by the segment behind which a draft left.
    """

    costs: Costs
    policy: Asking
    catch_up: str
    cap: int = DEFAULT_CAP
    entered: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)  # to begin with three of four drafts are accepted
    accepted: list[float] = field(default_factory=list)
    gain: float = 1.0  # speed that drafts are expected to give, full depth being 1

    def __post_init__(self) -> None:
        count = len(self.costs.layout)
        self.entered = [0.0] * count
        self.drafted = [4.0] * count
        self.accepted = [3.0] * count

    def judged(self, segment: int, drafted: int, accepted: int) -> None:
        """Note what became of some drafts that left behind a segment; what is long ago counts less."""
        self.drafted[segment] = 0.95 * self.drafted[segment] + drafted
        self.accepted[segment] = 0.95 * self.accepted[segment] + accepted

    def reach(self) -> list[float]:
        """The share of the tokens that go into each segment themselves, at least one in LONGEST_DRAFT."""
        return [max(count / max(self.entered[0], 1.0), 1.0 / LONGEST_DRAFT) for count in self.entered]

    def full_depth(self, num_rows: int) -> float:
        """Seconds of a token at full depth, in passes over `num_rows` rows with a token each."""
        return self.costs.token_seconds([1.0] * len(self.entered), FULL_DEPTH, "recompute", num_rows=num_rows)

    def early(self, num_rows: int) -> float:
        """Seconds of a token that leaves as the request's tokens do, with its share of the catch-up."""
        return self.costs.token_seconds(
            self.reach(), self.policy, self.catch_up, num_rows=num_rows, cap=self.cap
        )

    def pays(self, num_rows: int) -> bool:
        """Whether leaving early is faster than full depth."""
        return self.early(num_rows) < self.full_depth(num_rows)

    def trial(self, num_rows: int) -> float:
        """What it costs to ask the exits of FIRST_LOOK tokens that all stay, in tokens at full depth."""
        asked = self.costs.token_seconds(
            [1.0] * len(self.entered), self.policy, self.catch_up, num_rows=num_rows, cap=self.cap
        )
        return FIRST_LOOK * (asked / self.full_depth(num_rows) - 1.0)

    def draft_length(self, num_rows: int) -> int:
        """The drafts after which full depth is best asked; 0 when it is best not to draft."""
        speed, length = self._fastest(self._drafting(), num_rows)
        self.gain = speed * self.full_depth(num_rows)
        return length

    def give_up_exit(self, num_rows: int) -> int | None:
        """Ask an exit no more without which drafting is fastest. The segment before it; None: all stay.

        The rule is DEL's (Entezari Zarch et al. 2025, arXiv 2504.05598), tokens over what drafting and
        judging them costs, with seconds where that counts layers.
        """
        asked = [k for k in range(len(self.entered) - 1) if self.costs.asks(k, self.policy)]
        if len(asked) < 2:
            return None
        best, _ = self._fastest(self._drafting(), num_rows)
        found = None
        for k in asked:
            speed, _ = self._fastest(self._drafting(without=k), num_rows)
            if speed > best:
                best = speed
                found = k
        if found is not None:
            left = self._drafting(without=found)
            self.entered = [share * self.entered[0] for share in left.reach]
            self.policy = left.policy
        return found

    def _drafting(self, without: int | None = None) -> Drafting:
        """The exits that are asked, but for the one behind a segment: what would leave there leaves at the
        next one, if there is one, since confidence grows with depth.
        """
        layout = self.costs.layout
        reach = self.reach()
        thresholds = [
            None if k == without else self.policy.thresholds.at(shape.early_exit)
            for k, shape in enumerate(layout)
            if shape.early_exit is not None
        ]
        policy = AskedExits(Thresholds(tuple(thresholds)), self.policy.asks)
        for k in range(len(reach) - 1):
            if not self.costs.asks(k, policy):
                reach[k + 1] = reach[k]
        leaving = [reach[k] - reach[k + 1] for k in range(len(reach) - 1)]
        rates = [min(a / d, 0.999) for a, d in zip(self.accepted, self.drafted, strict=True)]
        total = sum(leaving)
        accepted = (
            sum(share * rate for share, rate in zip(leaving, rates, strict=False)) / total if total else 0.0
        )
        return Drafting(policy, reach, accepted)

    def _fastest(self, drafting: Drafting, num_rows: int) -> tuple[float, int]:
        """Tokens a second, a row, at the best limit of drafts, and that limit; 0: full depth is faster.

        A cycle drafts while tokens leave, at most `limit`; j drafts cost j early tokens and one pass over j +
        1, and give (1 - a^(j+1)) / (1 - a) tokens at acceptance a (Leviathan et al. 2023, arXiv 2211.17192,
        equation 1).
        """
        accepted = drafting.accepted
        leaves = 1.0 - drafting.reach[-1]
        best = 1.0 / self.full_depth(num_rows)
        length = 0
        draft = self.draft(num_rows, drafting)
        cycles = [self._cycle(j, num_rows, draft) for j in range(LONGEST_DRAFT + 1)]
        for limit in range(1, LONGEST_DRAFT + 1):
            chances = [(1.0 - leaves) * leaves**j for j in range(limit)] + [leaves**limit]
            tokens = sum(
                chance * (1.0 - accepted ** (j + 1)) / (1.0 - accepted) for j, chance in enumerate(chances)
            )
            seconds = sum(chance * cycles[j] for j, chance in enumerate(chances))
            if tokens / seconds > best:
                best = tokens / seconds
                length = limit
        return best, length

    def draft(self, num_rows: int, drafting: Drafting | None = None) -> float:
        """Seconds of one draft, a row."""
        drafting = drafting or self._drafting()
        last = len(self.entered) - 1
        return self.costs.token_seconds(
            drafting.reach, drafting.policy, self.catch_up, num_rows=num_rows, cap=self.cap, stop=last
        )

    def cycle(self, num_drafts: int, num_rows: int) -> float:
        """Seconds, a row, of drafting and then judging some tokens."""
        return self._cycle(num_drafts, num_rows, self.draft(num_rows))

    def _cycle(self, num_drafts: int, num_rows: int, draft: float) -> float:
        """The same at so many seconds a draft."""
        last = len(self.entered) - 1
        judged = (num_drafts + 1) * num_rows
        deep = self.costs.seconds("segment", last, judged, num_rows)
        deep += self.costs.seconds("exit", self.costs.last_exit, judged)
        return (num_drafts + 1) * draft + deep / num_rows
