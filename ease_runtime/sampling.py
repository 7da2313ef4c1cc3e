"""Choosing the next token from logits: greedy, filtered sampling, or a given text.

Sampling is Gumbel-max: the token is argmax(logit / temperature + noise) among those the filters keep, which draws from the
filtered softmax. The noise of a token at a position is a pure function of (seed, position, token id), so a draw depends on
no other draw, and two heads that agree on the distribution agree on the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ease_runtime.errors import RequestError
from ease_runtime.policy import HeadOutput


class Sampler(Protocol):
    """What the engine asks for a token."""

    def pick(self, output: HeadOutput, position: int) -> int:
        """The token for `position`, from the head's output for one token (N = 1)."""


class Greedy:
    """The most probable token."""

    def pick(self, output: HeadOutput, position: int) -> int:
        return int(output.top_id[0])


class Given:
    """The tokens of a text that is already there: how a text is scored or timed."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def pick(self, output: HeadOutput, position: int) -> int:
        return self.tokens[position]


@dataclass(frozen=True)
class GumbelSampler:
    """Temperature, top-k (0 keeps all) and top-p (nucleus, Holtzman et al. 2020, arXiv 1904.09751), with a seed."""

    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not self.temperature > 0.0 or not np.isfinite(self.temperature):
            raise RequestError(f"temperature {self.temperature} is not above 0 (0 is greedy)")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k} is below 0 (0 keeps every token)")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p {self.top_p} is outside (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"seed {self.seed} is outside [0, 2**64)")

    def pick(self, output: HeadOutput, position: int) -> int:
        scaled = output.logits[0].astype(np.float64) / self.temperature
        kept = self.kept(scaled)
        return int(kept[np.argmax(scaled[kept] + gumbel_noise(self.seed, position, kept))])

    def kept(self, scaled: NDArray[np.float64]) -> NDArray[np.int64]:
        """The ids that the filters leave, top-k first, then top-p. Shape: (V) -> (kept)."""
        ids = np.arange(len(scaled))
        if 0 < self.top_k < len(ids):
            ids = np.argpartition(scaled, -self.top_k)[-self.top_k :]
        if self.top_p < 1.0:
            ids = ids[np.argsort(-scaled[ids], kind="stable")]
            weights = np.exp(scaled[ids] - scaled[ids[0]])
            before = np.cumsum(weights) - weights  # mass of the tokens ahead of each
            ids = ids[before < self.top_p * weights.sum()]
        return ids


def gumbel_noise(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise for token ids at a position: SplitMix64 (Steele et al. 2014) of the three numbers. Shape: (n) -> (n)."""
    mixed = _splitmix(_splitmix(_splitmix(np.array([seed], np.uint64)) ^ np.uint64(position)) ^ ids.astype(np.uint64))
    uniform = ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1): with one bit more the largest rounds to 1
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
