"""Policies that read the exit's head.

max-prob, margin, entropy and fixed: what each computes, and from which paper, is said by its class.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ease_runtime.policies.protocol import ExitOutput, Floats, ThresholdPolicy


@dataclass(frozen=True)
class MaxProb(ThresholdPolicy):
    """The probability p1 of the most probable token: CALM's softmax measure (Schuster et al. 2022, arXiv
    2207.07061, section 3.5), and the default.

    It knows nothing of an exit that is sure and wrong: `ease-eval calibrate` finds what a threshold is worth.
    """

    name: ClassVar[str] = "max-prob"


@dataclass(frozen=True)
class Margin(ThresholdPolicy):
    """The largest probability less the second largest, p1 - p2: CALM's other softmax measure (the same
    section).

    Near 0 where two tokens compete, however probable both are; for one threshold it lets fewer leave than
    max-prob.
    """

    name: ClassVar[str] = "margin"

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        assert said.head is not None, "it asks the head"
        return said.head.margin


@dataclass(frozen=True)
class Entropy(ThresholdPolicy):
    """1 - H / ln V: one less the entropy of the head's distribution over that of a uniform one, which is
    BranchyNet's test (Teerapittayanon et al. 2016, arXiv 1709.01686) turned into a confidence.

    It reads the whole distribution; with large vocabularies V most confidences are above 0.5.
    """

    name: ClassVar[str] = "entropy"

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        assert said.head is not None, "it asks the head"
        certainty = 1.0 - said.head.entropy / math.log(said.head.logits.shape[-1])
        clipped: Floats = np.clip(certainty, 0.0, 1.0).astype(np.float32)
        return clipped


@dataclass(frozen=True)
class Fixed(ThresholdPolicy):
    """1: every token leaves at the one exit that `--exit LAYER` names.

    A model of fewer layers, so to speak; for measuring an exit by itself. It takes no threshold.
    """

    name: ClassVar[str] = "fixed"

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        assert said.head is not None, "it asks the head"
        return np.ones_like(said.head.top_prob)
