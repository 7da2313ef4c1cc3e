"""Perplexity under an exit policy and its catch-up: exact, and in parallel over a window.

`recompute` leaves every token's K/V exact, so one full-depth pass that looks at each exit gives every
threshold's figure. `propagate` freezes a token's state where it left, so each threshold needs its own pass,
segment by segment, with the `active` mask. Both equal what the engine computes token by token (tests/eval
holds them to it).

The first token of a window is prefill: its K/V are exact in every mode, and its prediction follows the
policy.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError
from ease_common.progress import Each, silently
from ease_runtime.engine.commit import depths
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.policies import FULL_DEPTH, ExitOutput, ExitPolicy, HeadOutput

LARGEST_EXPONENT = math.log(sys.float_info.max)
HEAD_ROWS = 32  # tokens a head call scores at once (its logits are rows x vocabulary)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a policy made of some target tokens.

    Shapes: all (tokens); logprobs in nats, depths in layers, says: most probable ids.
    """

    logprobs: Floats
    depths: NDArray[np.int64]
    says: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence["Scores"]) -> "Scores":
        """Several texts' scores, one after the other."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("logprobs", "depths", "says")
            )
        )

    def to_lists(self) -> list[list[Any]]:
        """As JSON has them."""
        return [getattr(self, name).tolist() for name in ("logprobs", "depths", "says")]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[Any]]) -> "Scores":
        """From what JSON has."""
        return cls(np.array(lists[0], np.float64), np.array(lists[1], np.int64), np.array(lists[2], np.int64))

    def after(self, first: int) -> "Scores":
        """Those of the tokens from `first` on."""
        return Scores(self.logprobs[first:], self.depths[first:], self.says[first:])

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability a token, or the largest number where that is beyond all
        numbers.
        """
        return math.exp(min(-float(self.logprobs.mean()), LARGEST_EXPONENT))

    @property
    def mean_depth(self) -> float:
        """Mean number of layers a token used."""
        return float(self.depths.mean())


@dataclass(frozen=True)
class Window:
    """Inputs ids[start:stop] with targets ids[start+1:stop+1], of which those before `scored_from` count
    elsewhere.
    """

    start: int
    stop: int
    scored_from: int  # as an offset into the window


def windows(num_ids: int, length: int, stride: int) -> Iterator[Window]:
    """Strided windows over a document of `num_ids` tokens: every target is scored once, with as much context
    as fits.
    """
    scored = 0  # inputs whose target has been scored
    for start in range(0, num_ids - 1, stride):
        stop = min(start + length, num_ids - 1)
        yield Window(start, stop, scored - start)
        scored = stop
        if stop == num_ids - 1:
            return


