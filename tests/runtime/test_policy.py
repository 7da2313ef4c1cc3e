"""Exit policies: each confidence against its formula, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_runtime.errors import RequestError
from ease_runtime.policy import POLICIES, ExitPolicy, HeadOutput


def output_of(logits: np.ndarray) -> HeadOutput:
    """What a head says of these logits, in float32 as a graph reports it. Shape: (N, V)."""
    logits = logits.astype(np.float32)
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    ordered = np.sort(weights, axis=1) / total[:, None]
    entropy = np.log(total) - (weights * shifted).sum(axis=1) / total
    return HeadOutput(logits, logits.argmax(axis=1), ordered[:, -1], ordered[:, -1] - ordered[:, -2], entropy)


def formula(name: str, logits: np.ndarray) -> np.ndarray:
    """The confidence straight from the probabilities, in float64."""
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    ordered = np.sort(probabilities, axis=1)[:, ::-1]
    if name in ("max-prob", "gate"):  # of a head, which is asked where there is no gate
        return ordered[:, 0]
    if name == "margin":
        return ordered[:, 0] - ordered[:, 1]
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return 1.0 + (probabilities * logs).sum(axis=1) / math.log(logits.shape[1])


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 300), spread=st.floats(0.0, 50.0))
def test_confidence_is_its_formula(name: str, seed: int, size: int, spread: float) -> None:
    logits = np.random.default_rng(seed).normal(0.0, spread, (7, size)).astype(np.float32)
    confidence = ExitPolicy(name).confidence(output_of(logits))
    assert confidence.dtype == np.float32
    assert confidence.shape == (7,)
    np.testing.assert_allclose(confidence, formula(name, logits.astype(np.float64)), atol=5e-6)
    assert ((confidence >= 0.0) & (confidence <= 1.0)).all()


@pytest.mark.parametrize(("name", "uniform"), [("max-prob", 1 / 64), ("margin", 0.0), ("entropy", 0.0)])
def test_confidence_at_its_bounds(name: str, uniform: float) -> None:
    """All tokens alike, and one token beyond doubt."""
    certain = np.zeros((1, 64))
    certain[0, 5] = 200.0
    policy = ExitPolicy(name)
    assert policy.confidence(output_of(np.ones((1, 64))))[0] == pytest.approx(uniform, abs=1e-6)
    assert policy.confidence(output_of(certain))[0] == 1.0


@pytest.mark.parametrize("entropy", [-1e-6, math.log(64) + 1e-5])
def test_entropy_that_rounds_past_its_bounds(entropy: float) -> None:
    nothing = np.zeros(1, np.float32)
    output = HeadOutput(np.zeros((1, 64), np.float32), np.zeros(1, np.int64), nothing, nothing, np.array([entropy], np.float32))
    assert ExitPolicy("entropy").confidence(output)[0] == (1.0 if entropy < 0 else 0.0)


def test_leaves_at_its_threshold_and_above() -> None:
    policy = ExitPolicy.create("max-prob", [0.7, 0.2], 3)
    below, at, above = np.nextafter(np.float32(0.7), np.float32(0)), np.float32(0.7), np.nextafter(np.float32(0.7), np.float32(1))
    assert policy.leaves(0, np.array([below, at, above])).tolist() == [False, True, True]
    assert policy.leaves(1, np.array([0.1, 0.2, 0.7], np.float32)).tolist() == [False, True, True]


def test_threshold_0_takes_everyone_and_1_only_the_certain() -> None:
    confidences = np.array([0.0, 0.5, np.nextafter(np.float32(1), np.float32(0)), 1.0], np.float32)
    assert ExitPolicy.create("margin", [0.0], 2).leaves(0, confidences).tolist() == [True] * 4
    assert ExitPolicy.create("margin", [1.0], 2).leaves(0, confidences).tolist() == [False, False, False, True]


def test_which_exits_ask() -> None:
    """Every exit but the last, and none when the policy is off."""
    policy = ExitPolicy.create("max-prob", [0.5], 4)
    assert policy.thresholds == (0.5, 0.5, 0.5)
    assert [policy.tests(k) for k in range(4)] == [True, True, True, False]
    off = ExitPolicy.create("max-prob", None, 4)
    assert off == ExitPolicy("max-prob", None)
    assert not any(off.tests(k) for k in range(4))
    assert ExitPolicy.create("entropy", [0.1, 0.2, 0.3], 4).thresholds == (0.1, 0.2, 0.3)


def test_a_bundle_with_one_exit_has_nowhere_to_leave_early() -> None:
    policy = ExitPolicy.create("max-prob", [0.5], 1)
    assert policy.thresholds == ()
    assert not policy.tests(0)


@pytest.mark.parametrize(
    ("name", "thresholds", "message"),
    [
        ("max_prob", None, "unknown policy 'max_prob'; did you mean 'max-prob'?"),
        ("entrpy", [0.5], "unknown policy 'entrpy'; did you mean 'entropy'?"),
        ("zzz", [0.5], f"unknown policy 'zzz'; known: {', '.join(sorted(POLICIES))}"),
        ("max-prob", [1.01], "threshold 1.01 is outside [0, 1]"),
        ("max-prob", [-0.1], "threshold -0.1 is outside [0, 1]"),
        ("max-prob", [0.5, math.nan], "threshold nan is outside [0, 1]"),
        ("max-prob", [0.1, 0.2, 0.3], "3 thresholds given; this bundle has 2 early exits: give one, or one for each"),
        ("max-prob", [], "0 thresholds given; this bundle has 2 early exits: give one, or one for each"),
    ],
)
def test_what_is_refused(name: str, thresholds: list[float] | None, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ExitPolicy.create(name, thresholds, 3)
    assert str(caught.value) == message
