"""Exit policies: does a token leave here? They see figures, never a session.

Every policy turns what the head says of a token into a confidence in [0, 1]; the token leaves when the confidence is at
least the exit's threshold. The confidence is that of the raw logits, before temperature or filters. Threshold 0 leaves at
the first exit. max-prob and margin are CALM's softmax measures (Schuster et al. 2022, arXiv 2207.07061, section 3.5);
entropy is BranchyNet's (Teerapittayanon et al. 2016, arXiv 1709.01686), here 1 - H / ln V. gate is a learned predictor (CALM's
meta-classifier, section 3.4): its probability is asked of the stack, and the head runs only for a token that leaves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ease_runtime.errors import RequestError, did_you_mean

POLICIES = ("max-prob", "margin", "entropy", "gate")


@dataclass(frozen=True)
class HeadOutput:
    """What the head says of N tokens. Shapes: logits (N, V), the others (N); entropy in nats.

    The arrays are views of the stack's buffers: the next head call overwrites them.
    """

    logits: NDArray[np.float32]
    top_id: NDArray[np.int64]
    top_prob: NDArray[np.float32]
    margin: NDArray[np.float32]
    entropy: NDArray[np.float32]


@dataclass(frozen=True)
class ExitPolicy:
    """A confidence and its threshold at each early exit; `thresholds` None means that no token leaves early (off)."""

    name: str = "max-prob"
    thresholds: tuple[float | None, ...] | None = None

    @classmethod
    def create(cls, name: str, thresholds: Sequence[float | None] | None, num_exits: int) -> "ExitPolicy":
        """Check a policy against a bundle with `num_exits` exits, the last one included.

        One threshold holds for every early exit; None among several is an exit that is not asked. Raises RequestError for an
        unknown name, a threshold outside [0, 1], or a wrong number of them.
        """
        if name not in POLICIES:
            raise RequestError(f"unknown policy '{name}'; {did_you_mean(name, POLICIES)}")
        if thresholds is None:
            return cls(name, None)
        for value in thresholds:
            if value is not None and not 0.0 <= value <= 1.0:
                raise RequestError(f"threshold {value} is outside [0, 1]")
        early = num_exits - 1
        if len(thresholds) == 1:
            thresholds = [thresholds[0]] * early
        if len(thresholds) != early:
            raise RequestError(f"{len(thresholds)} thresholds given; this bundle has {early} early exits: give one, or one for each")
        return cls(name, tuple(thresholds))

    def tests(self, exit_index: int) -> bool:
        """Whether a token may leave at this exit (from 0) before the last."""
        return self.thresholds is not None and exit_index < len(self.thresholds) and self.thresholds[exit_index] is not None

    @property
    def asks_gate(self) -> bool:
        """Whether early exits ask their gate, and a head only once the token leaves."""
        return self.name == "gate"

    def confidence(self, output: HeadOutput) -> NDArray[np.float32]:
        """Confidence of each token, in [0, 1]. Shape: (N)."""
        if self.name in ("max-prob", "gate"):  # where there is no gate, after the last layer, the head speaks for itself
            return output.top_prob
        if self.name == "margin":
            return output.margin
        certainty: NDArray[np.float32] = np.clip(1.0 - output.entropy / math.log(output.logits.shape[-1]), 0.0, 1.0).astype(np.float32)
        return certainty

    def leaves(self, exit_index: int, confidence: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which of the tokens leave at an early exit. Shape: (N) -> (N)."""
        threshold = self.thresholds[exit_index] if self.thresholds is not None else None
        assert threshold is not None, "nothing leaves at an exit that is off"
        # In float32, as the confidence is: 1.0 is reached only by a probability that rounds to it.
        return confidence >= np.float32(threshold)
