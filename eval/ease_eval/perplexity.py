"""Perplexity under an exit policy and its catch-up: exact, and in parallel over a window.

`recompute` leaves every token's K/V exact, so one full-depth pass that looks at each exit gives every threshold's figure.
`propagate` freezes a token's state where it left, so each threshold needs its own pass, segment by segment, with the
`active` mask. Both equal what the engine computes token by token (tests/eval holds them to it).

The first token of a window is prefill: its K/V are exact in every mode, and its prediction follows the policy.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ease_runtime.policy import ExitPolicy, HeadOutput
from ease_runtime.stack import Stack

HEAD_ROWS = 32  # tokens a head call scores at once (its logits are rows x vocabulary)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a policy made of some target tokens. Shapes: all (tokens); logprobs in nats, depths in layers."""

    logprobs: Floats
    depths: NDArray[np.int64]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability a token."""
        return math.exp(-float(self.logprobs.mean()))

    @property
    def mean_depth(self) -> float:
        """Mean number of layers a token used."""
        return float(self.depths.mean())


@dataclass(frozen=True)
class Window:
    """Inputs ids[start:stop] with targets ids[start+1:stop+1], of which those before `scored_from` count elsewhere."""

    start: int
    stop: int
    scored_from: int  # as an offset into the window


def windows(num_ids: int, length: int, stride: int) -> Iterator[Window]:
    """Strided windows over a document of `num_ids` tokens: every target is scored once, with as much context as fits."""
    scored = 0  # inputs whose target has been scored
    for start in range(0, num_ids - 1, stride):
        stop = min(start + length, num_ids - 1)
        yield Window(start, stop, scored - start)
        scored = stop
        if stop == num_ids - 1:
            return


def score_documents(stack: Stack, documents: Sequence[Sequence[int]], policies: Sequence[ExitPolicy], catch_up: str) -> list[Scores]:
    """Score every document under each policy, in windows of the model's context with half a window's stride."""
    length = stack.max_positions
    parts: list[list[Scores]] = [[] for _ in policies]
    for ids in documents:
        for window in windows(len(ids), length, max(1, length // 2)):
            inputs = np.array(ids[window.start : window.stop], np.int64)
            targets = np.array(ids[window.start + 1 : window.stop + 1], np.int64)
            for part, scores in zip(parts, score_window(stack, inputs, targets, policies, catch_up), strict=True):
                part.append(Scores(scores.logprobs[window.scored_from :], scores.depths[window.scored_from :]))
    return [Scores(np.concatenate([s.logprobs for s in part]), np.concatenate([s.depths for s in part])) for part in parts]


def score_window(
    stack: Stack, inputs: NDArray[np.int64], targets: NDArray[np.int64], policies: Sequence[ExitPolicy], catch_up: str
) -> list[Scores]:
    """Score one window under each policy. Shape: inputs and targets (S) -> one Scores of S tokens each."""
    if catch_up == "propagate":
        return [_score_propagate(stack, inputs, targets, policy) for policy in policies]
    return _score_exact(stack, inputs, targets, policies)


class _Decisions:
    """Which exit each position left by, filled in exit by exit."""

    def __init__(self, policy: ExitPolicy, num_tokens: int, layers: tuple[int, ...]) -> None:
        self.policy, self.layers = policy, layers
        self.depths = np.zeros(num_tokens, np.int64)  # 0: undecided
        self.logprobs = np.zeros(num_tokens, np.float64)

    @property
    def undecided(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.depths == 0
        return mask

    def see(self, exit_index: int, positions: NDArray[np.int64], confidence: NDArray[np.float32], logprobs: Floats) -> None:
        """What an exit says of some undecided positions: those that leave are settled."""
        if exit_index < len(self.layers) - 1:
            leaves = self.policy.leaves(exit_index, confidence)
            positions, logprobs = positions[leaves], logprobs[leaves]
        self.depths[positions] = self.layers[exit_index]
        self.logprobs[positions] = logprobs

    def scores(self) -> Scores:
        return Scores(self.logprobs, self.depths)


def _score_exact(stack: Stack, inputs: NDArray[np.int64], targets: NDArray[np.int64], policies: Sequence[ExitPolicy]) -> list[Scores]:
    decisions = [_Decisions(policy, len(inputs), stack.exit_layers) for policy in policies]
    cache, states = stack.open_cache(), inputs
    for k in range(len(stack.exit_layers)):
        states = _run_segment(stack, k, cache, states)
        asking = [d for d in decisions if k == len(stack.exit_layers) - 1 or d.policy.tests(k)]
        if not asking:
            continue
        undecided = np.flatnonzero(np.any([d.undecided for d in asking], axis=0))
        for positions, output in _head_chunks(stack, k, states, undecided):
            logprobs = _logprobs(output, targets[positions])
            for d in asking:
                mine = d.undecided[positions]
                d.see(k, positions[mine], d.policy.confidence(output)[: len(positions)][mine], logprobs[mine])
    return [d.scores() for d in decisions]


def _score_propagate(stack: Stack, inputs: NDArray[np.int64], targets: NDArray[np.int64], policy: ExitPolicy) -> Scores:
    decisions = _Decisions(policy, len(inputs), stack.exit_layers)
    cache, states, active = stack.open_cache(), inputs, np.ones(len(inputs), np.bool_)
    for k in range(len(stack.exit_layers)):
        states = _run_segment(stack, k, cache, states, active)
        if k == len(stack.exit_layers) - 1 or policy.tests(k):
            for positions, output in _head_chunks(stack, k, states, np.flatnonzero(decisions.undecided)):
                confidence = policy.confidence(output)[: len(positions)]
                decisions.see(k, positions, confidence, _logprobs(output, targets[positions]))
        active = decisions.undecided
        active[0] = True  # prefill
    return decisions.scores()


def _run_segment(
    stack: Stack, number: int, cache: object, inputs: NDArray[np.int64], active: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Run a whole window through a segment; returns the pool rows of its hidden states."""
    live = [] if number == 0 else [inputs]
    out = stack.reserve_rows(len(inputs), live)
    stack.run_segment(number, cache, 0, inputs, out, active)
    return np.arange(out, out + len(inputs))


def _head_chunks(
    stack: Stack, exit_index: int, rows: NDArray[np.int64], positions: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], HeadOutput]]:
    """The head's output for some positions, a chunk of always the same size at a time (the last one padded)."""
    for start in range(0, len(positions), HEAD_ROWS):
        chunk = positions[start : start + HEAD_ROWS]
        yield chunk, stack.run_exit(exit_index, rows[np.resize(chunk, HEAD_ROWS)])


def _logprobs(output: HeadOutput, targets: NDArray[np.int64]) -> Floats:
    """Log-probability of the targets, from the top one's: log p_t = logit_t - logit_top + log p_top. Shape: (N) -> (N)."""
    each = np.arange(len(targets))
    gap = output.logits[each, targets] - output.logits[each, output.top_id[: len(targets)]]
    logprobs: Floats = gap.astype(np.float64) + np.log(output.top_prob[: len(targets)].astype(np.float64))
    return logprobs
