"""Exit policies: does a token leave here? They see figures, never a session.

Every policy turns what an exit says of a token into a confidence in [0, 1]; the token leaves when the confidence is at
least the exit's threshold. Confidences come from raw logits, before temperature, filters or penalties. Threshold 0 leaves
at the first exit.

max-prob, margin   CALM's softmax measures (Schuster et al. 2022, arXiv 2207.07061, section 3.5): p1, and p1 - p2
entropy            BranchyNet's (Teerapittayanon et al. 2016, arXiv 1709.01686), as 1 - H / ln V
similarity         CALM's state saturation: max(0, cosine) of the states before and after the exit's segment; no head is run
patience           PABEE's (Zhou et al. 2020, arXiv 2006.04152): how many exits in a row said the same as the one before, over
                   the patience
gate               a learned predictor (CALM's meta-classifier): its probability is asked of the stack; no head is run
fixed              1 at the given exit, 0 before it

A threshold may decay with the position (CALM, section 3.4): 0.9 lambda + 0.1 exp(-tau t / N), in [0, 1]. A depth budget moves
all thresholds together so that the mean depth of a request approaches it (`BudgetKeeper`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ease_runtime.errors import RequestError, did_you_mean

POLICIES = ("max-prob", "margin", "entropy", "similarity", "patience", "gate", "fixed")
NO_HEAD = {"gate": "gate", "similarity": "similarity"}  # policies that ask something cheaper than a head
BUDGET_GAIN = 0.25  # how far thresholds move for a token that used all layers too many
MOST_PATIENCE = 10_000  # agreeing exits, more than any model has
BUDGET_START = 0.5  # the thresholds of a budget without thresholds


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

    def tokens(self, start: int, stop: int) -> "HeadOutput":
        """Those of tokens [start, stop)."""
        part = slice(start, stop)
        return HeadOutput(self.logits[part], self.top_id[part], self.top_prob[part], self.margin[part], self.entropy[part])


@dataclass(frozen=True)
class ExitPolicy:
    """A confidence and its threshold at each early exit; `thresholds` None means that no token leaves early (off)."""

    name: str = "max-prob"
    thresholds: tuple[float | None, ...] | None = None  # None among them: the exit is not asked
    patience: int = 1  # agreeing exits
    decay: float | None = None  # tau of the position decay
    depth_budget: float | None = None  # layers a token, in the mean

    @classmethod
    def create(
        cls,
        name: str,
        thresholds: Sequence[float | None] | None,
        exit_layers: Sequence[int],
        *,
        patience: int = 1,
        decay: float | None = None,
        min_exit: int | None = None,
        exit_layer: int | None = None,
        depth_budget: float | None = None,
    ) -> "ExitPolicy":
        """Check a policy against a bundle with exits after `exit_layers`, the last layer included.

        One threshold holds for every early exit; None among several is an exit that is not asked. `min_exit` is the first
        layer after which a token may leave; `exit_layer` the one exit of 'fixed'; a depth budget is in layers.

        Raises RequestError for an unknown name or layer, a value outside its range, a wrong number of thresholds, or options
        that contradict each other.
        """
        early = tuple(exit_layers[:-1])
        if thresholds and all(value is None for value in thresholds):
            thresholds = None
        _check_options(name, thresholds, early, patience, decay, exit_layer, depth_budget)
        if depth_budget is not None:
            _check_budget(depth_budget, exit_layers)
            thresholds = [BUDGET_START] if thresholds is None else thresholds
        if name == "fixed":
            return cls(name, None if exit_layer is None else tuple(1.0 if layer == exit_layer else None for layer in early))
        if thresholds is None:
            return cls(name)
        values = tuple(thresholds) * len(early) if len(thresholds) == 1 else tuple(thresholds)
        if len(values) != len(early):
            raise RequestError(f"{len(values)} thresholds given; this bundle has {len(early)} early exits: give one, or one for each")
        if min_exit is not None:
            if min_exit > exit_layers[-1] or min_exit < 1:
                raise RequestError(f"min_exit {min_exit} is no layer of 1..{exit_layers[-1]}")
            values = tuple(value if layer >= min_exit else None for value, layer in zip(values, early, strict=True))
        return cls(name, values, patience, decay, depth_budget)

    def tests(self, exit_index: int) -> bool:
        """Whether a token may leave at this exit (from 0) before the last."""
        return self.thresholds is not None and exit_index < len(self.thresholds) and self.thresholds[exit_index] is not None

    @property
    def asks(self) -> str:
        """What an early exit is asked: "head", or "gate" or "similarity", and then a head only once the token leaves."""
        return NO_HEAD.get(self.name, "head")

    def confidence(self, output: HeadOutput) -> NDArray[np.float32]:
        """Confidence of each token from its logits, in [0, 1]. Shape: (N). Patience has its own count (`agreement`)."""
        if self.name == "margin":
            return output.margin
        if self.name == "entropy":
            certainty: NDArray[np.float32] = np.clip(1.0 - output.entropy / math.log(output.logits.shape[-1]), 0.0, 1.0).astype(np.float32)
            return certainty
        if self.name == "fixed":
            return np.ones_like(output.top_prob)
        return output.top_prob  # also where a gate or a similarity does not speak: after the last layer

    def agreement(self, agreeing: NDArray[np.int64]) -> NDArray[np.float32]:
        """Patience's confidence from how many exits in a row said the same as the one before. Shape: (N) -> (N)."""
        confidence: NDArray[np.float32] = np.minimum(agreeing / self.patience, 1.0).astype(np.float32)
        return confidence

    def threshold(self, exit_index: int, progress: float = 0.0, offset: float = 0.0) -> np.float32:
        """The threshold of an exit that is asked, at `progress` t/N of a request, moved by a budget's offset."""
        value = self.thresholds[exit_index] if self.thresholds is not None else None
        assert value is not None, "nothing leaves at an exit that is off"
        if self.decay is not None:
            value = 0.9 * value + 0.1 * math.exp(-self.decay * progress)
        # In float32, as the confidence is: 1.0 is reached only by a probability that rounds to it.
        return np.float32(min(max(value + offset, 0.0), 1.0))

    def leaves(self, exit_index: int, confidence: NDArray[np.float32], progress: float = 0.0, offset: float = 0.0) -> NDArray[np.bool_]:
        """Which of the tokens leave at an early exit. Shape: (N) -> (N)."""
        return confidence >= self.threshold(exit_index, progress, offset)


