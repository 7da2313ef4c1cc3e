"""The engine: schedule → run → commit, one graph pass a step.

    engine = Engine(stack)
    sequence = engine.start([5, 17, 3], max_new_tokens=50, policy=ExitPolicy.create("max-prob", [0.7], num_exits=3))
    while not sequence.finish_reason:
        token = engine.step(sequence)        # a Token when one came out, None when the pass only went deeper

Knows nothing about text. `schedule` is pure; only `run` touches the stack; only `commit` asks the policy and the sampler.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ease_runtime.errors import RequestError, did_you_mean
from ease_runtime.policy import ExitPolicy, HeadOutput
from ease_runtime.sampling import Greedy, Sampler
from ease_runtime.sequence import Leaving, Sequence, Token
from ease_runtime.stack import Stack

CATCH_UPS = ("propagate", "recompute")
DEFAULT_CAP = 64  # pending tokens at a boundary before they are settled without a token that needs it


@dataclass(frozen=True)
class Work:
    """One pass: tokens [start, stop) of a sequence through a segment (from 0), or their propagated K/V into it."""

    kind: str  # "segment", "kv", or "head": the newest token's gate has opened, and the exit's head is asked
    segment: int  # from 0
    start: int
    stop: int


@dataclass(frozen=True)
class Seen:
    """What an exit said of the newest token: its head's output, or (N = 1) its gate's probability."""

    output: HeadOutput | None = None
    gate: NDArray[np.float32] | None = None


def schedule(sequence: Sequence, cap: int = DEFAULT_CAP) -> Work:
    """What a sequence needs next.

    A token that enters a segment takes along all that are pending before it: in the same pass (`recompute`), or as K/V of
    their frozen states just before (`propagate`, CALM). Between two tokens a queue that has reached `cap` is settled, which
    moves work and changes no token and no depth. A prompt runs every segment whatever the catch-up.
    """
    done, newest = sequence.done, len(sequence.tokens) - 1
    kind = "kv" if sequence.catch_up == "propagate" else "segment"
    level = sequence.level
    if sequence.leaving is not None:
        return Work("head", sequence.leaving.segment, newest, newest + 1)
    if level == 0:
        assert done[0] <= newest, "a cropped sequence needs its next token before it can go on"
        if not sequence.prefilling:
            for k in range(1, len(done)):
                if done[k - 1] - done[k] >= cap:
                    return Work(kind, k, done[k], done[k - 1])
        return Work("segment", 0, done[0], newest + 1)
    if kind == "kv" and done[level] < newest and not sequence.prefilling:
        return Work("kv", level, done[level], newest)
    return Work("segment", level, done[level], newest + 1)


class Engine:
    """Drives sequences over a stack. `cap` bounds the pending tokens at a boundary. Raises RequestError for a cap below 1."""

    def __init__(self, stack: Stack, *, cap: int = DEFAULT_CAP) -> None:
        if cap < 1:
            raise RequestError(f"cap {cap} is below 1")
        self.stack, self.cap = stack, cap
        self.sequences: list[Sequence] = []  # unfinished: their pending states live in the pool

    def start(
        self,
        prompt: Many[int],
        *,
        max_new_tokens: int,
        policy: ExitPolicy | None = None,
        catch_up: str = "recompute",
        sampler: Sampler | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Sequence:
        """A new sequence. Raises RequestError when the prompt is empty, too long, or has ids outside the vocabulary."""
        limit, policy = self.stack.max_positions, policy or ExitPolicy()
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) >= limit:
            raise RequestError(f"the prompt has {len(prompt)} tokens; this model's context of {limit} leaves no room for an answer")
        if not all(0 <= token < self.stack.vocab_size for token in prompt):
            raise RequestError(f"the prompt has token ids outside the vocabulary of {self.stack.vocab_size}")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens {max_new_tokens} is below 1")
        self.check(policy, catch_up)
        sequence = self.open(prompt, policy, catch_up)
        sequence.max_length = min(limit, len(prompt) + max_new_tokens)
        sequence.sampler, sequence.stop_ids = sampler or Greedy(), stop_ids
        return sequence

    def check(self, policy: ExitPolicy, catch_up: str) -> None:
        """Raises RequestError for a catch-up that is unknown, or a setting that this bundle cannot run."""
        if catch_up not in CATCH_UPS:
            raise RequestError(f"unknown catch-up '{catch_up}'; {did_you_mean(catch_up, CATCH_UPS)}")
        if policy.thresholds is None:
            return
        if catch_up == "propagate" and any(segment.routed for segment in self.stack.layout):
            raise RequestError("catch-up 'propagate' has no K/V for routed layers; use recompute")
        if policy.asks_gate and not self.stack.has_gates:
            raise RequestError("policy 'gate' needs a gate at every early exit; train them: ease-train gates CHECKPOINT --out CHECKPOINT2")

    def open(self, tokens: Many[int], policy: ExitPolicy, catch_up: str) -> Sequence:
        """A sequence whose tokens have not run yet, unchecked. It is released when it ends, or by `release`."""
        stack = self.stack
        sequence = Sequence(
            tokens=list(tokens),
            num_prompt=len(tokens),
            max_length=stack.max_positions,
            policy=policy,
            catch_up=catch_up,
            sampler=Greedy(),
            stop_ids=frozenset(),
            cache=stack.open_cache(),
            done=[0] * len(stack.layout),
            rows=np.zeros(stack.max_positions, np.int64),
            inside=np.zeros((len(stack.layout), stack.max_positions), np.bool_),
        )
        self.sequences.append(sequence)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Give up a sequence's pending states."""
        self.sequences = [other for other in self.sequences if other is not sequence]

    def generate(self, sequence: Sequence) -> Iterator[Token]:
        """Step a sequence to its end, yielding its tokens. Whoever stops reading early ends it."""
        try:
            while sequence.finish_reason is None:
                if (token := self.step(sequence)) is not None:
                    yield token
        finally:
            self.release(sequence)

    def step(self, sequence: Sequence) -> Token | None:
        """One pass; the token that it produced, if it did."""
        work = schedule(sequence, self.cap)
        token = self.commit(sequence, work, self.run(sequence, work))
        if sequence.finish_reason is not None:
            self.release(sequence)
        return token

    def run(self, sequence: Sequence, work: Work) -> Seen | None:
        """Run a pass, and ask the exit behind it when the newest token is in it and still undecided there."""
        stack, rows, policy = self.stack, sequence.rows, sequence.policy
        if work.kind == "kv":
            stack.run_kv(work.segment, sequence.cache, work.start, rows[work.start : work.stop])
            return None
        if work.kind == "segment":
            self.advance(sequence, work.segment, work.start, work.stop)
        exit_index = stack.layout[work.segment].exit_index
        if exit_index is None or work.stop < len(sequence.tokens) or sequence.decided:
            return None
        newest, early = rows[work.stop - 1 : work.stop], exit_index < len(stack.exit_layers) - 1
        if early and not policy.tests(exit_index):
            return None
        if early and policy.asks_gate and work.kind == "segment":
            return Seen(gate=stack.run_gate(exit_index, newest))
        return Seen(output=stack.run_exit(exit_index, newest))

    def advance(self, sequence: Sequence, segment: int, start: int, stop: int, active: NDArray[np.bool_] | None = None) -> None:
        """Run tokens [start, stop) through a segment, or around it where it is routed. Shape: active (stop - start)."""
        stack, rows = self.stack, sequence.rows
        if stack.layout[segment].routed:
            inside = stack.run_route(segment, rows[start:stop])
            sequence.inside[segment, start:stop] = inside
            moving = start + np.flatnonzero(inside)
        else:
            moving = np.arange(start, stop)
        if not len(moving):
            return
        out_row = stack.reserve_rows(len(moving), [s.live_rows() for s in self.sequences])
        if stack.layout[segment].routed:
            written = int(np.count_nonzero(sequence.inside[segment, :start]))
            stack.run_routed(segment, sequence.cache, written, moving, rows[moving], out_row)
        else:
            inputs = rows[start:stop] if segment else np.array(sequence.tokens[start:stop], np.int64)
            stack.run_segment(segment, sequence.cache, start, inputs, out_row, active)
        rows[moving] = np.arange(out_row, out_row + len(moving))

    def commit(self, sequence: Sequence, work: Work, seen: Seen | None) -> Token | None:
        """Advance the counters; let the policy decide and the sampler choose; emit the token once its passes are done."""
        if work.kind != "head":
            sequence.done[work.segment] = work.stop
        if work.kind == "kv" or work.stop < len(sequence.tokens):
            return None
        if seen is not None:
            self.decide(sequence, work.segment, seen)
        if sequence.leaving is not None:
            return None
        if sequence.decided is None or (sequence.prefilling and work.segment < len(sequence.done) - 1):
            sequence.level = work.segment + 1
            return None
        return self.emit(sequence, sequence.decided)

    def decide(self, sequence: Sequence, segment: int, seen: Seen) -> None:
        """Let the newest token leave at the exit behind a segment, or not: sets `decided`, or `leaving` when a gate opens."""
        exit_index, policy = self.stack.layout[segment].exit_index, sequence.policy
        assert exit_index is not None, "only an exit says something"
        if seen.output is None:
            assert seen.gate is not None, "an exit has a head or a gate"
            if policy.leaves(exit_index, seen.gate)[0]:
                sequence.leaving = Leaving(segment, float(seen.gate[0]))
            return
        if sequence.leaving is not None:
            confidence, sequence.leaving = sequence.leaving.confidence, None
        else:
            values = policy.confidence(seen.output)
            if exit_index < len(self.stack.exit_layers) - 1 and not policy.leaves(exit_index, values)[0]:
                return
            confidence = float(values[0])
        position = len(sequence.tokens)
        token, logits = sequence.sampler.pick(seen.output, position), seen.output.logits[0]
        logprob = float(logits[token] - logits[seen.output.top_id[0]]) + math.log(seen.output.top_prob[0])
        depth = int(self.depths(sequence, segment, np.array([position - 1]))[0])
        sequence.decided = Token(token, depth, confidence, logprob)

    def depths(self, sequence: Sequence, segment: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Layers that positions have used up to the end of a segment: those they went around do not count. Shape: (N) -> (N)."""
        layout = self.stack.layout[: segment + 1]
        depths = np.full(len(positions), sum(shape.num_layers for shape in layout))
        for number, shape in enumerate(layout):
            if shape.routed:
                depths -= shape.num_layers * ~sequence.inside[number, positions]
        return depths

    def emit(self, sequence: Sequence, token: Token) -> Token:
        """Append the token; see whether the sequence ends with it."""
        sequence.tokens.append(token.id)
        sequence.produced.append(token)
        sequence.level, sequence.decided = 0, None
        if token.id in sequence.stop_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_length:
            sequence.finish_reason = "length"
        return token
