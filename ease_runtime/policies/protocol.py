"""What an exit policy is, and what most of them share: a confidence, and the threshold at which a token
leaves.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ease_runtime.policies.thresholds import OFF, Thresholds

Floats = NDArray[np.float32]


class Logits(Protocol):
    """Logits (N, V) as who reads them sees them: an array, or one on a device that is fetched when it is
    indexed by more than a slice.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V)"""

    def __getitem__(self, part: Any, /) -> Any:
        """As an array's."""


@dataclass(frozen=True)
class HeadOutput:
    """What the head says of N tokens. Shapes: logits (N, V), the others (N); entropy in nats.

    The arrays are views of the stack's buffers: the next head call overwrites them.
    """

    logits: Logits
    top_id: NDArray[np.int64]
    top_prob: Floats
    margin: Floats
    entropy: Floats

    def tokens(self, start: int, stop: int) -> "HeadOutput":
        """Those of tokens [start, stop)."""
        part = slice(start, stop)
        return HeadOutput(
            self.logits[part], self.top_id[part], self.top_prob[part], self.margin[part], self.entropy[part]
        )


@dataclass(frozen=True)
class ExitOutput:
    """What an exit (from 0) said of N tokens: its head's output, or the value of a gate or a similarity.

    Shapes: (N).
    """

    exit_index: int
    positions: NDArray[np.int64]
    head: HeadOutput | None = None
    value: Floats | None = None
    early: bool = True  # False: the last exit, after which no token goes on


class ExitPolicy(Protocol):
    """Does a token leave at an early exit? A policy is shared by requests: what it must remember of one is in
    the request's state.
    """

    @property
    def name(self) -> str:
        """As commands and tables call it."""

    @property
    def asks(self) -> str:
        """What it asks an exit: "head", or "gate" or "similarity", and then the head only of a token that
        leaves.
        """

    @property
    def thresholds(self) -> Thresholds:
        """Which exits are asked, and at which confidence a token leaves; off: no token leaves early."""

    @property
    def moves(self) -> bool:
        """Whether thresholds move along a generation: of a given text, such a policy says nothing."""

    def begin(self) -> Any:
        """The state of a request, which the methods below get back."""

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        """How sure an exit is of each token, in [0, 1]. Shape: (N)."""

    def leaves(self, exit_index: int, confidence: Floats, progress: float, state: Any) -> NDArray[np.bool_]:
        """Which tokens leave, at `progress` (in [0, 1]) of the answer. Shape: (N) -> (N)."""

    def note_depth(self, depth: int, state: Any) -> None:
        """A token of the request stands, and has used `depth` layers."""


@dataclass(frozen=True)
class ThresholdPolicy:
    """A policy whose tokens leave at a confidence of at least the exit's threshold.

    Derive from it and say what confidence is.

    `--decay TAU` is CALM's (Schuster et al. 2022, arXiv 2207.07061, section 3.4): the threshold lambda
    becomes 0.9 lambda + 0.1 exp(-tau t / N) at token t of N, since mistakes cost most at the beginning.
    """

    thresholds: Thresholds = OFF
    decay: float | None = None

    name: ClassVar[str] = ""
    asks: ClassVar[str] = "head"

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @property
    def moves(self) -> bool:
        """Whether thresholds decay."""
        return self.decay is not None and bool(self.thresholds)

    def begin(self) -> Any:
        """Nothing has to be remembered."""
        return None

    def confidence(self, said: ExitOutput, state: Any) -> Floats:
        """What the exit was asked for: its value, or the largest probability of its head. Shape: (N)."""
        if said.value is not None:
            return said.value
        assert said.head is not None, "an exit says one or the other"
        return said.head.top_prob

    def threshold(self, exit_index: int, progress: float, state: Any) -> float:
        """The confidence at which a token leaves at an exit that is asked, not yet kept within [0, 1]."""
        value = self.thresholds.at(exit_index)
        assert value is not None, "nothing leaves at an exit that is off"
        return value if self.decay is None else 0.9 * value + 0.1 * math.exp(-self.decay * progress)

    def leaves(self, exit_index: int, confidence: Floats, progress: float, state: Any) -> NDArray[np.bool_]:
        """Which tokens leave. Shape: (N) -> (N)."""
        # In float32, as the confidence is: 1.0 is reached only by a probability that rounds to it.
        return confidence >= np.float32(min(max(self.threshold(exit_index, progress, state), 0.0), 1.0))

    def note_depth(self, depth: int, state: Any) -> None:
        """Depths change nothing."""
