"""gate: a learned predictor of whether full depth would say the same (CALM's meta-classifier).

No head is run for it.
"""

from dataclasses import dataclass
from typing import ClassVar

from ease_runtime.policies.protocol import ThresholdPolicy


@dataclass(frozen=True)
class Gate(ThresholdPolicy):
    """The probability that the exit's gate gives."""

    name: ClassVar[str] = "gate"
    asks: ClassVar[str] = "gate"
