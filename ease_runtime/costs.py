"""What a pass costs here: graph calls timed by themselves, and whether leaving early pays at these prices.

Costs depend on the machine and the bundle. A pass over few tokens costs little more than one over one (the weights are
read once), until it is bound by arithmetic: then `recompute` and `verify` save nothing, and with several rows in a pass
that point comes sooner.
"""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ease_runtime.policies import ExitPolicy
from ease_runtime.stack import Cache, Call, Span, Stack

SIZES = (1, 2, 4, 8, 16)  # tokens of the passes that are timed
SLOTS = 8  # rows of the pass that tells what one row more costs
CACHE_LENGTH = 256  # T of the passes that are timed
LONGEST_DRAFT = 16
FIRST_LOOK = 12  # tokens of a request before it is judged whether leaving early pays


class CallProbe:
    """Times one graph call by itself, on whatever is in the buffers."""

    RUNS = 3  # a round

    def __init__(self, stack: Stack, call: Call) -> None:
        self.stack, self.call, self.seconds = stack, call, list[float]()

    def run(self) -> None:
        """Run the call a few times (once more to warm up) and note the seconds of each."""
        call, stack = self.call, self.stack
        rows = np.zeros(call.num_tokens, np.int64)
        out_row = stack.reserve_rows(2 * call.num_tokens, [])
        cache = stack.open_cache(call.num_slots)
        for i in range(self.RUNS + 1):
            began = time.perf_counter()
            self.once(cache, rows, out_row)
            if i:
                self.seconds.append(time.perf_counter() - began)

    def once(self, cache: Cache, rows: NDArray[np.int64], out_row: int) -> None:
        """Run the call once, over these rows of the pool and this cache."""
        stack, number, spans = self.stack, self.call.number, self.spans()
        match self.call.graph:
            case "segment" if stack.layout[number].routed:
                positions = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
                stack.run_routed(number, cache, spans, positions, rows, out_row)
            case "segment":
                stack.run_segment(number, cache, spans, rows, out_row)
            case "kv":
                stack.run_kv(number, cache, spans, rows)
            case "route":
                stack.run_route(number, rows)
            case "block":
                stack.run_block(number, cache, spans, rows, out_row)
            case "gate":
                stack.run_gate(number, rows)
            case "similarity":
                stack.run_similarity(rows, rows)
            case _:
                stack.run_exit(number, rows)

    def spans(self) -> list[Span]:
        """The call's tokens at the end of its cache, as evenly over its slots as they go."""
        call = self.call
        parts = np.array_split(np.arange(call.num_tokens), min(call.num_slots, call.num_tokens))
        stop = max(call.cache_length, len(parts[0]))
        spans = [Span(slot, stop - len(part), stop) for slot, part in enumerate(parts)]
        return [*spans[:-1], spans[-1]._replace(slot=call.num_slots - 1)]


class Costs:
    """Seconds of a stack's passes, timed when it is made (some hundred short passes)."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.tables: dict[tuple[str, int], NDArray[np.float64]] = {}  # by graph and number, at SIZES
        self.per_slot: dict[int, float] = {}  # of a segment: one row more in a pass over as many tokens
        trace, stack.trace = stack.trace, None
        for number, shape in enumerate(stack.layout):
            self._time("segment", number)
            if shape.routed:
                self._time("route", number)
            elif number:
                self._time("kv", number)
            length = min(CACHE_LENGTH, stack.max_positions)
            spread = self._probe(Call("segment", number, SLOTS, length, SLOTS))
            self.per_slot[number] = max(0.0, (spread - self.seconds("segment", number, SLOTS)) / (SLOTS - 1))
        for number in range(len(stack.exit_layers)):
            self._time("exit", number)
            if stack.blocks[number]:
                self._time("block", number)
            if stack.has_gates and number < len(stack.exit_layers) - 1:
                self._time("gate", number)
        self._time("similarity", 0)
        stack.trace = trace

    def _time(self, graph: str, number: int) -> None:
        length = min(CACHE_LENGTH, self.stack.max_positions)
        seconds = [self._probe(Call(graph, number, size, length)) for size in SIZES]
        self.tables[graph, number] = np.maximum.accumulate(seconds)  # more tokens take no less time

    def _probe(self, call: Call) -> float:
        probe = CallProbe(self.stack, call)
        probe.run()
        return min(probe.seconds)  # whatever else the machine does only adds to it

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
        self.entered = [0.0] * len(self.costs.stack.layout)

    def asks(self, exit_index: int) -> bool:
        """Whether tokens are asked at an exit."""
        return exit_index < len(self.costs.stack.exit_layers) - 1 and self.policy.thresholds.at(exit_index) is not None

    def judged(self, drafted: int, accepted: int) -> None:
        """Note what became of some drafts; what is long ago counts less."""
        self.drafted, self.accepted = 0.95 * self.drafted + drafted, 0.95 * self.accepted + accepted

    def reach(self) -> list[float]:
        """The share of the tokens that go into each segment themselves, at least one in LONGEST_DRAFT."""
        return [max(count / max(self.entered[0], 1.0), 1.0 / LONGEST_DRAFT) for count in self.entered]

    def full_depth(self, num_rows: int) -> float:
        """Seconds of a token at full depth, in passes over `num_rows` rows with a token each."""
        layout, costs = self.costs.stack.layout, self.costs
        seconds = sum(costs.seconds("segment", k, num_rows, num_rows) for k in range(len(layout)))
        return (seconds + costs.seconds("exit", len(costs.stack.exit_layers) - 1, num_rows)) / num_rows

    def early(self, num_rows: int) -> float:
        """Seconds of a token that leaves as the request's tokens do, with its share of the catch-up."""
        costs, reach, last = self.costs, self.reach(), len(self.entered) - 1
        seconds = self._to_the_exits(num_rows, last + 1)
        seconds += reach[last] * costs.seconds("exit", len(costs.stack.exit_layers) - 1, num_rows * reach[last])
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
        deep += self.costs.seconds("exit", len(self.costs.stack.exit_layers) - 1, judged)
        return ((num_drafts + 1) * self._to_the_exits(num_rows, last) + deep) / num_rows

    def _to_the_exits(self, num_rows: int, stop: int) -> float:
        """Seconds of a token of each row through segments [0, stop), as far as it goes, and of what is asked at their early exits."""
        costs, reach, layout, seconds = self.costs, self.reach(), self.costs.stack.layout, 0.0
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
                if costs.stack.blocks[exit_index]:
                    seconds += passes * costs.seconds("block", exit_index, entering / reach[k])
        return seconds

    def _ask(self, exit_index: int, num_tokens: float, leaving: float) -> float:
        """Seconds of what an exit is asked; a head after a gate only for those that leave."""
        head = self.costs.seconds("exit", exit_index, num_tokens)
        if self.policy.asks == "head":
            return head
        number = exit_index if self.policy.asks == "gate" else 0
        return self.costs.seconds(self.policy.asks, number, num_tokens) + max(0.0, leaving) * head
