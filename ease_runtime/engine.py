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

from ease_runtime.errors import RequestError, did_you_mean
from ease_runtime.policy import ExitPolicy, HeadOutput
from ease_runtime.sampling import Greedy, Sampler
from ease_runtime.sequence import Sequence, Token
from ease_runtime.stack import Stack

CATCH_UPS = ("propagate", "recompute")
DEFAULT_CAP = 64  # pending tokens at a boundary before they are settled without a token that needs it


@dataclass(frozen=True)
class Work:
    """One pass: tokens [start, stop) of a sequence through a segment, or their propagated K/V into it."""

    kind: str  # "segment" or "kv"
    segment: int  # from 0
    start: int
    stop: int


def schedule(sequence: Sequence, cap: int = DEFAULT_CAP) -> Work:
    """What a sequence needs next.

    A token that enters a segment takes along all that are pending before it: in the same pass (`recompute`), or as K/V of
    their frozen states just before (`propagate`, CALM). Between two tokens a queue that has reached `cap` is settled, which
    moves work and changes no token and no depth. A prompt runs every segment whatever the catch-up.
    """
    done, newest = sequence.done, len(sequence.tokens) - 1
    kind = "kv" if sequence.catch_up == "propagate" else "segment"
    level = sequence.level
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
        limit = self.stack.max_positions
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) >= limit:
            raise RequestError(f"the prompt has {len(prompt)} tokens; this model's context of {limit} leaves no room for an answer")
        if not all(0 <= token < self.stack.vocab_size for token in prompt):
            raise RequestError(f"the prompt has token ids outside the vocabulary of {self.stack.vocab_size}")
        if catch_up not in CATCH_UPS:
            raise RequestError(f"unknown catch-up '{catch_up}'; {did_you_mean(catch_up, CATCH_UPS)}")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens {max_new_tokens} is below 1")
        sequence = Sequence(
            tokens=list(prompt),
            num_prompt=len(prompt),
            max_length=min(limit, len(prompt) + max_new_tokens),
            policy=policy or ExitPolicy(),
            catch_up=catch_up,
            sampler=sampler or Greedy(),
            stop_ids=stop_ids,
            cache=self.stack.open_cache(),
            done=[0] * len(self.stack.exit_layers),
            rows=np.zeros(limit, np.int64),
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

    def run(self, sequence: Sequence, work: Work) -> HeadOutput | None:
        """Run a pass, and the exit's head when the newest token is in it and still undecided at an exit that asks."""
        stack, rows = self.stack, sequence.rows
        if work.kind == "kv":
            stack.run_kv(work.segment, sequence.cache, work.start, rows[work.start : work.stop])
            return None
        out_row = stack.reserve_rows(work.stop - work.start, [s.live_rows() for s in self.sequences])
        inputs = rows[work.start : work.stop] if work.segment else np.array(sequence.tokens[work.start : work.stop], np.int64)
        stack.run_segment(work.segment, sequence.cache, work.start, inputs, out_row)
        rows[work.start : work.stop] = np.arange(out_row, out_row + work.stop - work.start)
        last = work.segment == len(sequence.done) - 1
        if work.stop < len(sequence.tokens) or sequence.decided or not (last or sequence.policy.tests(work.segment)):
            return None
        return stack.run_exit(work.segment, rows[work.stop - 1 : work.stop])

    def commit(self, sequence: Sequence, work: Work, output: HeadOutput | None) -> Token | None:
        """Advance the counters; let the policy decide and the sampler choose; emit the token once its passes are done."""
        sequence.done[work.segment] = work.stop
        if work.kind == "kv" or work.stop < len(sequence.tokens):
            return None
        last = len(sequence.done) - 1
        if output is not None:
            sequence.decided = self.decide(sequence, work.segment, output)
        if sequence.decided is None or (sequence.prefilling and work.segment < last):
            sequence.level = work.segment + 1
            return None
        return self.emit(sequence, sequence.decided)

    def decide(self, sequence: Sequence, exit_index: int, output: HeadOutput) -> Token | None:
        """The newest token's prediction, if it leaves at this exit; None when it goes deeper."""
        confidence = sequence.policy.confidence(output)
        if exit_index < len(sequence.done) - 1 and not sequence.policy.leaves(exit_index, confidence)[0]:
            return None
        token = sequence.sampler.pick(output, len(sequence.tokens))
        logits = output.logits[0]
        logprob = float(logits[token] - logits[output.top_id[0]]) + math.log(output.top_prob[0])
        return Token(token, self.stack.exit_layers[exit_index], float(confidence[0]), logprob)

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
