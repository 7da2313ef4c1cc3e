"""What a pass means: the policy decides, the sampler chooses, drafts are judged, a sequence ends.

Runs no graph.

`commit` takes what an exit said of a sequence after a pass (`Runner.run`), and says whether tokens came out
of it.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError
from ease_runtime.engine.costs import FIRST_LOOK, RequestCost
from ease_runtime.engine.layout import SegmentShape
from ease_runtime.engine.sampling import Greedy
from ease_runtime.engine.schedule import Work
from ease_runtime.engine.sequence import EXIT, Leaving, Token, TokenSequence
from ease_runtime.policies import FULL_DEPTH, ExitOutput, HeadOutput

Layout = Sequence[SegmentShape]
NO_NUMBERS = "the model's logits are no finite numbers at position {}"


def commit(
    sequence: TokenSequence, work: Work, said: ExitOutput | None, layout: Layout, *, num_running: int
) -> bool:
    """Let the policy decide and the sampler choose. Whether tokens came out, or the sequence ended, with an
    error where its sampler raised RequestError.
    """
    try:
        return _commit(sequence, work, said, layout, num_running)
    except RequestError as error:
        return fail(sequence, str(error))


def _commit(
    sequence: TokenSequence, work: Work, said: ExitOutput | None, layout: Layout, num_running: int
) -> bool:
    decision = sequence.decision
    newest = work.stop == len(sequence.tokens) and work.start >= sequence.num_prompt
    if decision.request_cost and work.kind == "segment" and newest and sequence.may_draft:
        decision.request_cost.entered[work.segment] += 1
    last = work.segment == len(layout) - 1
    if said is not None and said.head is not None:
        if not np.isfinite(said.head.top_prob).all():
            return fail(sequence, NO_NUMBERS.format(work.stop - 1))
        top_ids = said.head.top_id
        if top_ids.min(initial=0) < 0 or top_ids.max(initial=0) >= said.head.logits.shape[-1]:
            return fail(sequence, "the model's head names a token that is not in its vocabulary")
    if sequence.request.score_prompt and last and work.stop <= sequence.num_prompt:
        assert said is not None, "full depth scores the prompt"
        said = _score_prompt(sequence, said, layout)
    if work.kind == "kv" or work.stop < len(sequence.tokens):
        return False
    if last and sequence.num_prompt >= sequence.request.max_length:
        sequence.finish_reason = "length"
        return True
    if said is not None:
        _decide(sequence, work.segment, said, layout)
    if decision.leaving is not None:
        return False
    if sequence.request.catch_up == "verify" and last:
        assert said is not None, "full depth judges the drafts"
        return _judge(sequence, said, layout, num_running)
    if decision.token is None or (sequence.prefilling and not last):
        decision.level = work.segment + 1
        return False
    return _emit(sequence, decision.token, num_running)


def fail(sequence: TokenSequence, message: str) -> bool:
    """End a sequence with an error; the others go on."""
    sequence.finish_reason = "error"
    sequence.error = message
    return True


def depths(
    sequence: TokenSequence, segment: int, positions: NDArray[np.int64], layout: Layout
) -> NDArray[np.int64]:
    """Layers that positions have used up to the end of a segment: those they went around do not count.

    Shape: (N) -> (N).
    """
    found = np.full(len(positions), sum(shape.num_layers for shape in layout[: segment + 1]))
    for number, shape in enumerate(layout[: segment + 1]):
        if shape.routed:
            found -= shape.num_layers * ~sequence.counters.inside[number, positions]
    return found


def _decide(sequence: TokenSequence, segment: int, said: ExitOutput, layout: Layout) -> None:
    """Let the newest token leave at the exit behind a segment, or not: sets its token, or `leaving` when a
    gate opens.
    """
    decision = sequence.decision
    policy = decision.policy
    state = decision.state
    if said.head is None:
        confidence = policy.confidence(said, state)
        if policy.leaves(said.exit_index, confidence, sequence.progress, state)[0]:
            decision.leaving = Leaving(segment, float(confidence[0]))
        return
    if not said.early and sequence.request.catch_up == "verify":
        return  # `_judge` looks at all positions
    if decision.leaving is not None:
        sure = decision.leaving.confidence
        decision.leaving = None
    else:
        confidence = policy.confidence(said, state)
        if said.early and not policy.leaves(said.exit_index, confidence, sequence.progress, state)[0]:
            return
        sure = float(confidence[0])
    decision.token = _token(sequence, segment, said.head, len(sequence.tokens), sure, layout)


def _token(
    sequence: TokenSequence,
    segment: int,
    output: HeadOutput,
    position: int,
    confidence: float,
    layout: Layout,
) -> Token:
    """The token that the sampler takes for `position` from a head's output for one token, after a segment."""
    top_id = int(output.top_id[0])
    sampler = sequence.request.sampler
    if type(sampler) is Greedy:  # without the logits, which may lie on a device
        return _scored(sequence, segment, output, position, top_id, confidence, layout)
    before = sequence.tokens if len(sequence.tokens) == position else sequence.tokens[:position]
    chosen = sampler.pick(output.logits[0], top_id, before, position)
    if math.isnan(output.logits[0, chosen]):
        raise RequestError(NO_NUMBERS.format(position - 1))
    return _scored(sequence, segment, output, position, chosen, confidence, layout)


