"""The engine: schedule → choose → run → commit, one graph pass a step, over the rows of a batch.

    engine = Engine(stack, num_slots=8)
    sequence = engine.start([5, 17, 3], max_new_tokens=50, policy=make_policy("max-prob", 0.7, stack.exit_layers))
    while engine.busy:
        for sequence in engine.step():       # those that got tokens in this pass, or ended
            ...

Every row has its own depth: `schedule` says what a sequence needs next and looks at no other, `choose` only picks which of
these passes run now, together (schedule.py). So a row's tokens are those it would have alone. Knows nothing about text. Only
`run` touches the stack; only `commit` asks the policy and the sampler.
"""

import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ease_runtime.costs import FIRST_LOOK, Costs, Pace
from ease_runtime.errors import RequestError, did_you_mean
from ease_runtime.policies import FULL_DEPTH, ExitOutput, ExitPolicy, HeadOutput
from ease_runtime.sampling import Greedy, Sampler
from ease_runtime.schedule import CHUNK, DEFAULT_CAP, Batch, Work, choose, near, schedule
from ease_runtime.sequence import Leaving, Sequence, Token
from ease_runtime.stack import Span, Stack

CATCH_UPS = ("propagate", "recompute", "verify")
DRAFT_LENGTH = 8  # tokens drafted before full depth is asked

Parts = Many[tuple[Sequence, int, int]]  # tokens [start, stop) of some sequences


@dataclass(frozen=True)
class Question:
    """What an exit is asked about a sequence: its "head", "gate" or "similarity", for positions from `start` to the pass's end."""

    what: str
    start: int


