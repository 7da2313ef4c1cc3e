"""Exit policies: each confidence against its formula, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_common.errors import RequestError
from ease_runtime.policies import FULL_DEPTH, POLICIES, ExitOutput, HeadOutput, make_policy
from ease_runtime.policies.thresholds import EXPECTED, OFF, Thresholds


def output_of(logits: np.ndarray) -> HeadOutput:
    """What a head says of these logits, in float32 as a graph reports it. Shape: (N, V)."""
    logits = logits.astype(np.float32)
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    ordered = np.sort(weights, axis=1) / total[:, None]
    entropy = np.log(total) - (weights * shifted).sum(axis=1) / total
    return HeadOutput(logits, logits.argmax(axis=1), ordered[:, -1], ordered[:, -1] - ordered[:, -2], entropy)


def said(head: HeadOutput, exit_index: int = 0, early: bool = True) -> ExitOutput:
    return ExitOutput(exit_index, np.arange(len(head.top_id)), head, early=early)


def formula(name: str, logits: np.ndarray) -> np.ndarray:
    """The confidence straight from the probabilities, in float64."""
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    ordered = np.sort(probabilities, axis=1)[:, ::-1]
    if name == "fixed":
        return np.ones(len(logits))
    if name in (
        "max-prob",
        "gate",
        "similarity",
        "patience",
    ):  # of a head, which is asked where there is nothing else to ask
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
    policy = POLICIES[name]()
    confidence = policy.confidence(said(output_of(logits), early=name != "patience"), policy.begin())
    assert confidence.dtype == np.float32
    assert confidence.shape == (7,)
    np.testing.assert_allclose(confidence, formula(name, logits.astype(np.float64)), atol=5e-6)
    assert ((confidence >= 0.0) & (confidence <= 1.0)).all()


@pytest.mark.parametrize(("name", "uniform"), [("max-prob", 1 / 64), ("margin", 0.0), ("entropy", 0.0)])
def test_confidence_at_its_bounds(name: str, uniform: float) -> None:
    """All tokens alike, and one token beyond doubt."""
    certain = np.zeros((1, 64))
    certain[0, 5] = 200.0
    policy = POLICIES[name]()
    assert policy.confidence(said(output_of(np.ones((1, 64)))), None)[0] == pytest.approx(uniform, abs=1e-6)
    assert policy.confidence(said(output_of(certain)), None)[0] == 1.0


@pytest.mark.parametrize("entropy", [-1e-6, math.log(64) + 1e-5])
def test_entropy_that_rounds_past_its_bounds(entropy: float) -> None:
    nothing = np.zeros(1, np.float32)
    output = HeadOutput(
        np.zeros((1, 64), np.float32),
        np.zeros(1, np.int64),
        nothing,
        nothing,
        np.array([entropy], np.float32),
    )
    assert POLICIES["entropy"]().confidence(said(output), None)[0] == (1.0 if entropy < 0 else 0.0)


def test_leaves_at_its_threshold_and_above() -> None:
    policy = make_policy("max-prob", [0.7, 0.2], (2, 4, 6))
    below = np.nextafter(np.float32(0.7), np.float32(0))
    at = np.float32(0.7)
    above = np.nextafter(np.float32(0.7), np.float32(1))
    assert policy.leaves(0, np.array([below, at, above]), 0.0, None).tolist() == [False, True, True]
    assert policy.leaves(1, np.array([0.1, 0.2, 0.7], np.float32), 0.0, None).tolist() == [False, True, True]


def test_threshold_0_takes_everyone_and_1_only_the_certain() -> None:
    confidences = np.array([0.0, 0.5, np.nextafter(np.float32(1), np.float32(0)), 1.0], np.float32)
    assert make_policy("margin", [0.0], (2, 4)).leaves(0, confidences, 0.0, None).tolist() == [True] * 4
    assert make_policy("margin", [1.0], (2, 4)).leaves(0, confidences, 0.0, None).tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_which_exits_ask() -> None:
    """Every exit but the last, and none when the policy is off."""
    policy = make_policy("max-prob", [0.5], (1, 2, 3, 4))
    assert policy.thresholds.values == (0.5, 0.5, 0.5)
    assert [policy.thresholds.at(k) for k in range(4)] == [0.5, 0.5, 0.5, None]
    off = make_policy("max-prob", None, (1, 2, 3, 4))
    assert off == FULL_DEPTH
    assert not off.thresholds
    assert not any(off.thresholds.at(k) is not None for k in range(4))
    assert make_policy("entropy", [0.1, 0.2, 0.3], (1, 2, 3, 4)).thresholds.values == (0.1, 0.2, 0.3)


def test_calms_decay() -> None:
    """0.9 lambda + 0.1 exp(-tau t / N), in [0, 1]: from above the threshold to below it."""
    policy = make_policy("max-prob", [0.8], (2, 4), decay=4.0)
    for t in range(101):
        assert policy.threshold(0, t / 100, None) == 0.9 * 0.8 + 0.1 * math.exp(-4.0 * t / 100)
    assert make_policy("max-prob", [1.0], (2, 4), decay=0.0).threshold(0, 0.7, None) == 1.0
    assert policy.leaves(0, np.array([0.75], np.float32), 1.0, None)[0]
    assert not policy.leaves(0, np.array([0.75], np.float32), 0.0, None)[0]


def test_patience_counts_agreeing_exits() -> None:
    policy = make_policy("patience", [1.0], (1, 2, 3, 4), patience=2)
    state = policy.begin()
    nothing = np.zeros(2, np.float32)
    ids_said = [(7, 4), (7, 5), (7, 5), (7, 5)]
    expected = [(0.0, 0.0), (0.5, 0.0), (1.0, 0.5), (1.0, 1.0)]
    for exit_index, (ids, confidences) in enumerate(zip(ids_said, expected, strict=True)):
        head = HeadOutput(np.zeros((2, 9), np.float32), np.array(ids), nothing, nothing, nothing)
        found = policy.confidence(said(head, exit_index), state)
        assert found.tolist() == list(confidences)
        assert policy.leaves(min(exit_index, 2), found, 0.0, state).tolist() == [
            value == 1.0 for value in confidences
        ]
    again = policy.confidence(said(head, 0), state)
    assert again.tolist() == [0.0, 0.0], "positions that are on their way again begin anew"


def test_fixed_and_min_exit_choose_exits() -> None:
    layers = (2, 4, 6, 8)
    assert make_policy("fixed", None, layers, exit_layer=4).thresholds.values == (None, 1.0, None)
    assert make_policy("margin", [0.5], layers, min_exit=3).thresholds.values == (None, 0.5, 0.5)
    assert make_policy("margin", [0.1, 0.2, 0.3], layers, min_exit=6).thresholds.values == (None, None, 0.3)
    assert make_policy("margin", None, layers, depth_budget=5.0).thresholds.values == (0.5, 0.5, 0.5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), budget=st.floats(2.0, 8.0), threshold=st.floats(0.0, 1.0))
def test_a_budget_is_held(seed: int, budget: float, threshold: float) -> None:
    """Confidences spread over [0, 1] at exits of 2, 4, 6 and 8 layers: the mean depth ends within the
    controller's bound.
    """
    dice = np.random.default_rng(seed)
    policy = make_policy("max-prob", [threshold], (2, 4, 6, 8), depth_budget=budget)
    depths = []
    state = policy.begin()
    for _ in range(400):
        leaves = [policy.leaves(k, dice.random(1).astype(np.float32), 0.0, state)[0] for k in range(3)]
        depths.append(2 * (leaves.index(True) + 1) if True in leaves else 8)
        policy.note_depth(depths[-1], state)
    assert np.mean(depths) == pytest.approx(budget, abs=8 / (0.25 * 400) + 0.05)


@pytest.mark.parametrize(
    ("name", "thresholds", "options", "message"),
    [
        ("max_prob", None, {}, "unknown policy 'max_prob'; did you mean 'max-prob'?"),
        ("entrpy", [0.5], {}, "unknown policy 'entrpy'; did you mean 'entropy'?"),
        ("zzz", [0.5], {}, f"unknown policy 'zzz'; known: {', '.join(sorted(POLICIES))}"),
        ("max-prob", [1.01], {}, "threshold 1.01 is outside [0, 1]"),
        ("max-prob", [-0.1], {}, "threshold -0.1 is outside [0, 1]"),
        ("max-prob", [0.5, math.nan], {}, "threshold nan is outside [0, 1]"),
        (
            "max-prob",
            [0.1, 0.2, 0.3],
            {},
            "3 thresholds given; this bundle has 2 early exits: give one, or one for each",
        ),
        ("max-prob", [], {}, f"no threshold in an empty list; give {EXPECTED}"),
        ("patience", [0.5], {"patience": 0}, "patience 0 is outside 1..10000 agreeing exits"),
        ("patience", [0.5], {"patience": 10**400}, f"patience {10**19} is outside 1..10000 agreeing exits"),
        ("margin", [0.5], {"decay": -1.0}, "decay -1.0 is not a finite number of at least 0"),
        ("margin", [0.5], {"min_exit": 9}, "min_exit 9 is no layer of 1..6"),
        ("margin", [0.5], {"depth_budget": 1.0}, "depth budget 1.0 is outside 2..6, the layers of the exits"),
        (
            "margin",
            [0.5],
            {"exit_layer": 2},
            "policy 'fixed' and an exit layer go together: --policy fixed --exit LAYER",
        ),
        ("fixed", None, {}, "policy 'fixed' and an exit layer go together: --policy fixed --exit LAYER"),
        ("fixed", None, {"exit_layer": 3}, "exit layer 3 is no early exit of this bundle, which has 2, 4"),
        (
            "fixed",
            [0.5],
            {"exit_layer": 2},
            "policy 'fixed' takes an exit layer, and no threshold, decay or depth budget",
        ),
    ],
)
def test_what_is_refused(
    name: str, thresholds: list[float] | None, options: dict[str, float], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        make_policy(name, thresholds, (2, 4, 6), **options)
    assert str(caught.value) == message


def test_a_bundle_with_one_exit_takes_no_threshold() -> None:
    assert not make_policy("max-prob", None, (6,)).thresholds
    with pytest.raises(RequestError, match="this bundle has no early exit"):
        make_policy("max-prob", [0.5], (6,))
    with pytest.raises(RequestError, match="a depth budget needs early exits"):
        make_policy("max-prob", None, (6,), depth_budget=6.0)


@pytest.mark.parametrize(
    ("given", "values", "text", "in_json"),
    [
        (None, (None,), "off", "off"),
        ("off", (None,), "off", "off"),
        ([None, "off"], (None, None), "off", "off"),
        (0.7, (0.7,), "0.7", 0.7),
        (" 0.7", (0.7,), "0.7", 0.7),
        ("off, 0.123456789", (None, 0.123456789), "off,0.123457", "off,0.123456789"),
        ([0.5, 0.5], (0.5, 0.5), "0.5", 0.5),
        ([None, 1], (None, 1.0), "off,1", "off,1.0"),
    ],
)
def test_thresholds_have_one_notation(
    given: object, values: tuple[float | None, ...], text: str, in_json: float | str
) -> None:
    found = Thresholds.of(given)
    assert found.values == values
    assert (str(found), found.to_json()) == (text, in_json)
    assert bool(found) == (text != "off")
    num_early = max(2, len(values))
    assert Thresholds.of(in_json).for_exits(num_early) == found.for_exits(num_early), (
        "what is written is read as the same"
    )
    assert Thresholds.of(found) is found
    assert found.for_exits(num_early) == OFF or len(found.for_exits(num_early).values) == num_early


@pytest.mark.parametrize(
    "given",
    ["nan", "0.5,nan", math.nan, "x", "0.5/0.7", "", True, [True], [[0.5]], {}, 10**400, "1e999", [], -1],
)
def test_no_thresholds(given: object) -> None:
    with pytest.raises(RequestError) as caught:
        Thresholds.of(given)
    assert "\n" not in str(caught.value)