def _score_prompt(sequence: TokenSequence, said: ExitOutput, layout: Layout) -> ExitOutput | None:
    """Note how likely full depth makes the tokens of the prompt that follow some of its positions.

    Returns what is left to say of the newest position; None where an exit has said it.
    """
    output = said.head
    assert output is not None, "full depth has a head"
    for i, before in enumerate(said.positions.tolist()):
        if before + 1 < sequence.num_prompt:
            given = sequence.tokens[before + 1]
            sure = float(output.top_prob[i])
            token = _scored(
                sequence, len(layout) - 1, output.tokens(i, i + 1), before + 1, given, sure, layout
            )
            sequence.prompt_scores.append(token)
    if sequence.decision.token is not None:
        return None
    count = len(said.positions)
    return ExitOutput(
        said.exit_index, said.positions[-1:], head=output.tokens(count - 1, count), early=said.early
    )


def _scored(
    sequence: TokenSequence,
    segment: int,
    output: HeadOutput,
    position: int,
    chosen: int,
    confidence: float,
    layout: Layout,
) -> Token:
    """A token at `position`, with its depth and log-probabilities, from a head's output for the token before
    it. The logits are read for other tokens than the most probable one.
    """
    top_id = int(output.top_id[0])
    top_logprob = math.log(output.top_prob[0])
    depth = int(depths(sequence, segment, np.array([position - 1]), layout)[0])
    count = sequence.request.num_logprobs
    if chosen == top_id and count == 0:
        return Token(chosen, depth, confidence, top_logprob)
    logits = output.logits[0]
    base = top_logprob - float(logits[top_id])

    def logprob(token: int) -> float:
        return top_logprob if token == top_id else float(logits[token]) + base

    best = _largest(logits, count)
    return Token(chosen, depth, confidence, logprob(chosen), tuple((i, logprob(i)) for i in best))


def _emit(sequence: TokenSequence, token: Token, num_running: int) -> bool:
    """Append a token: as a draft under verify, else for good."""
    sequence.tokens.append(token.id)
    if sequence.request.catch_up == "verify":
        sequence.drafts.tokens.append(replace(token, drafter=EXIT))
        sequence.decision.set_out()
        return False
    _keep(sequence, token, len(sequence.tokens), num_running)
    return True


