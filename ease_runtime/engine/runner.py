"""Runs sequences' tokens through the layers: the only caller of the stack, and the only writer of counters,
slots' K/V and the pool.

    runner = Runner(stack)
    sequence = runner.open(ids)                             # in a slot, nothing run
    runner.advance(0, [(sequence, 0, len(ids))])            # through the first segment
    runner.ask(0, "head", [(sequence, np.arange(3))])       # what the first exit says of three of them

The engine gives it passes (`run`); evaluation and export call `open`, `advance`, `propagate`, `ask` and
`states` themselves. Decides nothing.
"""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_runtime.engine.layout import Span
from ease_runtime.engine.sampling import Greedy
from ease_runtime.engine.schedule import Batch, question
from ease_runtime.engine.sequence import NO_ROWS, Counters, Decision, Drafts, Int64s, Request, TokenSequence
from ease_runtime.engine.slots import Slots
from ease_runtime.ort.stack import Stack
from ease_runtime.policies import FULL_DEPTH, ExitOutput, ExitPolicy

Parts = Many[tuple[TokenSequence, int, int]]  # tokens [start, stop) of some sequences


class Runner:
    """A stack with a cache of `num_slots` slots, and the sequences in them.

    `exact`: every pass gives the bits that any other division into passes would give, also where that takes
    more time; those with a sequence under `verify` always do.
    """

    def __init__(self, stack: Stack, num_slots: int = 1, exact: bool = False) -> None:
        self.stack = stack
        self.exact = exact
        self.cache = stack.open_cache(num_slots)
        self.slots = Slots(num_slots)
        self.num_early = len(stack.exits) - 1

    def new(
        self, tokens: Many[int], policy: ExitPolicy, request: Request, asked: frozenset[int]
    ) -> TokenSequence:
        """A sequence without a slot, whose tokens have not run; `asked` are the early exits (from 0) that it
        may be asked at.
        """
        num_segments = len(self.stack.layout)
        limit = self.stack.max_positions
        counters = Counters(
            done=[0] * num_segments,
            rows=np.zeros(limit, np.int64),
            inside=np.zeros((num_segments, limit), np.bool_),
            block_done=[0] * self.num_early,
            asked=asked,
        )
        return TokenSequence(
            request, list(tokens), len(tokens), counters, Decision(policy, policy.begin()), Drafts()
        )

    def open(self, tokens: Many[int], asked: frozenset[int] = frozenset()) -> TokenSequence:
        """A sequence in a slot whose tokens have not run yet, unchecked: for whoever runs the segments with
        `advance`.
        """
        sequence = self.new(
            tokens, FULL_DEPTH, Request(self.stack.max_positions, "recompute", Greedy()), asked
        )
        self.slots.seat(sequence)
        return sequence

    def release(self, sequence: TokenSequence) -> None:
        """Give a sequence's slot up, if it has one."""
        if sequence.slot is not None:
            self.cache.free(sequence.slot)
            self.slots.free(sequence)

    def run(self, batch: Batch) -> list[ExitOutput | None]:
        """Run a pass over some rows, and ask the exit behind it what it must say of each.

        Where its layers fail nothing has changed: the same pass may run again.
        """
        kind = batch[0][1].kind
        segment = batch[0][1].segment
        parts = [(sequence, work.start, work.stop) for sequence, work in batch]
        if kind == "kv":
            self.propagate(segment, parts)
        elif kind == "segment":
            self.advance(segment, parts)
        exit_index = self.stack.layout[segment].exit_index
        if kind == "kv" or exit_index is None:
            return [None] * len(batch)
        return self._ask_batch(batch, segment, exit_index)

    def propagate(self, segment: int, parts: Parts) -> None:
        """Write K/V of tokens [start, stop) of some sequences into a segment, from the states that they left
        with.
        """
        self._keep_bits(parts)
        with_block = self._with_block(segment, parts)
        out_row = self._reserve(_num_tokens(with_block)) if with_block else 0
        self.stack.run_kv(segment, self.cache, _spans(parts), _rows(parts))
        _mark(segment, parts)
        self._run_block(segment, with_block, out_row)

    def advance(self, segment: int, parts: Parts, active: NDArray[np.bool_] | None = None) -> None:
        """Run tokens [start, stop) of some sequences through a segment, or around it where it is routed.

        Shape: active (N).
        """
        self._keep_bits(parts)
        if self.stack.layout[segment].routed:
            self._advance_routed(segment, parts)
            _mark(segment, parts)
            return
        num_tokens = _num_tokens(parts)
        with_block = self._with_block(segment, parts)
        num_rows = (
            num_tokens if segment else 2 * num_tokens
        )  # the first segment also gives what it was given, embedded
        out_row = self._reserve(num_rows + _num_tokens(with_block))
        inputs = (
            _rows(parts)
            if segment
            else np.concatenate([np.array(s.tokens[start:stop], np.int64) for s, start, stop in parts])
        )
        self.stack.run_segment(segment, self.cache, _spans(parts), inputs, out_row, active)
        first = 0
        for sequence, start, stop in parts:
            counters = sequence.counters
            last = first + stop - start
            counters.rows[start:stop] = np.arange(out_row + first, out_row + last)
            counters.first = start
            counters.entered = inputs[first:last] if segment else counters.rows[start:stop] + num_tokens
            first = last
        _mark(segment, parts)
        self._run_block(segment, with_block, out_row + num_rows)

    def _advance_routed(self, segment: int, parts: Parts) -> None:
        stack = self.stack
        goes_in = stack.run_route(segment, _rows(parts))
        moving = []
        spans = []
        first = 0
        for sequence, start, stop in parts:
            inside = sequence.counters.inside[segment]
            inside[start:stop] = goes_in[first : first + stop - start]
            positions = start + np.flatnonzero(inside[start:stop])
            first += stop - start
            if len(positions):
                written = int(np.count_nonzero(inside[:start]))
                spans.append(_span(sequence, written, written + len(positions)))
                moving.append((sequence.counters, positions))
        if not moving:
            return
        out_row = self._reserve(sum(len(positions) for _, positions in moving))
        rows = np.concatenate([counters.rows[positions] for counters, positions in moving])
        stack.run_routed(
            segment, self.cache, spans, np.concatenate([positions for _, positions in moving]), rows, out_row
        )
        for counters, positions in moving:
            counters.rows[positions] = np.arange(out_row, out_row + len(positions))
            out_row += len(positions)

    def ask(self, exit_index: int, what: str, parts: Many[tuple[TokenSequence, Any]]) -> Any:
        """What an exit says of some positions (a slice or an array) of each sequence's last pass: "head",
        "gate" or "similarity".

        Returns a HeadOutput, or an array (N); the next call overwrites it.
        """
        leave = self.stack.exits[exit_index]
        if what != "similarity":
            rows = np.concatenate([self._exit_rows(sequence, where, exit_index) for sequence, where in parts])
            return leave.ask(what, rows, NO_ROWS)
        before = [
            sequence.counters.entered[_shifted(where, -sequence.counters.first)] for sequence, where in parts
        ]
        rows = np.concatenate([sequence.counters.rows[where] for sequence, where in parts])
        return leave.ask(what, rows, np.concatenate(before))

    def hold(self, sequence: TokenSequence, exit_index: int) -> None:
        """Keep what an exit's own layer made of the newest token: its head is asked in a later pass."""
        if self.stack.exits[exit_index].block is not None:
            newest = len(sequence.tokens) - 1
            sequence.counters.held = self._exit_rows(sequence, slice(newest, newest + 1), exit_index).copy()

    def states(self, sequence: TokenSequence, start: int, stop: int) -> NDArray[Any]:
        """A copy of the hidden states of tokens [start, stop) that have just run.

        Shape: (stop - start, D).
        """
        return self.stack.read_states(sequence.counters.rows[start:stop])

    def _ask_batch(self, batch: Batch, segment: int, exit_index: int) -> list[ExitOutput | None]:
        """Ask an exit about every row that it must say something of, in one call for each thing that it can
        say.
        """
        early = exit_index < self.num_early
        questions = [question(sequence, work, exit_index, early) for sequence, work in batch]
        outputs: list[ExitOutput | None] = [None] * len(batch)
        for what in sorted({asked[0] for asked in questions if asked}):
            asking = [
                (i, asked[1], batch[i][1].stop)
                for i, asked in enumerate(questions)
                if asked and asked[0] == what
            ]
            said = self.ask(
                exit_index, what, [(batch[i][0], slice(start, stop)) for i, start, stop in asking]
            )
            first = 0
            for i, start, stop in asking:
                last = first + stop - start
                positions = np.arange(start, stop)
                if what == "head":
                    outputs[i] = ExitOutput(exit_index, positions, head=said.tokens(first, last), early=early)
                    batch[i][0].counters.held = NO_ROWS
                else:
                    outputs[i] = ExitOutput(exit_index, positions, value=said[first:last])
                first = last
        return outputs

    def _exit_rows(self, sequence: TokenSequence, where: Any, exit_index: int) -> Int64s:
        """The pool rows that an exit reads of some positions of the last pass."""
        counters = sequence.counters
        if self.stack.exits[exit_index].block is None:
            found: Int64s = counters.rows[where]
            return found
        if len(counters.held):
            return counters.held
        positions = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        rows: Int64s = positions - counters.first + counters.block_row
        return rows

    def _keep_bits(self, parts: Parts) -> None:
        self.stack.even = self.exact or any(s.request.catch_up == "verify" for s, _, _ in parts)

    def _reserve(self, num_rows: int) -> int:
        """Free rows of the pool; those that are still needed keep their states."""
        return self.stack.reserve_rows(
            num_rows, [rows for s in self.slots.sequences for rows in s.counters.live_rows()]
        )

    def _with_block(self, segment: int, parts: Parts) -> Parts:
        """Those of some sequences that the exit behind a segment may be asked about, where that has a layer
        of its own.
        """
        shape = self.stack.layout[segment]
        return [part for part in parts if shape.exit_index in part[0].counters.asked] if shape.block else []

    def _run_block(self, segment: int, parts: Parts, out_row: int) -> None:
        """Run tokens that have come out of a segment through the layer of the exit behind it."""
        exit_index = self.stack.layout[segment].exit_index
        if not parts or exit_index is None:
            return
        block = self.stack.exits[exit_index].block
        assert block is not None, "only of exits with a layer of their own"
        block(self.cache, _spans(parts), _rows(parts), out_row)
        for sequence, start, stop in parts:
            counters = sequence.counters
            assert start <= counters.block_done[exit_index], "an exit's own layer runs over every token"
            counters.block_done[exit_index] = stop
            counters.first = start
            counters.block_row = out_row
            out_row += stop - start


def _mark(segment: int, parts: Parts) -> None:
    """These tokens have K/V in a segment."""
    for sequence, _, stop in parts:
        sequence.counters.done[segment] = stop


def _shifted(where: Any, offset: int) -> Any:
    """The same positions, counted from elsewhere."""
    return slice(where.start + offset, where.stop + offset) if isinstance(where, slice) else where + offset


def _num_tokens(parts: Parts) -> int:
    return sum(stop - start for _, start, stop in parts)


def _rows(parts: Parts) -> Int64s:
    return np.concatenate([sequence.counters.rows[start:stop] for sequence, start, stop in parts])


def _spans(parts: Parts) -> list[Span]:
    return [_span(*part) for part in parts]


def _span(sequence: TokenSequence, start: int, stop: int) -> Span:
    """Entries [start, stop) of a sequence's slot."""
    assert sequence.slot is not None, "a sequence without a slot cannot run"
    return Span(sequence.slot, start, stop)
