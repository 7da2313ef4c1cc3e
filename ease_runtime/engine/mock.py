"""The layers without weights: the protocol `Stack` in plain numpy, for tests of whatever drives one.

    stack = MockStack(
        exit_layers=(2, 4, 6),
        confidence=lambda exit_index, position: 0.9 if position % 3 else 0.2,
    )
    engine = Engine(stack)

A hidden state is one 64-bit number. Each layer hashes it with the keys and values of every position up to its
own, and the logits are a hash of what comes out: a pass over the wrong token, at the wrong position, in the
wrong order or on missing or stale K/V changes every figure after it, and a right one is equal to the bit
however the work was cut into passes. What the contract forbids fails at once, with an AssertionError: gaps in
a cache, rows that nobody wrote or kept, states of another position or another depth. Rows move at every
reservation, and a head's output is spoilt by the next call.

Shapes: S new tokens, N tokens at an exit, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ease_runtime.engine.layout import Call, SegmentShape, Span
from ease_runtime.ort.buffers import Int64s
from ease_runtime.ort.stack import Cache, Captured, StackExit
from ease_runtime.policies import HeadOutput

# a token's logits spread over ±(a share of) this, so that confidences spread over (0, 1)
LARGEST_LOGIT = 12.0
SMALLEST = float(
    np.finfo(np.float32).tiny
)  # stands for a scripted confidence of 0, whose logarithm is needed

EMBEDDED = 1000  # stands for the segment of a state that has been through none
BLOCK = 2000  # and this and the exit's number for one that has been through an exit's own layer
PAD = np.uint64(0xDEAD)

Hashes = NDArray[np.uint64]


def mix(*parts: Hashes) -> Hashes:
    """One 64-bit number of several (the finalizer of MurmurHash3, applied part after part). Broadcasts."""
    mixed = np.zeros(1, np.uint64)
    for part in parts:
        mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        mixed = mixed ^ (mixed >> np.uint64(33))
    return mixed


def _number(value: int) -> Hashes:
    return np.array([value], np.uint64)


class MockCache:
    """K/V of several sequences: a number a slot, layer and position.

    `filled[slot][k]` positions of segment k count.

    As in a real cache a pass over neighbouring slots also writes pads, past what each holds: here into
    whatever is there.
    """

    def __init__(self, num_layers: int, num_segments: int, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self.num_segments = num_segments
        self.entries = np.zeros((num_slots, num_layers, capacity), np.uint64)
        self.filled = [[0] * num_segments for _ in range(num_slots)]

    def free(self, slot: int) -> None:
        self.filled[slot] = [0] * self.num_segments
        self.entries[slot] = mix(self.entries[slot])  # whoever counts on it gets something else

    def scrub(self) -> None:
        for slot, filled in enumerate(self.filled):
            self.entries[slot, :, max(filled) :] = 0


class MockPool:
    """Hidden states by row, each with its position and the segment it came out of (-1: nothing was written
    yet).
    """

    UNKNOWN = -2  # a row that is neither reserved nor live

    def __init__(self) -> None:
        self.moves = 0
        self.states = np.zeros(0, np.uint64)
        self.positions = np.zeros(0, np.int64)
        self.segments = np.zeros(0, np.int64)

    def reserve(self, num_rows: int, live: Sequence[Int64s]) -> int:
        """Free rows in a line. Every living row moves; every other row is forgotten."""
        named = np.concatenate([np.zeros(0, np.int64), *live])
        assert len(set(named.tolist())) == len(named), "a row is named as living twice"
        self.check_written(named)
        self.moves += 1
        first = 1 + self.moves % 5  # another place each time, and never row 0
        order = np.concatenate([np.zeros(0, np.int64), *reversed(live)])
        while (order == first + num_rows + np.arange(len(order))).any():
            first += 1
        size = first + num_rows + len(named)
        states = np.zeros(size, np.uint64)
        positions = np.zeros(size, np.int64)
        segments = np.full(size, self.UNKNOWN, np.int64)
        segments[first : first + num_rows] = -1
        moved = first + num_rows
        for rows in reversed(live):
            here = slice(moved, moved + len(rows))
            states[here] = self.states[rows]
            positions[here] = self.positions[rows]
            segments[here] = self.segments[rows]
            rows[:] = np.arange(here.start, here.stop)
            moved = here.stop
        self.states = states
        self.positions = positions
        self.segments = segments
        return first

    def check_written(self, rows: Int64s) -> None:
        """Whether the rows hold states: written since they were reserved, and named as living ever since."""
        for row in rows.tolist():
            assert self._segment_of(row) >= 0, f"row {row} holds no state"

    def write(self, first: int, states: Hashes, positions: Int64s, segment: int) -> None:
        """Put states into rows that were reserved last and not written since."""
        rows = np.arange(first, first + len(states))
        for row in rows.tolist():
            assert self._segment_of(row) == -1, f"row {row} was not reserved for this pass"
        self.states[rows] = states
        self.segments[rows] = segment
        self.positions[rows] = positions

    def _segment_of(self, row: int) -> int:
        return int(self.segments[row]) if 0 <= row < len(self.segments) else self.UNKNOWN


class MockStack:
    """A stack of hashes.

    Layers and exits as in a bundle; `confidence(exit_index, position)` scripts what exits report.

    Without a script the confidence is that of the logits, and there are no gates. No segment is routed.
    `blocks` are the exits (from 0) with a layer of their own, numbered after the model's. `trace` collects
    the calls, with the tokens that a cache holds as its length.
    """

    def __init__(
        self,
        exit_layers: tuple[int, ...] = (2, 4, 6),
        *,
        vocab_size: int = 23,
        max_positions: int = 64,
        confidence: Callable[[int, int], float] | None = None,
        blocks: tuple[int, ...] = (),
    ) -> None:
        self.blocks = tuple(number in blocks for number in range(len(exit_layers)))
        self.confidence = confidence
        self.exit_layers = exit_layers
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        last = len(exit_layers) - 1
        self.layout = tuple(
            SegmentShape(len(self.layers(number)), number, last=number == last, block=self.blocks[number])
            for number in range(last + 1)
        )
        self.exits = [self._exit(number) for number in range(last + 1)]
        self.exact = True
        self.even = False
        self.kernel_steps: tuple[int, ...] = ()
        self.trace: list[Call] | None = None
        self.pool = MockPool()
        self._output: HeadOutput | None = None

    def _exit(self, number: int) -> StackExit:
        return StackExit(
            self.exit_layers[number],
            head=lambda rows: self.run_exit(number, rows),
            similarity=lambda rows, before: self.run_similarity(rows, before),
            gate=None if self.confidence is None else lambda rows: self.run_gate(number, rows),
            block=(lambda *arguments: self.run_block(number, *arguments)) if self.blocks[number] else None,
        )

    def segment_of(self, layer: int) -> int:
        """The segment (from 0) of a layer (from 1)."""
        return next(number for number, last in enumerate(self.exit_layers) if layer <= last)

    def layers(self, number: int) -> range:
        """The layers (from 1) of a segment (from 0)."""
        return range(self.exit_layers[number - 1] + 1 if number else 1, self.exit_layers[number] + 1)

    def open_cache(self, num_slots: int = 1) -> MockCache:
        count = len(self.exit_layers)  # of segments, and of places for blocks, used or not
        return MockCache(self.exit_layers[-1] + count, 2 * count, num_slots, self.max_positions)

    def wait(self) -> None:
        pass

    def captured(self) -> Captured:
        return Captured()

    def read_states(self, rows: Int64s) -> Hashes:
        return self.pool.states[rows]

    def reserve_rows(self, num_rows: int, live: Sequence[Int64s]) -> int:
        return self.pool.reserve(num_rows, live)

    def run_segment(
        self,
        number: int,
        cache: Cache,
        spans: Sequence[Span],
        inputs: Int64s,
        out_row: int,
        active: NDArray[np.bool_] | None = None,
    ) -> None:
        cache, positions = self._place("segment", number, cache, spans, inputs)
        if number == 0:
            assert all(0 <= token < self.vocab_size for token in inputs.tolist()), (
                "a token is outside the vocabulary"
            )
            states = mix(_number(0), inputs.astype(np.uint64))
            self.pool.write(out_row + len(inputs), states, positions, EMBEDDED)
        else:
            assert (self.pool.segments[inputs] == number - 1).all(), (
                f"a state does not come from segment {number - 1}"
            )
            states = self.pool.states[inputs]
        moving = np.ones(len(inputs), np.bool_) if active is None else active
        for layer in self.layers(number):
            states = np.where(moving, self._layer(cache, layer, number, spans, positions, states), states)
        self.pool.write(out_row, states, positions, number)

    def run_block(self, number: int, cache: Cache, spans: Sequence[Span], rows: Int64s, out_row: int) -> None:
        assert self.blocks[number], f"exit {number} has no layer of its own"
        cache, positions = self._place("block", number, cache, spans, rows)
        layer = self.exit_layers[-1] + 1 + number
        part = len(self.exit_layers) + number
        states = self._layer(cache, layer, part, spans, positions, self.pool.states[rows])
        self.pool.write(out_row, states, positions, BLOCK + number)

    def _layer(
        self,
        cache: MockCache,
        layer: int,
        part: int,
        spans: Sequence[Span],
        positions: Int64s,
        states: Hashes,
    ) -> Hashes:
        """One layer of a part of the cache: writes the new tokens' K/V, and hashes all that each token
        attends to.
        """
        self._write(cache, layer, part, spans, positions, states)
        attended = [
            np.cumsum(cache.entries[slot, layer - 1, :stop], dtype=np.uint64)[start:]
            for slot, start, stop in spans
        ]
        return mix(_number(layer), _number(2), states, np.concatenate(attended))

    def run_kv(self, number: int, cache: Cache, spans: Sequence[Span], rows: Int64s) -> None:
        assert number > 0, "the first segment runs for every token: there is nothing to propagate into it"
        cache, positions = self._place("kv", number, cache, spans, rows)
        for layer in self.layers(number):
            self._write(cache, layer, number, spans, positions, self.pool.states[rows])

    def _write(
        self,
        cache: MockCache,
        layer: int,
        part: int,
        spans: Sequence[Span],
        positions: Int64s,
        states: Hashes,
    ) -> None:
        """A layer's K/V of the new tokens, and pads past what the slots in between hold."""
        entries = cache.entries[:, layer - 1]
        num_places = max(stop - start for _, start, stop in spans)
        new = self.keys_values(layer, positions, states)
        first = 0
        starts = {slot: cache.filled[slot][part] for slot in range(spans[0].slot, spans[-1].slot + 1)}
        starts |= {slot: start for slot, start, _ in spans}
        for slot, start in starts.items():
            entries[slot, start : start + num_places] = PAD
        for slot, start, stop in spans:
            entries[slot, start:stop] = new[first : first + stop - start]
            first += stop - start

    def run_route(self, number: int, rows: Int64s) -> NDArray[np.bool_]:
        raise AssertionError(f"segment {number} is not routed")

    def run_routed(
        self, number: int, cache: Cache, spans: Sequence[Span], positions: Int64s, rows: Int64s, out_row: int
    ) -> None:
        raise AssertionError(f"segment {number} is not routed")

    def run_similarity(self, rows: Int64s, before: Int64s) -> NDArray[np.float32]:
        segments = self.pool.segments[rows]
        self._look("similarity", int(segments[0]), rows, int(segments[0]))
        assert (self.pool.positions[rows] == self.pool.positions[before]).all(), (
            "states of two positions are compared"
        )
        expected = np.where(segments == 0, EMBEDDED, segments - 1)
        assert (self.pool.segments[before] == expected).all(), "a state does not come from before the segment"
        if self.confidence is not None:
            scripted = zip(segments.tolist(), self.pool.positions[rows].tolist(), strict=True)
            return np.array([self.confidence(*one) for one in scripted], np.float32)
        return _unit(mix(self.pool.states[rows], self.pool.states[before])).astype(np.float32)

    def run_gate(self, number: int, rows: Int64s) -> NDArray[np.float32]:
        self._look("gate", number, rows, self._read_by(number))
        assert self.confidence is not None, "a gate's probability is scripted"
        return np.array(
            [self.confidence(number, position) for position in self.pool.positions[rows].tolist()], np.float32
        )

    def run_exit(self, number: int, rows: Int64s) -> HeadOutput:
        self._look("exit", number, rows, self._read_by(number))
        if self._output is not None:
            _spoil(self._output)
        self._output = self._head(number, rows)
        return self._output

    def _read_by(self, number: int) -> int:
        """Where the states come from that an exit reads."""
        return BLOCK + number if self.blocks[number] else number

    def _look(self, kind: str, number: int, rows: Int64s, origin: int) -> None:
        """Check the states that an exit is asked about, and note the call."""
        self.pool.check_written(rows)
        assert (self.pool.segments[rows] == origin).all(), f"a state does not come from segment {origin}"
        if self.trace is not None:
            self.trace.append(Call(kind, number, len(rows)))

    @staticmethod
    def keys_values(layer: int, positions: Int64s, states: Hashes) -> Hashes:
        """What a layer (from 1) stores for states at their positions. Shape: (S), (S) -> (S)."""
        return mix(_number(layer), _number(1), positions.astype(np.uint64), states)

    def _place(
        self, kind: str, number: int, cache: Cache, spans: Sequence[Span], inputs: Int64s
    ) -> tuple[MockCache, Int64s]:
        """Check a pass against the contract and note it. Returns the cache and the new tokens' positions."""
        assert isinstance(cache, MockCache)
        assert [span.slot for span in spans] == sorted({span.slot for span in spans}), (
            "slots are out of order, or named twice"
        )
        assert len(inputs) == sum(stop - start for _, start, stop in spans), (
            "spans and tokens differ in number"
        )
        part = number + len(self.exit_layers) if kind == "block" else number
        for slot, start, stop in spans:
            assert stop > start, "a pass over no token"
            filled = cache.filled[slot][part]
            assert 0 <= start <= filled, (
                f"{kind} {number} holds {filled} positions: writing at {start} leaves a gap"
            )
            assert stop <= self.max_positions, (
                f"position {stop - 1} is past the context of {self.max_positions}"
            )
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
        if part:
            behind = number + 1 if kind == "block" else number
            self.pool.check_written(inputs)
            assert (self.pool.positions[inputs] == positions).all(), (
                f"rows of positions {self.pool.positions[inputs]} run at {positions}"
            )
            assert (self.pool.segments[inputs] < behind).all(), (
                f"a state has been through segment {behind} before"
            )
        for slot, _, stop in spans:
            cache.filled[slot][part] = stop
        if self.trace is not None:
            num_slots = spans[-1].slot - spans[0].slot + 1
            self.trace.append(Call(kind, number, len(inputs), max(span.stop for span in spans), num_slots))
        return cache, positions

    def _head(self, number: int, rows: Int64s) -> HeadOutput:
        """Logits hashed from the states and the exit, and what follows from them.

        Shape: (N) -> (N, V), (N)...
        """
        hashed = mix(
            _number(number),
            _number(3),
            self.pool.states[rows][:, None],
            np.arange(self.vocab_size + 1, dtype=np.uint64),
        )
        uniform = _unit(hashed)
        logits = ((2.0 * uniform[:, 1:] - 1.0) * LARGEST_LOGIT * uniform[:, :1]).astype(np.float32)
        weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        ordered = np.sort(probabilities, axis=1)
        top = ordered[:, -1]
        margin = ordered[:, -1] - ordered[:, -2]
        entropy = -(probabilities * np.log(probabilities)).sum(axis=1)
        if self.confidence is not None:
            scripted = np.array(
                [self.confidence(number, position) for position in self.pool.positions[rows].tolist()]
            )
            top = np.maximum(scripted, SMALLEST)
            margin = scripted
            entropy = (1.0 - scripted) * math.log(self.vocab_size)
        floats = (values.astype(np.float32) for values in (top, margin, entropy))
        return HeadOutput(logits, logits.argmax(axis=1), *floats)


def _unit(hashes: Hashes) -> NDArray[np.float64]:
    """Numbers in [0, 1). Shape: same."""
    unit: NDArray[np.float64] = (hashes >> np.uint64(40)).astype(np.float64) * 2.0**-24
    return unit


def _spoil(output: HeadOutput) -> None:
    """Overwrite an output that its reader should be done with, as the next call to a real head does."""
    assert isinstance(output.logits, np.ndarray)
    for values in (output.logits, output.top_prob, output.margin, output.entropy):
        values.fill(np.nan)
    output.top_id.fill(-1)
