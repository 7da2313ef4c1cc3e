"""patience: a token leaves once enough exits in a row have said the same."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ease_runtime.policies.protocol import ExitOutput, Floats, ThresholdPolicy

Agreement = dict[
    int, tuple[int, int, int]
]  # by position: the last exit asked, what it said, how many agreed with the one before
NOTHING = (-1, -1, 0)


@dataclass(frozen=True)
class Patience(ThresholdPolicy):
    """How many exits in a row said the same as the one before, over the patience (`--patience`), at most 1:
    PABEE (Zhou et al. 2020, arXiv 2006.04152).

    With threshold 1 a token leaves when so many agree. It needs two early exits or more, whose heads are all
    run.
    """

    patience: int = 1

    name: ClassVar[str] = "patience"

    def begin(self) -> Agreement:
        """No exit has said anything."""
        return {}

    def confidence(self, said: ExitOutput, state: Agreement) -> Floats:
        assert said.head is not None, "it asks the head"
        if not said.early:
            return said.head.top_prob
        counts = []
        for position, token in zip(said.positions.tolist(), said.head.top_id.tolist(), strict=True):
            last_exit, last_token, count = state.get(position, NOTHING)
            agrees = (
                last_exit < said.exit_index and token == last_token
            )  # else the position is on its way for another time
            counts.append(count + 1 if agrees else 0)
            state[position] = (said.exit_index, token, counts[-1])
        return np.minimum(np.array(counts) / self.patience, 1.0).astype(np.float32)
