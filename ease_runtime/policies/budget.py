"""A depth budget over any policy: thresholds move together so that the mean depth of a request
approaches it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_runtime.policies.protocol import ExitOutput, Floats, ThresholdPolicy
from ease_runtime.policies.thresholds import Thresholds

GAIN = 0.25  # how far thresholds move for a token that used all layers too many


@dataclass
class BudgetState:
    """What a request has spent, as the amount that its thresholds have moved; and the other
    policy's state.
    """

    inner: Any
    offset: float = 0.0


@dataclass(frozen=True)
class Budget:
    """`--depth-budget LAYERS` over any policy: each layer too many lowers the thresholds, each too few raises
    them.

    An integral controller over the depths so far: their mean misses the budget (layers a token) by about
    num_layers / (0.25 n) after n tokens, as long as thresholds within [0, 1] can reach it. Thresholds begin
    where `--threshold` puts them, or at 0.5.
    """

    policy: ThresholdPolicy
    budget: float
    num_layers: int

    moves = True

    @property
    def name(self) -> str:
        """The other policy's."""
        return self.policy.name

    @property
    def asks(self) -> str:
        """As the other policy."""
        return self.policy.asks

    @property
    def thresholds(self) -> Thresholds:
        """Those that a request begins with."""
        return self.policy.thresholds

    def begin(self) -> BudgetState:
        """Nothing is spent."""
        return BudgetState(self.policy.begin())

    def confidence(self, said: ExitOutput, state: BudgetState) -> Floats:
        """The other policy's. Shape: (N)."""
        return self.policy.confidence(said, state.inner)

    def leaves(
        self, exit_index: int, confidence: Floats, progress: float, state: BudgetState
    ) -> NDArray[np.bool_]:
        """Which tokens leave at the moved threshold. Shape: (N) -> (N)."""
        moved = self.policy.threshold(exit_index, progress, state.inner) + state.offset
        return confidence >= np.float32(min(max(moved, 0.0), 1.0))

    def note_depth(self, depth: int, state: BudgetState) -> None:
        """Move the thresholds by what a token has used."""
        state.offset -= GAIN * (depth - self.budget) / self.num_layers
