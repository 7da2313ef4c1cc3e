"""gate: a learned predictor of whether full depth would say the same."""

from dataclasses import dataclass
from typing import ClassVar

from ease_runtime.policies.protocol import ThresholdPolicy


@dataclass(frozen=True)
class Gate(ThresholdPolicy):
    """The probability that the exit's gate gives that full depth would say the same token: CALM's
    meta-classifier (Schuster et al. 2022, arXiv 2207.07061, section 3.5), trained by `ease-train gates`.

    It reads the hidden state alone: no head is run for a token that stays. Bundles without gates refuse it.
    """

    name: ClassVar[str] = "gate"
    asks: ClassVar[str] = "gate"
