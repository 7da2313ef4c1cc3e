"""Exit policies: does a token leave here? They see figures, never a session.

    policy = make_policy("entropy", 0.7, exit_layers=(4, 8, 12))

Every policy turns what an exit says of a token into a confidence in [0, 1]; most let a token leave at a
confidence of at least the exit's threshold, so threshold 0 leaves at the first exit. Confidences come from
raw logits, before temperature, filters or penalties. A policy of one's own is a class like these:
`module:Class` where a name is expected, or an object in Python (docs/contributing/policy.md).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ease_common.errors import RequestError, did_you_mean
from ease_common.own import is_own, load_own
from ease_runtime.policies.budget import Budget
from ease_runtime.policies.gate import Gate
from ease_runtime.policies.head import Entropy, Fixed, Margin, MaxProb
from ease_runtime.policies.patience import Patience
from ease_runtime.policies.protocol import ExitOutput, ExitPolicy, HeadOutput, ThresholdPolicy
from ease_runtime.policies.similarity import Similarity
from ease_runtime.policies.thresholds import Thresholds

__all__ = [
    "FULL_DEPTH",
    "POLICIES",
    "ExitOutput",
    "ExitPolicy",
    "HeadOutput",
    "ThresholdPolicy",
    "make_policy",
]

POLICIES: dict[str, type[ThresholdPolicy]] = {
    "max-prob": MaxProb,
    "margin": Margin,
    "entropy": Entropy,
    "similarity": Similarity,
    "patience": Patience,
    "gate": Gate,
    "fixed": Fixed,
}
FULL_DEPTH = MaxProb()  # without thresholds no token leaves early
MOST_PATIENCE = 10_000  # agreeing exits, more than any model has
BUDGET_START = 0.5  # the thresholds of a budget without thresholds


def make_policy(
    policy: str | type[ThresholdPolicy] | ThresholdPolicy,
    thresholds: Any,
    exit_layers: Sequence[int],
    *,
    patience: int = 1,
    decay: float | None = None,
    min_exit: int | None = None,
    exit_layer: int | None = None,
    depth_budget: float | None = None,
) -> ExitPolicy:
    """A policy for a bundle with exits after `exit_layers`, the last layer included.

    `policy` is a name, `module:Class`, such a class, or an object of one, whose own options stay.
    `thresholds` are whatever `Thresholds.of` takes. `min_exit` is the first layer after which a token may
    leave; `exit_layer` the one exit of 'fixed'; a depth budget is in layers a token.

    Raises RequestError for an unknown name or layer, a value outside its range, a wrong number of thresholds,
    or options that contradict each other.
    """
    early = tuple(exit_layers[:-1])
    given = Thresholds.of(thresholds)
    if isinstance(policy, str):
        policy = find_policy(policy)
    _check_options(policy.name, given, early, patience, decay, exit_layer, depth_budget)
    if depth_budget is not None:
        _check_budget(depth_budget, exit_layers)
        given = given or Thresholds((BUDGET_START,))
    if exit_layer is not None:
        given = Thresholds(tuple(1.0 if layer == exit_layer else None for layer in early))
    given = given.for_exits(len(early))
    if min_exit is not None and given:
        if min_exit > exit_layers[-1] or min_exit < 1:
            raise RequestError(f"min_exit {min_exit} is no layer of 1..{exit_layers[-1]}")
        given = Thresholds(tuple(given.at(k) if layer >= min_exit else None for k, layer in enumerate(early)))
    if isinstance(policy, ThresholdPolicy):
        made = replace(policy, thresholds=given)
    else:
        made = policy(given, decay, **({"patience": patience} if issubclass(policy, Patience) else {}))
    return made if depth_budget is None else Budget(made, depth_budget, exit_layers[-1])


def find_policy(name: str) -> type[ThresholdPolicy]:
    """The class of a name, or of `module:Class`. Raises RequestError."""
    if not is_own(name):
        if name not in POLICIES:
            raise RequestError(f"unknown policy '{name}'; {did_you_mean(name, POLICIES)}")
        return POLICIES[name]
    found = load_own(name, "policy")
    if not (isinstance(found, type) and issubclass(found, ThresholdPolicy)):
        raise RequestError(f"policy '{name}' is no class derived from ease_runtime.policies.ThresholdPolicy")
    return found


def _check_options(
    name: str,
    thresholds: Thresholds,
    early: Sequence[int],
    patience: int,
    decay: float | None,
    exit_layer: int | None,
    depth_budget: float | None,
) -> None:
    if exit_layer is not None and not early:
        raise RequestError(
            "this bundle has no early exit: its only exit is after the last layer; leave the exit away"
        )
    if not 1 <= patience <= MOST_PATIENCE:
        raise RequestError(f"patience {str(patience)[:20]} is outside 1..{MOST_PATIENCE} agreeing exits")
    if decay is not None and not 0.0 <= decay < math.inf:
        raise RequestError(f"decay {decay} is not a finite number of at least 0")
    if (exit_layer is not None) != (name == "fixed"):
        raise RequestError("policy 'fixed' and an exit layer go together: --policy fixed --exit LAYER")
    if exit_layer is not None and exit_layer not in early:
        raise RequestError(
            f"exit layer {exit_layer} is no early exit of this bundle, which has {', '.join(map(str, early))}"
        )
    if name == "fixed" and (thresholds or depth_budget is not None or decay is not None):
        raise RequestError("policy 'fixed' takes an exit layer, and no threshold, decay or depth budget")


def _check_budget(depth_budget: float, exit_layers: Sequence[int]) -> None:
    if len(exit_layers) == 1:
        raise RequestError("a depth budget needs early exits; this bundle has none")
    if not exit_layers[0] <= depth_budget <= exit_layers[-1]:
        raise RequestError(
            f"depth budget {depth_budget} is outside {exit_layers[0]}..{exit_layers[-1]}, the layers of "
            "the exits"
        )
