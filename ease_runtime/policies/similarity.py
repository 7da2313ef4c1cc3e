"""similarity: whether an exit's segment still changes the state."""

from dataclasses import dataclass
from typing import ClassVar

from ease_runtime.policies.protocol import ThresholdPolicy


@dataclass(frozen=True)
class Similarity(ThresholdPolicy):
    """max(0, cosine) of the hidden states before and after the exit's segment: CALM's state saturation
    (Schuster et al. 2022, arXiv 2207.07061, section 3.5).

    No head is run for a token that stays. What counts as alike differs by model and by layer, so give each
    exit its threshold.
    """

    name: ClassVar[str] = "similarity"
    asks: ClassVar[str] = "similarity"