class Engine:
    """Drives sequences over a stack, `num_slots` at a time; the others wait for a slot, first come, first served.

    `cap` bounds the pending tokens at a boundary, `chunk` the tokens of prompts in one pass, `draft_length` the drafts of
    `verify`. Once costs are known (`measure`), `verify` drafts as many tokens as pays, and none where that is slower; with
    `adapt` any request that leaving early makes slower stays at full depth from then on: its tokens then depend on the
    machine. Both say so in the request's notes. Raises RequestError for a number below 1.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        num_slots: int = 1,
        cap: int = DEFAULT_CAP,
        chunk: int = CHUNK,
        draft_length: int = DRAFT_LENGTH,
        adapt: bool = False,
    ) -> None:
        for name, value in {"num_slots": num_slots, "cap": cap, "chunk": chunk, "draft_length": draft_length}.items():
            if value < 1:
                raise RequestError(f"{name} {value} is below 1")
        self.stack, self.cap, self.chunk, self.draft_length = stack, cap, chunk, draft_length
        self.cache = stack.open_cache(num_slots)
        self.slots: list[Sequence | None] = [None] * num_slots
        self.waiting: list[Sequence] = []
        self.prefill_turn, self.adapt = True, adapt
        self.num_rows = 0  # of the last pass
        self.costs: Costs | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """Those that have a slot: their pending states live in the pool."""
        return [sequence for sequence in self.slots if sequence is not None]

    @property
    def running(self) -> list[Sequence]:
        """Those that have a slot and work to do."""
        return [sequence for sequence in self.slots if sequence is not None and sequence.finish_reason is None]

    @property
    def busy(self) -> bool:
        """Whether some sequence has not finished."""
        return bool(self.waiting or self.running)

    def start(
        self,
        prompt: Many[int],
        *,
        max_new_tokens: int,
        policy: ExitPolicy | None = None,
        catch_up: str = "recompute",
        sampler: Sampler | None = None,
        stop_ids: frozenset[int] = frozenset(),
        num_logprobs: int = 0,
        keep: bool = False,
        after: Sequence | None = None,
    ) -> Sequence:
        """A new sequence, in the queue for a slot.

        With `keep` its slot stays its own when it has finished, until it is released or another sequence comes `after` it,
        which takes the slot over and runs only what its prompt does not share with it.

        Raises RequestError when the prompt is empty, too long, or has ids outside the vocabulary, or when this bundle cannot
        run the policy or the catch-up.
        """
        limit, policy = self.stack.max_positions, policy or FULL_DEPTH
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) >= limit:
            raise RequestError(f"the prompt has {len(prompt)} tokens; this model's context of {limit} leaves no room for an answer")
        if not all(0 <= token < self.stack.vocab_size for token in prompt):
            raise RequestError(f"the prompt has token ids outside the vocabulary of {self.stack.vocab_size}")
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens {max_new_tokens} is below 1")
        self.check(policy, catch_up)
        sequence = self._new(prompt, policy, catch_up)
        if catch_up == "verify" and not self.stack.exact:
            sequence.notes.append("verify holds up to rounding here: passes of several tokens differ from single ones in their last bits")
        if self.costs and policy.thresholds and (self.adapt or catch_up == "verify"):
            sequence.pace = Pace(self.costs, policy, catch_up)
        sequence.max_length = min(limit, len(prompt) + max_new_tokens)
        sequence.sampler, sequence.stop_ids, sequence.num_logprobs, sequence.keep = sampler or Greedy(), stop_ids, num_logprobs, keep
        if after is not None and after.slot is not None:
            self._take_over(sequence, after)
        else:
            self.waiting.append(sequence)
        return sequence

    def measure(self) -> None:
        """Measure what passes cost, once, when nothing is running: the passes that are timed run over the pool."""
        if self.costs is None and not self.sequences:
            self.costs = Costs(self.stack)

    def check(self, policy: ExitPolicy, catch_up: str) -> None:
        """Raises RequestError for a catch-up that is unknown, or a setting that this bundle cannot run."""
        if catch_up not in CATCH_UPS:
            raise RequestError(f"unknown catch-up '{catch_up}'; {did_you_mean(catch_up, CATCH_UPS)}")
        if not policy.thresholds:
            return
        policy.thresholds.for_exits(len(self.stack.exit_layers) - 1)
        routed = any(segment.routed for segment in self.stack.layout)
        if routed and catch_up == "propagate":
            raise RequestError("catch-up 'propagate' has no K/V for routed layers; use recompute")
        if routed and policy.asks == "similarity":
            raise RequestError("policy 'similarity' compares the states around a segment, which routed layers cut; use another policy")
        if policy.asks == "gate" and not self.stack.has_gates:
            raise RequestError("policy 'gate' needs a gate at every early exit; train them: ease-train gates CHECKPOINT --out CHECKPOINT2")

    def _new(self, tokens: Many[int], policy: ExitPolicy, catch_up: str) -> Sequence:
        stack = self.stack
        early = len(stack.exit_layers) - 1
        return Sequence(
            tokens=list(tokens),
            num_prompt=len(tokens),
            max_length=stack.max_positions,
            policy=policy,
            catch_up=catch_up,
            sampler=Greedy(),
            stop_ids=frozenset(),
            num_logprobs=0,
            done=[0] * len(stack.layout),
            rows=np.zeros(stack.max_positions, np.int64),
            inside=np.zeros((len(stack.layout), stack.max_positions), np.bool_),
            asked=frozenset(k for k in range(early) if policy.thresholds.at(k) is not None),
            block_done=[0] * early,
            policy_state=policy.begin(),
            draft_length=self.draft_length if policy.thresholds else 0,
        )

    def open(self, tokens: Many[int], policy: ExitPolicy | None = None, catch_up: str = "recompute") -> Sequence:
        """A sequence in a slot whose tokens have not run yet, unchecked: for whoever runs the segments with `advance`."""
        sequence = self._new(tokens, policy or FULL_DEPTH, catch_up)
        assert None in self.slots, "every slot is taken"
        self._seat(sequence, self.slots.index(None))
        return sequence

    def _seat(self, sequence: Sequence, slot: int) -> None:
        self.slots[slot], sequence.slot = sequence, slot

    def _take_over(self, sequence: Sequence, previous: Sequence) -> None:
        """Give a finished sequence's slot to another, with the K/V that both share."""
        assert previous.slot is not None, "a sequence without a slot has none to give"
        assert previous.finish_reason is not None, "only a finished sequence gives its slot away"
        pairs = zip(previous.tokens, sequence.tokens, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(previous.tokens), len(sequence.tokens)))
        blocks = [previous.block_done[k] for k in sequence.asked if self.stack.blocks[k]]
        shared = min(common, previous.done[-1], len(sequence.tokens) - 1, *blocks)
        sequence.done = [shared] * len(sequence.done)
        sequence.block_done = [min(done, shared) for done in previous.block_done]
        sequence.inside[:, :shared] = previous.inside[:, :shared]
        self._seat(sequence, previous.slot)
        previous.slot = None

    def release(self, sequence: Sequence) -> None:
        """Give up a sequence, wherever it is: its slot, or its place in the queue."""
        self.waiting = [other for other in self.waiting if other is not sequence]
        if sequence.slot is not None:
            self.cache.free(sequence.slot)
            self.slots[sequence.slot], sequence.slot = None, None

    def generate(self, sequence: Sequence) -> Iterator[Token]:
        """Step until a sequence ends, yielding its tokens. Whoever stops reading early ends it."""
        given = 0
        try:
            while True:
                yield from sequence.produced[given:]
                given = len(sequence.produced)
                if sequence.finish_reason is not None:
                    return
                while len(sequence.produced) == given and sequence.finish_reason is None:
                    self.step()
        finally:
            if sequence.finish_reason is None or not sequence.keep:
                self.release(sequence)

    def step(self) -> list[Sequence]:
        """One pass; the sequences that got tokens in it, or ended."""
        while self.waiting and None in self.slots:
            self._seat(self.waiting.pop(0), self.slots.index(None))
        running = self.running
        if not running and self.waiting:
            raise RequestError("every slot is kept by a sequence that has ended; release one, or give the model more slots")
        if not running:
            return []
        works = [(sequence, schedule(sequence, self.cap, self.chunk)) for sequence in running]
        batch = near(choose(works, self.prefill_turn, self.chunk), self.costs)
        self.prefill_turn, self.num_rows = not batch[0][0].prefilling, len(batch)
        for sequence in running:
            sequence.waited += 1
        for sequence, _ in batch:
            sequence.waited = 0
        changed = [s for (s, work), seen in zip(batch, self.run(batch), strict=True) if self.commit(s, work, seen)]
        for sequence in changed:
            if sequence.finish_reason is not None and not (sequence.keep and sequence.error is None):
                self.release(sequence)
        if any(sequence.error for sequence in changed):
            self.cache.scrub()
        return changed

    def run(self, batch: Batch) -> list[ExitOutput | None]:
        """Run a pass over some rows, and ask the exit behind it what it must say of each."""
        kind, segment = batch[0][1].kind, batch[0][1].segment
        parts = [(sequence, work.start, work.stop) for sequence, work in batch]
        if kind == "kv":
            self.propagate(segment, parts)
        elif kind == "segment":
            self.advance(segment, parts)
        exit_index = self.stack.layout[segment].exit_index
        if kind == "kv" or exit_index is None:
            return [None] * len(batch)
        return self.ask(batch, exit_index)

    def propagate(self, segment: int, parts: Parts) -> None:
        """Write K/V of tokens [start, stop) of some sequences into a segment, from the states that they left with."""
        with_block = self.with_block(segment, parts)
        out_row = self.stack.reserve_rows(_num_tokens(with_block), self.live_rows()) if with_block else 0
        rows = np.concatenate([sequence.rows[start:stop] for sequence, start, stop in parts])
        self.stack.run_kv(segment, self.cache, [span_of(*part) for part in parts], rows)
        self.run_block(segment, with_block, out_row)

    def live_rows(self) -> list[NDArray[np.int64]]:
        """The pool rows that are still needed."""
        leaving = [sequence.leaving.rows for sequence in self.sequences if sequence.leaving is not None]
        return [sequence.live_rows() for sequence in self.sequences] + leaving

    def with_block(self, segment: int, parts: Parts) -> Parts:
        """Those of some sequences that the exit behind a segment may be asked about, where that has a layer of its own."""
        exit_index = self.stack.layout[segment].exit_index
        if exit_index is None or not self.stack.blocks[exit_index]:
            return []
        return [part for part in parts if exit_index in part[0].asked]

    def run_block(self, segment: int, parts: Parts, out_row: int) -> None:
        """Run tokens that have come out of a segment through the layer of the exit behind it."""
        exit_index = self.stack.layout[segment].exit_index
        if not parts or exit_index is None:
            return
        rows = np.concatenate([sequence.rows[start:stop] for sequence, start, stop in parts])
        self.stack.run_block(exit_index, self.cache, [span_of(*part) for part in parts], rows, out_row)
        for sequence, start, stop in parts:
            assert start <= sequence.block_done[exit_index], "an exit's own layer runs over every token"
            sequence.block_done[exit_index] = stop
            sequence.block_rows = np.arange(out_row, out_row + stop - start)
            out_row += stop - start

    def advance(self, segment: int, parts: Parts, active: NDArray[np.bool_] | None = None) -> None:
        """Run tokens [start, stop) of some sequences through a segment, or around it where it is routed. Shape: active (N)."""
        stack = self.stack
        if stack.layout[segment].routed:
            self._advance_routed(segment, parts)
            return
        num_tokens, with_block = _num_tokens(parts), self.with_block(segment, parts)
        num_rows = num_tokens if segment else 2 * num_tokens  # the first segment also gives what it was given, embedded
        out_row = stack.reserve_rows(num_rows + _num_tokens(with_block), self.live_rows())
        if segment:
            inputs = np.concatenate([sequence.rows[start:stop] for sequence, start, stop in parts])
        else:
            inputs = np.concatenate([np.array(sequence.tokens[start:stop], np.int64) for sequence, start, stop in parts])
        stack.run_segment(segment, self.cache, [span_of(*part) for part in parts], inputs, out_row, active)
        first = 0
        for sequence, start, stop in parts:
            last = first + stop - start
            sequence.rows[start:stop] = np.arange(out_row + first, out_row + last)
            sequence.entered = inputs[first:last] if segment else sequence.rows[start:stop] + num_tokens
            first = last
        self.run_block(segment, with_block, out_row + num_rows)

    def _advance_routed(self, segment: int, parts: Parts) -> None:
        stack = self.stack
        inside = stack.run_route(segment, np.concatenate([sequence.rows[start:stop] for sequence, start, stop in parts]))
        moving, spans, first = [], [], 0
        for sequence, start, stop in parts:
            sequence.inside[segment, start:stop] = inside[first : first + stop - start]
            positions = start + np.flatnonzero(sequence.inside[segment, start:stop])
            first += stop - start
            if len(positions):
                written = int(np.count_nonzero(sequence.inside[segment, :start]))
                spans.append(span_of(sequence, written, written + len(positions)))
                moving.append((sequence, positions))
        if not moving:
            return
        out_row = stack.reserve_rows(sum(len(positions) for _, positions in moving), self.live_rows())
        rows = np.concatenate([sequence.rows[positions] for sequence, positions in moving])
        stack.run_routed(segment, self.cache, spans, np.concatenate([positions for _, positions in moving]), rows, out_row)
        for sequence, positions in moving:
            sequence.rows[positions] = np.arange(out_row, out_row + len(positions))
            out_row += len(positions)

    def ask(self, batch: Batch, exit_index: int) -> list[ExitOutput | None]:
        """Ask an exit about every row that it must say something of, in one call for each thing that it can say."""
        stack, early = self.stack, exit_index < len(self.stack.exit_layers) - 1
        questions = [self.question(sequence, work, exit_index) for sequence, work in batch]
        seen: list[ExitOutput | None] = [None] * len(batch)
        for what in sorted({question.what for question in questions if question}):
            asking = [i for i, question in enumerate(questions) if question and question.what == what]
            parts = [(batch[i][0], questions[i].start, batch[i][1].stop) for i in asking]  # type: ignore[union-attr]
            if what == "similarity":
                rows = np.concatenate([sequence.rows[start:stop] for sequence, start, stop in parts])
            else:
                rows = np.concatenate([self.exit_rows(*part, exit_index) for part in parts])
            if what == "head":
                output, first = stack.run_exit(exit_index, rows), 0
                for i, (_, start, stop) in zip(asking, parts, strict=True):
                    said = output.tokens(first, first + stop - start)
                    seen[i] = ExitOutput(exit_index, np.arange(start, stop), said, early=early)
                    first += stop - start
                continue
            if what == "gate":
                values = stack.run_gate(exit_index, rows)
            else:
                before = [sequence.entered[-1:] for sequence, _, _ in parts if sequence.entered is not None]
                values = stack.run_similarity(rows, np.concatenate(before))
            for place, i in enumerate(asking):
                newest = np.array([batch[i][1].stop - 1])
                seen[i] = ExitOutput(exit_index, newest, value=values[place : place + 1])
        return seen

    def exit_rows(self, sequence: Sequence, start: int, stop: int, exit_index: int) -> NDArray[np.int64]:
        """The pool rows that an exit reads of the last tokens of a pass. Shape: (stop - start)."""
        if not self.stack.blocks[exit_index]:
            return sequence.rows[start:stop]
        if sequence.leaving is not None:
            return sequence.leaving.rows
        assert sequence.block_rows is not None, "the exit's own layer has just run"
        return sequence.block_rows[start - stop :]

    def question(self, sequence: Sequence, work: Work, exit_index: int) -> Question | None:
        """What the exit behind a pass has to say of a sequence, if anything."""
        newest, early = len(sequence.tokens) - 1, exit_index < len(self.stack.exit_layers) - 1
        if work.stop <= newest or sequence.decided:
            return None
        if not early and sequence.catch_up == "verify":
            return Question("head", sequence.num_final - 1)
        if early and not (exit_index in sequence.asked and sequence.may_draft):
            return None
        return Question(sequence.policy.asks if early and work.kind == "segment" else "head", newest)

    def commit(self, sequence: Sequence, work: Work, seen: ExitOutput | None) -> bool:
        """Advance the counters; let the policy decide and the sampler choose. Whether tokens came out, or the sequence ended."""
        if work.kind != "head":
            sequence.done[work.segment] = work.stop
        newest = work.stop == len(sequence.tokens) and work.start >= sequence.num_prompt
        if sequence.pace and work.kind == "segment" and newest and sequence.may_draft:
            sequence.pace.entered[work.segment] += 1
        if work.kind == "kv" or work.stop < len(sequence.tokens):
            return False
        if seen is not None and seen.head is not None and not np.isfinite(seen.head.top_prob).all():
            return self.fail(sequence, f"the model's logits are no finite numbers at position {work.stop - 1}")
        if seen is not None:
            self.decide(sequence, work.segment, seen)
        if sequence.leaving is not None:
            return False
        last = work.segment == len(sequence.done) - 1
        if sequence.catch_up == "verify" and last:
            assert seen is not None, "full depth judges the drafts"
            return self.judge(sequence, seen)
        if sequence.decided is None or (sequence.prefilling and not last):
            sequence.level = work.segment + 1
            return False
        return self.emit(sequence, sequence.decided)

    def decide(self, sequence: Sequence, segment: int, seen: ExitOutput) -> None:
        """Let the newest token leave at the exit behind a segment, or not: sets `decided`, or `leaving` when a gate opens."""
        policy, state = sequence.policy, sequence.policy_state
        if seen.head is None:
            confidence = policy.confidence(seen, state)
            if policy.leaves(seen.exit_index, confidence, sequence.progress, state)[0]:
                rows = self.exit_rows(sequence, len(sequence.tokens) - 1, len(sequence.tokens), seen.exit_index)
                sequence.leaving = Leaving(segment, float(confidence[0]), rows.copy() if self.stack.blocks[seen.exit_index] else rows[:0])
            return
        if not seen.early and sequence.catch_up == "verify":
            return  # `judge` looks at all positions
        if sequence.leaving is not None:
            sure, sequence.leaving = sequence.leaving.confidence, None
        else:
            confidence = policy.confidence(seen, state)
            if seen.early and not policy.leaves(seen.exit_index, confidence, sequence.progress, state)[0]:
                return
            sure = float(confidence[0])
        sequence.decided = self.token(sequence, segment, seen.head, len(sequence.tokens), sure)

    def token(self, sequence: Sequence, segment: int, output: HeadOutput, position: int, confidence: float) -> Token:
        """The token that the sampler takes for `position` from a head's output for one token, after a segment."""
        logits, top_id = output.logits[0], int(output.top_id[0])
        chosen = sequence.sampler.pick(logits, top_id, sequence.tokens, position)
        base = math.log(output.top_prob[0]) - float(logits[top_id])
        depth = int(self.depths(sequence, segment, np.array([position - 1]))[0])
        best = _largest(logits, sequence.num_logprobs)
        return Token(chosen, depth, confidence, float(logits[chosen]) + base, tuple((i, float(logits[i]) + base) for i in best))

    def depths(self, sequence: Sequence, segment: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Layers that positions have used up to the end of a segment: those they went around do not count. Shape: (N) -> (N)."""
        layout = self.stack.layout[: segment + 1]
        depths = np.full(len(positions), sum(shape.num_layers for shape in layout))
        for number, shape in enumerate(layout):
            if shape.routed:
                depths -= shape.num_layers * ~sequence.inside[number, positions]
        return depths

    def emit(self, sequence: Sequence, token: Token) -> bool:
        """Append a token: as a draft under verify, else for good."""
        sequence.tokens.append(token.id)
        if sequence.catch_up == "verify":
            sequence.drafts.append(token)
            sequence.set_out()
            return False
        self.keep_token(sequence, token)
        return True

    def judge(self, sequence: Sequence, seen: ExitOutput) -> bool:
        """Let full depth say what follows each position: accept the drafts that say the same, and crop at the first that does not."""
        start, output = int(seen.positions[0]), seen.head
        assert output is not None, "full depth has a head"
        drafts, last = sequence.drafts, len(sequence.done) - 1
        before = sequence.drafted, sequence.accepted
        for i in range(len(output.top_id)):
            position = start + i + 1
            said = self.token(sequence, last, output.tokens(i, i + 1), position, float(output.top_prob[i]))
            drafted = i < len(drafts)
            agrees = drafted and drafts[i].id == said.id
            sequence.drafted += drafted
            sequence.accepted += agrees
            if not agrees:
                sequence.crop(position)
                sequence.tokens.append(said.id)
            else:
                said = Token(said.id, drafts[i].depth, drafts[i].confidence, said.logprob, said.top_logprobs, drafted=True)
            self.keep_token(sequence, said, position + 1)
            if not agrees or sequence.finish_reason is not None:
                break
        if sequence.pace and sequence.draft_length and sequence.finish_reason is None:
            sequence.pace.judged(sequence.drafted - before[0], sequence.accepted - before[1])
            self.adapt_drafting(sequence, sequence.pace)
        return True

    def adapt_drafting(self, sequence: Sequence, pace: Pace) -> None:
        """Draft as many tokens as pays; for good none when that is none."""
        if pace.entered[0] < FIRST_LOOK:
            return
        sequence.draft_length = pace.draft_length(len(self.running))
        if sequence.draft_length == 0:
            sequence.asked = frozenset()
            share = f"{sequence.accepted} of {sequence.drafted} drafts accepted"
            sequence.notes.append(f"verify turned itself off after {len(sequence.produced)} tokens: it does not pay here ({share})")

    def adapt_leaving(self, sequence: Sequence, pace: Pace) -> None:
        """Stay at full depth for good once leaving early is seen to be slower."""
        if pace.pays(len(self.running)):
            return
        sequence.policy, sequence.pace, sequence.asked = FULL_DEPTH, None, frozenset()
        sequence.notes.append(
            f"leaving early does not pay here: full depth after {len(sequence.produced)} tokens (catch-up {sequence.catch_up})"
        )

    def keep_token(self, sequence: Sequence, token: Token, length: int | None = None) -> None:
        """A token stands, as the last of `length`: see whether the sequence ends with it."""
        length = len(sequence.tokens) if length is None else length
        sequence.produced.append(token)
        sequence.set_out()
        sequence.policy.note_depth(token.depth, sequence.policy_state)
        if token.id in sequence.stop_ids:
            sequence.finish_reason = "stop"
        elif length >= sequence.max_length:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            del sequence.tokens[length:]
            sequence.drafts = []
        elif sequence.pace and sequence.catch_up != "verify" and len(sequence.produced) % FIRST_LOOK == 0:
            self.adapt_leaving(sequence, sequence.pace)

    def fail(self, sequence: Sequence, message: str) -> bool:
        """End a sequence with an error; the others go on."""
        sequence.finish_reason, sequence.error = "error", message
        return True


def _num_tokens(parts: Parts) -> int:
    return sum(stop - start for _, start, stop in parts)


def span_of(sequence: Sequence, start: int, stop: int) -> Span:
    """Entries [start, stop) of a sequence's slot."""
    assert sequence.slot is not None, "a sequence without a slot cannot run"
    return Span(sequence.slot, start, stop)


def _largest(logits: NDArray[np.float32], count: int) -> Iterable[int]:
    """The ids of the `count` largest logits, the largest first."""
    if count == 0:
        return ()
    best = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
    return (int(i) for i in best[np.argsort(-logits[best], kind="stable")])
