"""similarity: CALM's state saturation, max(0, cosine) of the states before and after the exit's segment.

No head is run for it.
"""

from dataclasses import dataclass
from typing import ClassVar

from ease_runtime.policies.protocol import ThresholdPolicy


@dataclass(frozen=True)
class Similarity(ThresholdPolicy):
    """How alike the states around the exit's segment are."""

    name: ClassVar[str] = "similarity"
    asks: ClassVar[str] = "similarity"
