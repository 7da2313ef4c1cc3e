"""What runs next: `schedule` says what a sequence needs and looks at no other, `choose` which of these passes
run now, together.

Pure functions of counters: nothing here runs a graph or decides where a token leaves.
"""

from dataclasses import dataclass

import numpy as np

from ease_runtime.engine.costs import DEFAULT_CAP, Costs
from ease_runtime.engine.sequence import TokenSequence

CHUNK = 256  # tokens of a prompt in one pass
MAX_WAIT = 8  # passes of others that a row waits at most, when it could run itself


@dataclass(frozen=True)
class Work:
    """One pass: tokens [start, stop) of a sequence through a segment (from 0), or their propagated K/V into
    it.
    """

    kind: str  # "segment", "kv", or "head": the newest token's gate has opened, and the exit's head is asked
    segment: int  # from 0
    start: int
    stop: int


Batch = list[tuple[TokenSequence, Work]]  # of one kind and segment


def schedule(sequence: TokenSequence, cap: int = DEFAULT_CAP, chunk: int = CHUNK) -> Work:
    """What a sequence needs next.

    A token that enters a segment takes along all that are pending before it: in the same pass (`recompute`,
    `verify`), or as K/V of their frozen states just before (`propagate`, CALM). Between two tokens a queue
    that has reached `cap` is settled, which moves work and changes no token and no depth; drafts are settled
    when they are judged. A prompt runs every segment whatever the catch-up, `chunk` tokens after the other.
    """
    done = sequence.counters.done
    newest = len(sequence.tokens) - 1
    decision = sequence.decision
    catch_up = sequence.request.catch_up
    level = decision.level
    if decision.leaving is not None:
        return Work("head", decision.leaving.segment, newest, newest + 1)
    if sequence.prefilling:
        for k in reversed(range(1, len(done))):
            if done[k] < done[k - 1]:
                return Work("segment", k, done[k], done[k - 1])
        return Work("segment", 0, done[0], min(done[0] + chunk, newest + 1))
    kind = "kv" if catch_up == "propagate" else "segment"
    if level == 0:
        assert done[0] <= newest, "a cropped sequence needs its next token before it can go on"
        for k in range(1, len(done)):
            if done[k - 1] - done[k] >= cap and catch_up != "verify":
                return Work(kind, k, done[k], done[k - 1])
        return Work("segment", 0, done[0], newest + 1)
    if kind == "kv" and done[level] < newest:
        return Work("kv", level, done[level], newest)
    return Work("segment", level, done[level], newest + 1)


def question(sequence: TokenSequence, work: Work, exit_index: int, early: bool) -> tuple[str, int] | None:
    """What the exit behind a pass has to say of a sequence, for positions from where to the pass's end; None:
    nothing.
    """
    newest = len(sequence.tokens) - 1
    decision = sequence.decision
    if not early and sequence.request.score_prompt and work.stop <= sequence.num_prompt:
        return "head", work.start
    if work.stop <= newest or decision.token:
        return None
    if not early and sequence.request.catch_up == "verify":
        return "head", sequence.num_final - 1
    if early and not (exit_index in sequence.counters.asked and sequence.may_draft):
        return None
    return decision.policy.asks if early and work.kind == "segment" else "head", newest


def choose(works: Batch, prefill_turn: bool, chunk: int = CHUNK) -> Batch:
    """Which of the rows' next passes run now: all of one kind through one segment.

    Heads go first, they let rows go on. A row that has waited for MAX_WAIT passes of others goes next.
    Prompts and decoding take turns. Else the segment that most rows need, the deeper of two: rows that need
    depth wait for each other while more of the others go on.
    """
    groups: dict[tuple[bool, str, int], Batch] = {}
    for sequence, work in works:
        groups.setdefault((sequence.prefilling, work.kind, work.segment), []).append((sequence, work))
    if len(groups) == 1:
        (only,) = groups
        return _prompts(groups[only], chunk) if only[0] else groups[only]
    for (_, kind, _), group in groups.items():
        if kind == "head":
            return group
    prompts = [group for (prefilling, _, _), group in groups.items() if prefilling]
    decoding = {
        (kind, segment): group for (prefilling, kind, segment), group in groups.items() if not prefilling
    }
    if prompts and (prefill_turn or not decoding):
        return _prompts(max(prompts, key=lambda group: max(s.waited for s, _ in group)), chunk)
    late = max(decoding, key=lambda key: max(s.waited for s, _ in decoding[key]))
    if max(s.waited for s, _ in decoding[late]) >= MAX_WAIT:
        return decoding[late]
    needed: dict[int, int] = {}
    for (_, segment), group in decoding.items():
        needed[segment] = needed.get(segment, 0) + len(group)
    segment = max(needed, key=lambda k: (needed[k], k))
    return decoding.get(("kv", segment)) or decoding["segment", segment]


def _prompts(group: Batch, chunk: int) -> Batch:
    """The prompts that share a pass: the one that has waited longest, and others of about its length, `chunk`
    tokens in all.
    """
    first = max(group, key=lambda pair: pair[0].waited)
    size = first[1].stop - first[1].start
    chosen = [first]
    total = size
    for sequence, work in group:
        count = work.stop - work.start
        if sequence is not first[0] and size <= 2 * count and count <= size and total + count <= chunk:
            chosen.append((sequence, work))
            total += count
    return [pair for pair in group if pair in chosen]  # in the order of their slots


def near(batch: Batch, costs: Costs | None) -> Batch:
    """Rows of a batch without a gap that costs more to step over, slot by slot, than a pass of their own.

    Of the groups between such gaps the one whose row has waited longest; the first among equals.
    """
    kind = batch[0][1].kind
    segment = batch[0][1].segment
    if costs is None or kind != "segment":
        return batch
    length = max(len(sequence.tokens) for sequence, _ in batch)
    slots = [sequence.slot or 0 for sequence, _ in batch]
    groups = list[Batch]()
    first = 0
    for place, gap in enumerate(np.diff(slots).tolist(), 1):
        if costs.over_slots(segment, gap - 1, length) > costs.seconds("segment", segment, 1):
            groups.append(batch[first:place])
            first = place
    return max([*groups, batch[first:]], key=lambda group: max(sequence.waited for sequence, _ in group))
