"""Choosing the next token from logits: greedy, filtered sampling, or a given text.

Logits are first adjusted (penalties, then bias). Sampling is Gumbel-max: the token is argmax(logit /
temperature + noise) among those the filters keep, which draws from the filtered softmax. The noise of a token
at a position is a pure function of (seed, position, token id), so a draw depends on no other draw, and two
heads that agree on the distribution agree on the token.

top-p          nucleus: Holtzman et al. 2020, arXiv 1904.09751
min-p          at least this share of the largest probability: Nguyen et al. 2024, arXiv 2407.01082
repetition     CTRL, Keskar et al. 2019, arXiv 1909.05858, section 4.1; for negative logits times, as
               everybody does since
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError

LARGEST = 1e6  # penalty or bias: beyond any logit, and far from where arithmetic overflows
UNSAYABLE = 1e9  # taken off a logit: finite, so that where nothing else is left the best is said
COLDEST = 1e-100  # temperatures below are greedy, too, and would overflow
SORTED_AT_FIRST = 256  # tokens that top-p looks at, before it looks at more


class Sampler(Protocol):
    """What the engine asks for a token."""

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        """The token for `position`, from logits (V) whose largest is at `top_id`; the tokens before it are
        tokens[:position].
        """


class Greedy:
    """The most probable token."""

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        return top_id


class Given:
    """The tokens of a text that is already there: how a text is scored or timed."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        return self.tokens[position]


@dataclass(frozen=True)
class Adjustments:
    """What is done to the logits before anything is chosen from them, in this order.

    `repetition_penalty` divides the positive and multiplies the negative logits of every token of the
    history, the prompt included (1 changes nothing). `presence_penalty` is taken off once,
    `frequency_penalty` once an occurrence, of the tokens after the prompt, as OpenAI has it. `logit_bias` is
    added: pairs of id and bias. None of `end_ids` is said as one of the first `min_tokens` tokens.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_prompt: int = 0  # tokens of the history that are the prompt
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 / LARGEST <= self.repetition_penalty <= LARGEST:
            raise RequestError(
                f"repetition_penalty {self.repetition_penalty} is outside [{1 / LARGEST:g}, {LARGEST:g}] "
                "(1 changes nothing)"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST:
                raise RequestError(
                    f"{name} {getattr(self, name)} is outside [{-LARGEST:g}, {LARGEST:g}] (0 changes nothing)"
                )
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= LARGEST:
                raise RequestError(
                    f"logit_bias {token}={bias} is not a token id with a number in [{-LARGEST:g}, "
                    f"{LARGEST:g}] to add"
                )

    @property
    def change_nothing(self) -> bool:
        """Whether the logits stay as they are."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties == (1.0, 0.0, 0.0) and not self.logit_bias and not self.end_ids

    def apply(self, logits: NDArray[np.float32], tokens: Sequence[int], position: int) -> NDArray[np.float64]:
        """The adjusted logits for `position`. Shape: (V) -> (V)."""
        adjusted = logits.astype(np.float64)
        if self.repetition_penalty != 1.0:
            seen = np.unique(np.array(tokens[:position], np.int64))
            had = adjusted[seen]
            penalty = self.repetition_penalty
            adjusted[seen] = np.where(had > 0, had / penalty, had * penalty)
        if self.presence_penalty or self.frequency_penalty:
            said, times = np.unique(
                np.array(tokens[self.num_prompt : position], np.int64), return_counts=True
            )
            adjusted[said] -= self.presence_penalty + self.frequency_penalty * times
        for token, bias in self.logit_bias:
            adjusted[token] += bias
        if position < self.num_prompt + self.min_tokens:
            adjusted[list(self.end_ids)] -= UNSAYABLE
        return adjusted


@dataclass(frozen=True)
class AdjustedGreedy:
    """The largest of the adjusted logits."""

    adjustments: Adjustments

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        return int(self.adjustments.apply(logits, tokens, position).argmax())


@dataclass(frozen=True)
class GumbelSampler:
    """Temperature, then top-k (0 keeps all), top-p among those (1 keeps all) and min-p (0 keeps all), with a
    seed.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float = 0.0
    adjustments: Adjustments = Adjustments()

    def __post_init__(self) -> None:
        if not self.temperature > 0.0 or not np.isfinite(self.temperature):
            raise RequestError(f"temperature {self.temperature} is not above 0 (0 is greedy)")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k} is below 0 (0 keeps every token)")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p {self.top_p} is outside (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p {self.min_p} is outside [0, 1]")
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"seed {self.seed} is outside [0, 2**64)")

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        scaled = self.adjustments.apply(logits, tokens, position) / max(self.temperature, COLDEST)
        kept = self.kept(scaled)
        return int(kept[np.argmax(scaled[kept] + gumbel_noise(self.seed, position, kept))])

    def kept(self, scaled: NDArray[np.float64]) -> NDArray[np.int64]:
        """The ids that the filters leave. Shape: (V) -> (kept)."""
        ids = np.arange(len(scaled))
        if 0 < self.top_k < len(ids):
            ids = np.argpartition(scaled, -self.top_k)[-self.top_k :]
        if self.top_p < 1.0:
            ids = ids[_nucleus(scaled[ids], self.top_p)]
        if self.min_p > 0.0:
            ids = ids[scaled[ids] >= scaled[ids].max() + math.log(self.min_p)]
        return ids


def _nucleus(scaled: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Where the fewest of the largest are whose mass reaches top_p of the whole; of equals the first.

    Shape: (n) -> (kept).

    Sorts only as many of the largest as it takes: sorting a vocabulary of 49152 costs 5 ms, a quarter of a
    135M model's step.
    """
    weights = np.exp(scaled - scaled.max())
    enough = top_p * weights.sum()
    size = SORTED_AT_FIRST
    while True:
        some = np.argpartition(weights, -size)[-size:] if size < len(weights) else np.arange(len(weights))
        some = some[np.lexsort((some, -weights[some]))]
        before = np.cumsum(weights[some]) - weights[some]  # mass of the tokens ahead of each
        kept: NDArray[np.int64] = some[before < enough]
        if (
            size >= len(weights) or weights[kept[-1]] > weights[some[-1]]
        ):  # else an equal of the last may be among the others
            return kept
        size *= 8


def seed_of(seed: int, number: int) -> int:
    """The seed of the completion `number` (from 0) of a request: the first has the request's own, each other
    one its own stream.
    """
    if number == 0:
        return seed
    mixed: NDArray[np.uint64] = _splitmix(_splitmix(np.array([seed], np.uint64)) ^ np.uint64(number))
    return int(mixed[0])


def gumbel_noise(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise for token ids at a position: SplitMix64 (Steele et al.

    2014) of the three numbers. Shape: (n) -> (n).
    """
    mixed = _splitmix(
        _splitmix(_splitmix(np.array([seed], np.uint64)) ^ np.uint64(position)) ^ ids.astype(np.uint64)
    )
    uniform = (
        (mixed >> np.uint64(12)).astype(np.float64) + 0.5
    ) * 2.0**-52  # in (0, 1): with one bit more the largest rounds to 1
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