@dataclass
class BudgetKeeper:
    """Holds the mean depth of a request at a budget: each layer too many lowers the thresholds, each too few raises them.

    An integral controller over the depths so far: their mean misses the budget by about num_layers / (gain n) after n tokens,
    as long as thresholds within [0, 1] can reach it.
    """

    budget: float
    num_layers: int
    offset: float = 0.0

    def spend(self, depth: int) -> None:
        """Note a token's depth, in layers."""
        self.offset -= BUDGET_GAIN * (depth - self.budget) / self.num_layers


def threshold_text(thresholds: Sequence[float | None]) -> str:
    """Thresholds, one an exit or one for all, as tables name them: off/0.7."""
    return "/".join("off" if value is None else f"{value:g}" for value in thresholds)


def _check_options(
    name: str,
    thresholds: Sequence[float | None] | None,
    early: Sequence[int],
    patience: int,
    decay: float | None,
    exit_layer: int | None,
    depth_budget: float | None,
) -> None:
    if name not in POLICIES:
        raise RequestError(f"unknown policy '{name}'; {did_you_mean(name, POLICIES)}")
    for value in thresholds or ():
        if value is not None and not 0.0 <= value <= 1.0:
            raise RequestError(f"threshold {value} is outside [0, 1]")
    if (thresholds is not None or exit_layer is not None) and not early:
        raise RequestError("this bundle has no early exit: its only exit is after the last layer; leave the threshold away")
    if not 1 <= patience <= MOST_PATIENCE:
        raise RequestError(f"patience {str(patience)[:20]} is outside 1..{MOST_PATIENCE} agreeing exits")
    if decay is not None and not 0.0 <= decay < math.inf:
        raise RequestError(f"decay {decay} is not a finite number of at least 0")
    if (exit_layer is not None) != (name == "fixed"):
        raise RequestError("policy 'fixed' and an exit layer go together: --policy fixed --exit LAYER")
    if exit_layer is not None and exit_layer not in early:
        raise RequestError(f"exit layer {exit_layer} is no early exit of this bundle, which has {', '.join(map(str, early))}")
    if name == "fixed" and not (thresholds is None and depth_budget is None and decay is None):
        raise RequestError("policy 'fixed' takes an exit layer, and no threshold, decay or depth budget")


def _check_budget(depth_budget: float, exit_layers: Sequence[int]) -> None:
    if len(exit_layers) == 1:
        raise RequestError("a depth budget needs early exits; this bundle has none")
    if not exit_layers[0] <= depth_budget <= exit_layers[-1]:
        raise RequestError(f"depth budget {depth_budget} is outside {exit_layers[0]}..{exit_layers[-1]}, the layers of the exits")