def _judge(sequence: TokenSequence, said: ExitOutput, layout: Layout, num_running: int) -> bool:
    """Let full depth say what follows each position: accept the drafts that say the same, and crop at the
    first that does not.
    """
    output = said.head
    assert output is not None, "full depth has a head"
    drafts = sequence.drafts
    last = len(layout) - 1
    tokens = drafts.tokens
    from_text = [0, 0]  # judged, accepted
    by_segment: dict[int, list[int]] = {}  # the same of exits
    for i, before in enumerate(said.positions.tolist()):
        token = _token(sequence, last, output.tokens(i, i + 1), before + 1, float(output.top_prob[i]), layout)
        drafted = i < len(tokens)
        agrees = drafted and tokens[i].id == token.id
        if drafted:
            seen = from_text
            if tokens[i].drafter == EXIT:
                seen = by_segment.setdefault(_segment_of(tokens[i].depth, layout), [0, 0])
            seen[0] += 1
            seen[1] += agrees
            count = drafts.count(tokens[i].drafter)
            count.judged += 1
            count.accepted += agrees
        if not agrees:
            sequence.crop(before + 1)
            sequence.tokens.append(token.id)
        elif tokens[i].drafter == EXIT:
            token = replace(token, depth=tokens[i].depth, confidence=tokens[i].confidence, drafter=EXIT)
        else:
            token = replace(token, drafter=tokens[i].drafter)
        _keep(sequence, token, before + 2, num_running)
        if not agrees or sequence.finish_reason is not None:
            break
    if drafts.lookups:
        drafts.lookups.judged(*from_text)
    request_cost = sequence.decision.request_cost
    if request_cost and drafts.trial and drafts.lookups:
        price = request_cost.trial(num_running)
        if drafts.lookups.may_spend(price, len(sequence.produced)):
            drafts.length, drafts.trial = drafts.trial, 0
    elif request_cost and drafts.length and sequence.finish_reason is None:
        for segment, seen in by_segment.items():
            request_cost.judged(segment, *seen)
        _adapt_drafting(sequence, request_cost, layout, num_running)
    return True


def _segment_of(depth: int, layout: Layout) -> int:
    """The segment behind which a token left that has used so many layers; where it went around some, the
    first that it may have been.
    """
    ends = list(accumulate(shape.num_layers for shape in layout))
    return bisect_left(ends, depth)


def _adapt_drafting(
    sequence: TokenSequence, request_cost: RequestCost, layout: Layout, num_running: int
) -> None:
    """Let those exits draft that are worth it, as many tokens as pays; for good none when that is none."""
    if request_cost.entered[0] < FIRST_LOOK:
        return
    drafts = sequence.drafts
    given_up = request_cost.give_up_exit(num_running)
    if given_up is not None:
        exit_index = layout[given_up].early_exit
        sequence.counters.asked = sequence.counters.asked - {exit_index}
        layer = sum(shape.num_layers for shape in layout[: given_up + 1])
        sequence.notes.append(
            f"the exit at layer {layer} stopped drafting after {len(sequence.produced)} tokens: the others "
            "are faster without it"
        )
    drafts.length = request_cost.draft_length(num_running)
    if drafts.length == 0:
        sequence.counters.asked = frozenset()
        count = drafts.count(EXIT)
        what = "exits stopped drafting" if drafts.lookups else "verify turned itself off"
        share = f"{count.accepted} of {count.judged} drafts accepted"
        sequence.notes.append(f"{what} after {len(sequence.produced)} tokens: it does not pay here ({share})")


def _adapt_leaving(sequence: TokenSequence, request_cost: RequestCost, num_running: int) -> None:
    """Stay at full depth for good once leaving early is seen to be slower."""
    if request_cost.pays(num_running):
        return
    decision = sequence.decision
    catch_up = sequence.request.catch_up
    decision.policy = FULL_DEPTH
    decision.state = None
    decision.request_cost = None
    sequence.counters.asked = frozenset()
    sequence.notes.append(
        f"leaving early does not pay here: full depth after {len(sequence.produced)} tokens (catch-up "
        f"{catch_up})"
    )


def _keep(sequence: TokenSequence, token: Token, length: int, num_running: int) -> None:
    """A token stands, as the last of `length`: see whether the sequence ends with it."""
    sequence.produced.append(token)
    decision = sequence.decision
    request = sequence.request
    decision.set_out()
    if token.drafter in ("", EXIT):  # of a draft from text no exit was asked: a depth budget is not about it
        decision.policy.note_depth(token.depth, decision.state)
    if token.id in request.stop_ids:
        sequence.finish_reason = "stop"
    elif length >= request.max_length:
        sequence.finish_reason = "length"
    if sequence.finish_reason is not None:
        del sequence.tokens[length:]
        sequence.drafts.tokens = []
    elif decision.request_cost and request.catch_up != "verify" and len(sequence.produced) % FIRST_LOOK == 0:
        _adapt_leaving(sequence, decision.request_cost, num_running)


def _largest(logits: NDArray[np.float32], count: int) -> Iterable[int]:
    """The ids of the `count` largest logits, the largest first."""
    if count == 0:
        return ()
    best = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
    return (int(i) for i in best[np.argsort(-logits[best], kind="stable")])
