"""Graph calls timed by themselves: what passes cost on this machine."""

import time

import numpy as np
from numpy.typing import NDArray

from ease_runtime.engine.costs import CACHE_LENGTH, SLOTS, Costs, timed_sizes
from ease_runtime.engine.layout import Call, Span
from ease_runtime.ort.stack import Cache, Stack


class CallProbe:
    """Times one graph call by itself, on whatever is in the buffers."""

    RUNS = 3  # a round

    def __init__(self, stack: Stack, call: Call) -> None:
        self.stack = stack
        self.call = call
        self.seconds = list[float]()

    def run(self) -> None:
        """Run the call a few times (once more to warm up) and note the seconds of each."""
        call = self.call
        stack = self.stack
        rows = np.zeros(call.num_tokens, np.int64)
        out_row = stack.reserve_rows(2 * call.num_tokens, [])
        cache = stack.open_cache(call.num_slots)
        for i in range(self.RUNS + 1):
            began = time.perf_counter()
            self.once(cache, rows, out_row)
            stack.wait()
            if i:
                self.seconds.append(time.perf_counter() - began)

    def once(self, cache: Cache, rows: NDArray[np.int64], out_row: int) -> None:
        """Run the call once, over these rows of the pool and this cache."""
        stack = self.stack
        number = self.call.number
        spans = self.spans()
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
                block = stack.exits[number].block
                assert block is not None, "only of exits with a layer of their own"
                block(cache, spans, rows, out_row)
            case "exit":
                stack.exits[number].head(rows)
            case what:
                stack.exits[number].ask(what, rows, rows)

    def spans(self) -> list[Span]:
        """The call's tokens at the end of its cache, as evenly over its slots as they go."""
        call = self.call
        parts = np.array_split(np.arange(call.num_tokens), min(call.num_slots, call.num_tokens))
        stop = max(call.cache_length, len(parts[0]))
        spans = [Span(slot, stop - len(part), stop) for slot, part in enumerate(parts)]
        return [*spans[:-1], spans[-1]._replace(slot=call.num_slots - 1)]


def measure_costs(stack: Stack) -> Costs:
    """Seconds of a stack's passes (some hundred short ones, over the pool: when nothing else runs)."""
    length = min(CACHE_LENGTH, stack.max_positions)
    trace = stack.trace
    stack.trace = None
    sizes = timed_sizes(stack.kernel_steps)
    tables = {
        key: np.maximum.accumulate(
            [_seconds(stack, Call(*key, size, length)) for size in sizes]
        )  # more tokens take no less time
        for key in _graphs(stack)
    }
    costs = Costs(stack.layout, tables, sizes=sizes)
    for number in range(len(stack.layout)):
        spread = _seconds(stack, Call("segment", number, SLOTS, length, SLOTS))
        costs.per_slot[number] = max(0.0, (spread - costs.seconds("segment", number, SLOTS)) / (SLOTS - 1))
    stack.trace = trace
    return costs


def _graphs(stack: Stack) -> list[tuple[str, int]]:
    """Every graph by its kind and number."""
    found = [("similarity", 0)]
    for number, shape in enumerate(stack.layout):
        found.append(("segment", number))
        if shape.routed:
            found.append(("route", number))
        elif number:
            found.append(("kv", number))
    for number, leave in enumerate(stack.exits):
        found.append(("exit", number))
        if leave.block is not None:
            found.append(("block", number))
        if leave.gate is not None and number < len(stack.exits) - 1:
            found.append(("gate", number))
    return found


def _seconds(stack: Stack, call: Call) -> float:
    probe = CallProbe(stack, call)
    probe.run()
    return min(probe.seconds)  # whatever else the machine does only adds to it
