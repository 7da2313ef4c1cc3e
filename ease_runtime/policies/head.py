"""Policies that read the exit's head.

max-prob, margin   CALM's softmax measures (Schuster et al. 2022, arXiv 2207.07061, section 3.5): p1, p1 - p2
entropy            BranchyNet's (Teerapittayanon et al. 2016, arXiv 1709.01686), as 1 - H / ln V
fixed              every token leaves at the one exit that has a threshold
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ease_runtime.policies.protocol import ExitOutput, Floats, ThresholdPolicy


@dataclass(frozen=True)
class MaxProb(ThresholdPolicy):
    """The probability of the most probable token."""

    name: ClassVar[str] = "max-prob"


@dataclass(frozen=True)
class Margin(ThresholdPolicy):
    """The largest probability less the second largest."""

    name: ClassVar[str] = "margin"

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        assert said.head is not None, "it asks the head"
        return said.head.margin


@dataclass(frozen=True)
class Entropy(ThresholdPolicy):
    """1 less the entropy over that of a uniform distribution."""

    name: ClassVar[str] = "entropy"

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        assert said.head is not None, "it asks the head"
        certainty = 1.0 - said.head.entropy / math.log(said.head.logits.shape[-1])
        clipped: Floats = np.clip(certainty, 0.0, 1.0).astype(np.float32)
        return clipped


@dataclass(frozen=True)
class Fixed(ThresholdPolicy):
    """Sure of everything."""

    name: ClassVar[str] = "fixed"

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        assert said.head is not None, "it asks the head"
        return np.ones_like(said.head.top_prob)