def score_documents(
    engine: Engine,
    documents: Sequence[Sequence[int]],
    policies: Sequence[ExitPolicy],
    catch_up: str,
    each: Each = silently,
) -> list[Scores]:
    """Score every document under each policy, in windows of the model's context with half a window's stride.

    Raises RequestError when the engine's stack cannot run a policy or the catch-up.
    """
    check_scorable(engine, policies, catch_up)
    length = engine.stack.max_positions
    parts: list[list[Scores]] = [[] for _ in policies]
    for ids in each(f"documents scored, {catch_up}", documents):
        for window in windows(len(ids), length, max(1, length // 2)):
            inputs = ids[window.start : window.stop]
            targets = np.array(ids[window.start + 1 : window.stop + 1], np.int64)
            for part, scores in zip(
                parts, score_window(engine, inputs, targets, policies, catch_up), strict=True
            ):
                part.append(scores.after(window.scored_from))
    return [Scores.join(part) for part in parts]


def check_scorable(engine: Engine, policies: Sequence[ExitPolicy], catch_up: str) -> None:
    """Raises RequestError for a setting that this bundle cannot run, or that says nothing of a given text."""
    for policy in policies:
        engine.check(policy, catch_up)
        if policy.moves:
            raise RequestError(
                "thresholds that move with a generation (decay, depth budget) have no perplexity of a text"
            )


def record_exits(
    engine: Engine, documents: Sequence[Sequence[int]], policy: ExitPolicy
) -> tuple[Floats, list[Scores], Scores]:
    """What every exit would say of every token of some texts (their first window), had all come that far.

    Returns the policy's confidence at each early exit (early exits, tokens), the scores of each early exit,
    and full depth's.
    """
    found: list[list[_Record]] = []
    for ids in documents:
        stop = min(len(ids) - 1, engine.stack.max_positions)
        records = [_Record(policy, stop, number) for number in range(len(engine.stack.exit_layers))]
        _run_segments(engine, ids[:stop], np.array(ids[1 : stop + 1], np.int64), records, freeze=False)
        found.append(records)
    joined = [Scores.join([records[number].scores() for records in found]) for number in range(len(found[0]))]
    confidences = [
        np.concatenate([records[number].confidences for records in found])
        for number in range(len(found[0]) - 1)
    ]
    return np.array(confidences, np.float64), joined[:-1], joined[-1]


def score_window(
    engine: Engine,
    inputs: Sequence[int],
    targets: NDArray[np.int64],
    policies: Sequence[ExitPolicy],
    catch_up: str,
    num_prompt: int = 1,
) -> list[Scores]:
    """Score one window under each policy. Shape: inputs and targets (S) -> one Scores of S tokens each.

    The first `num_prompt` inputs are prefill. Those before its last predict nothing that is asked for: their
    scores are 0.
    """
    if catch_up == "verify":
        policies = [FULL_DEPTH] * len(policies)  # what it says is what full depth says
    groups = [[policy] for policy in policies] if catch_up == "propagate" else [list(policies)]
    scores = []
    for group in groups:
        decisions = [_Decisions(policy, len(inputs), num_prompt) for policy in group]
        _run_segments(
            engine, inputs, targets, decisions, freeze=catch_up == "propagate", num_prompt=num_prompt
        )
        scores += [decision.scores() for decision in decisions]
    return scores


def _run_segments(
    engine: Engine,
    inputs: Sequence[int],
    targets: NDArray[np.int64],
    decisions: Sequence["_Decisions"],
    *,
    freeze: bool,
    num_prompt: int = 1,
) -> None:
    """One pass through the segments, asking each exit about the positions that are undecided; `freeze` takes
    one policy.
    """
    engine.check_ids([*inputs, *targets.tolist()])
    runner = engine.runner
    active = np.ones(len(inputs), np.bool_)
    asked = [
        k
        for k in range(runner.num_early)
        if any(decision.policy.thresholds.at(k) is not None for decision in decisions)
    ]
    sequence = runner.open(inputs, frozenset(asked))
    try:
        for segment, shape in enumerate(engine.stack.layout):
            runner.advance(segment, [(sequence, 0, len(inputs))], active if freeze else None)
            if shape.exit_index is not None:
                _ask_exit(engine, sequence, segment, targets, decisions)
            if freeze:
                active = decisions[0].undecided
                active[:num_prompt] = True  # prefill
    finally:
        runner.release(sequence)


def _ask_exit(
    engine: Engine,
    sequence: TokenSequence,
    segment: int,
    targets: NDArray[np.int64],
    decisions: Sequence["_Decisions"],
) -> None:
    """Let every decision that looks at the exit behind a segment see what it says."""
    runner = engine.runner
    shape = engine.stack.layout[segment]
    exit_index = shape.exit_index
    last = shape.last
    assert exit_index is not None, "the segment has an exit"
    asking = [d for d in decisions if last or d.policy.thresholds.at(exit_index) is not None]
    if not asking:
        return
    undecided = np.flatnonzero(np.any([d.undecided for d in asking], axis=0))
    asks = set() if last else {d.policy.asks for d in asking} - {"head"}
    for start in range(0, len(undecided), HEAD_ROWS):
        positions = undecided[start : start + HEAD_ROWS]
        part = [(sequence, np.resize(positions, HEAD_ROWS))]  # always as many, so that one binding serves
        values = {what: runner.ask(exit_index, what, part).copy() for what in sorted(asks, reverse=True)}
        output = runner.ask(exit_index, "head", part)
        used = depths(sequence, segment, positions, engine.stack.layout)
        seen = _Chunk(positions, output, values, used, _logprobs(output, targets[positions]))
        for d in asking:
            d.see(seen, exit_index, last)


class _Decisions:
    """Which exit each position left by, filled in exit by exit."""

    def __init__(self, policy: ExitPolicy, num_tokens: int, num_prompt: int = 1) -> None:
        self.policy = policy
        self.depths = np.zeros(num_tokens, np.int64)  # 0: undecided
        self.depths[: num_prompt - 1] = -1  # nothing is asked of them
        self.logprobs = np.zeros(num_tokens, np.float64)
        self.says = np.zeros(num_tokens, np.int64)
        self.state = policy.begin()

    @property
    def undecided(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.depths == 0
        return mask

    def see(self, seen: "_Chunk", exit_index: int, last: bool) -> None:
        """What an exit says of some positions: those of them that are undecided here and leave are
        settled.
        """
        settled = self.undecided[seen.positions]
        if not last:
            settled &= self.policy.leaves(exit_index, self.confidence(seen, exit_index), 0.0, self.state)
        positions = seen.positions[settled]
        self.depths[positions] = seen.depths[settled]
        self.logprobs[positions] = seen.logprobs[settled]
        self.says[positions] = seen.output.top_id[: len(seen.positions)][settled]

    def confidence(self, seen: "_Chunk", exit_index: int) -> NDArray[np.float32]:
        """Confidence at an early exit. Shape: (N)."""
        count = len(seen.positions)
        value = seen.values.get(self.policy.asks)
        head = seen.output.tokens(0, count) if value is None else None
        said = ExitOutput(exit_index, seen.positions, head, value=None if value is None else value[:count])
        return self.policy.confidence(said, self.state)

    def scores(self) -> Scores:
        return Scores(self.logprobs, np.maximum(self.depths, 0), self.says)


class _Record(_Decisions):
    """What one exit says of every position, whether or not it would leave there, and with what confidence."""

    def __init__(self, policy: ExitPolicy, num_tokens: int, exit_index: int) -> None:
        super().__init__(policy, num_tokens)
        self.exit_index = exit_index
        self.confidences = np.zeros(num_tokens, np.float64)

    @property
    def undecided(self) -> NDArray[np.bool_]:
        return np.ones(len(self.depths), np.bool_)

    def see(self, seen: "_Chunk", exit_index: int, last: bool) -> None:
        confidence = (
            None if last else self.confidence(seen, exit_index)
        )  # at every exit: patience counts them
        if exit_index != self.exit_index:
            return
        self.depths[seen.positions] = seen.depths
        self.logprobs[seen.positions] = seen.logprobs
        self.says[seen.positions] = seen.output.top_id[: len(seen.positions)]
        if confidence is not None:
            self.confidences[seen.positions] = confidence


@dataclass(frozen=True)
class _Chunk:
    """What an exit says of N positions; the head's arrays and the values may be longer (padded)."""

    positions: NDArray[np.int64]
    output: HeadOutput
    values: dict[str, NDArray[np.float32]]  # of a gate, of a similarity
    depths: NDArray[np.int64]  # (N)
    logprobs: Floats  # (N), of the targets


def _logprobs(output: HeadOutput, targets: NDArray[np.int64]) -> Floats:
    """Log-probability of the targets, from the top one's: log p_t = logit_t - logit_top + log p_top.

    Shape: (N) -> (N).
    """
    each = np.arange(len(targets))
    gap = output.logits[each, targets] - output.logits[each, output.top_id[: len(targets)]]
    logprobs: Floats = gap.astype(np.float64) + np.log(output.top_prob[: len(targets)].astype(np.float64))
    return logprobs
