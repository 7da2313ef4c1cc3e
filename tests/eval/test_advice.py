"""Advice on exits: the cost model against a simulated queue and against the clock, and what is read off the
exits by hand.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ease_eval.cli.main import main
from ease_eval.measure.advice import advise, auroc, best_threshold, depths_of, exit_sets, reach_of
from ease_eval.measure.latency import Setting, Text
from ease_runtime.engine.costs import SIZES, Costs
from ease_runtime.engine.engine import Engine
from ease_runtime.llm import LLM
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import FULL_DEPTH, make_policy

LAYERS = (2, 4, 6)


def rising(first: float, slope: float) -> np.ndarray[Any, Any]:
    return np.array([first + slope * (size - 1) for size in SIZES])


TABLES = {
    ("segment", 0): rising(1.0, 0.2),
    ("segment", 1): rising(2.0, 0.3),
    ("segment", 2): rising(3.0, 0.5),
    ("kv", 1): rising(0.2, 0.02),
    ("kv", 2): rising(0.3, 0.05),
    ("exit", 0): np.array([0.4]),
    ("exit", 1): np.array([0.5]),
    ("exit", 2): np.array([0.6]),
}
AGAIN = {("segment", 0): 0.7, ("exit", 0): 0.3}
OWN = 0.05


def simulated(
    depths: np.ndarray[Any, Any], thresholds: tuple[float | None, ...], catch_up: str, cap: int
) -> float:
    """The seconds of a token, walking the engine's rules token by token over straight-line costs."""
    done = [0, 0, 0]
    total = 0.0
    straight = False

    def cost(graph: str, k: int, tokens: int) -> float:
        table = TABLES[graph, k]
        return float(table[0] + (table[1] - table[0]) * (tokens - 1))

    for place, depth in enumerate(depths):
        total += (AGAIN["segment", 0] if straight else cost("segment", 0, 1)) + OWN
        done[0] = place + 1
        if thresholds[0] is not None:
            total += AGAIN["exit", 0] if straight else 0.4
        straight = depth == 2
        for k in (1, 2):
            pending = done[k - 1] - done[k]
            if depth <= LAYERS[k - 1]:
                if pending >= cap:
                    total += cost("kv" if catch_up == "propagate" else "segment", k, pending) + OWN
                    done[k] = done[k - 1]
                break
            if catch_up == "propagate":
                if pending > 1:
                    total += cost("kv", k, pending - 1) + OWN
                total += cost("segment", k, 1) + OWN
            else:
                total += cost("segment", k, pending) + OWN
            done[k] = place + 1
            if k == 2 or thresholds[k] is not None:
                total += float(TABLES["exit", k][0])
    return total / len(depths)


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.0, 0.0, 1.0), (0.1, 0.0, 0.9), (0.8, 0.15, 0.05)])
def test_the_cost_of_a_token_is_that_of_a_simulated_queue(
    tiny_bundle: Path, catch_up: str, shares: tuple[float, ...]
) -> None:
    engine = Engine(OrtStack(tiny_bundle))
    policy = make_policy("max-prob", [0.5], LAYERS)
    depths = np.random.default_rng(0).choice(LAYERS, 40000, p=shares)
    expected = simulated(depths, policy.thresholds.values, catch_up, engine.cap)
    model = Costs(engine.stack.layout, TABLES, again=AGAIN, pass_seconds=OWN)
    assert model.token_seconds(reach_of(depths, engine.stack), policy, catch_up) == pytest.approx(
        expected, rel=0.02
    )


def test_full_depth_asks_no_exit(tiny_bundle: Path) -> None:
    model = Costs(OrtStack(tiny_bundle).layout, TABLES, again=AGAIN, pass_seconds=OWN)
    assert model.token_seconds([1.0, 1.0, 1.0], FULL_DEPTH, "recompute") == pytest.approx(
        1.0 + 2.0 + 3.0 + 0.6 + 3 * OWN
    )


def on_a_clock_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass only within the stack's calls, by what they run, and 0.1 ms a step of the engine."""
    now = [0.0]
    stack = llm.stack
    base = {"run_segment": (1.0, 2.0, 6.0), "run_kv": (0.0, 0.3, 0.6), "run_exit": (0.5, 0.5, 0.8)}

    def slowed(name: str, run: Any) -> Any:
        def call(number: int, *arguments: Any) -> Any:
            tokens = len(arguments[2 if name != "run_exit" else 0])
            now[0] += 0.001 * base[name][number] * (1 + 0.05 * (tokens - 1))
            return run(number, *arguments)

        return call

    for name in base:
        monkeypatch.setattr(stack, name, slowed(name, getattr(stack, name)))
    step = Engine.step

    def stepped(engine: Engine) -> Any:
        now[0] += 0.0001
        return step(engine)

    monkeypatch.setattr(Engine, "step", stepped)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_predictions_are_the_clocks(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, catch_up: str
) -> None:
    """What is predicted from single calls and depths is what the engine takes for a whole text."""
    llm = LLM(tiny_bundle)
    on_a_clock_of_its_own(llm, monkeypatch)
    documents = [np.random.default_rng(seed).integers(1, 300, 270).tolist() for seed in range(2)]
    texts = [Text(tuple(ids), 20) for ids in documents]
    policies = [FULL_DEPTH, *(make_policy("max-prob", [t], LAYERS) for t in (0.0, 0.3, 0.5))]
    found = advise(
        llm, documents, texts, [Setting(policy, catch_up) for policy in policies], tolerance=1.0, num_rounds=2
    )
    assert found.pass_ms == pytest.approx(0.1)
    assert found.call_ms["segment 3"] == pytest.approx([6 * (1 + 0.05 * (size - 1)) for size in SIZES])
    for prediction in found.predictions:
        assert prediction.predicted_speedup == pytest.approx(
            prediction.measured_speedup, rel=0.06
        )  # a text's last queue is never settled
        assert prediction.error == pytest.approx(
            prediction.predicted_speedup / prediction.measured_speedup - 1
        )
    assert len({round(prediction.mean_depth, 1) for prediction in found.predictions}) == 3
    assert sorted(tuple(place.exits) for place in found.placements) == [(2,), (2, 4), (4,)]
    assert found.placements[0].exits[0] == 2
    # 64 that have left are settled by themselves, in both deeper segments: at this tolerance nobody goes in
    settle = {"recompute": (2 + 6) * (1 + 0.05 * 63), "propagate": (0.3 + 0.6) * (1 + 0.05 * 63)}[
        catch_up
    ] + 0.2
    expected = (1 + 2 + 6 + 0.8 + 0.3) / (1 + 0.5 + 0.1 + settle / 64)
    assert found.placements[0].predicted_speedup == pytest.approx(expected)


def test_what_a_set_of_exits_would_do_by_hand() -> None:
    """Four tokens, two early exits: who leaves where, and which threshold keeps a tolerance."""
    confidences = np.array([[0.9, 0.8, 0.3, 0.25], [0.9, 0.9, 0.7, 0.15]])
    agrees = np.array([[True, False, True, False], [True, True, True, False]])
    assert depths_of(confidences >= 0.5, LAYERS, (0, 1)).tolist() == [2, 2, 4, 6]
    assert depths_of(confidences >= 0.5, LAYERS, (1,)).tolist() == [4, 4, 4, 6]
    threshold, depths, wrong = best_threshold(confidences, agrees, LAYERS, (1,), 0.0)
    assert (threshold, depths.tolist(), wrong) == (pytest.approx(0.16), [4, 4, 4, 6], 0.0)
    threshold, depths, wrong = best_threshold(confidences, agrees, LAYERS, (0, 1), 0.25)
    assert (threshold, depths.tolist(), wrong) == (pytest.approx(0.26), [2, 2, 2, 6], 0.25)
    threshold, depths, wrong = best_threshold(confidences, ~agrees, LAYERS, (1,), 0.0)
    assert (threshold, depths.tolist(), wrong) == (None, [6, 6, 6, 6], 0.0)


def test_how_well_confidence_tells_right_from_wrong() -> None:
    assert auroc(np.array([0.9, 0.8]), np.array([0.1, 0.2])) == 1.0
    assert auroc(np.array([0.1, 0.9]), np.array([0.5])) == 0.5
    assert auroc(np.array([0.5, 0.5]), np.array([0.5])) == 0.5
    assert auroc(np.array([0.5]), np.array([])) is None


def test_every_set_or_the_small_ones() -> None:
    assert exit_sets(2) == [(0,), (1,), (0, 1)]
    assert len(exit_sets(8)) == 255
    assert max(map(len, exit_sets(12))) == 3


def run(*arguments: object) -> Any:
    small = [
        "--scored-tokens",
        "300",
        "--texts",
        "1",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "12",
        "--rounds",
        "1",
    ]
    return CliRunner().invoke(main, ["advise", *map(str, arguments), *small])


def test_the_command(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    result = run(
        tiny_bundle,
        "--data",
        corpus_file,
        "--split",
        "train",
        "--thresholds",
        "0.2",
        "--json",
        tmp_path / "advice.json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "advice.json").read_text())
    assert found.keys() >= {
        "manifest_sha256",
        "versions",
        "exits",
        "placements",
        "predictions",
        "call_ms",
        "suitability",
    }
    assert [one["layer"] for one in found["exits"]] == [2, 4, 6]
    assert found["exits"][-1]["agreement"] == 1.0
    assert len(found["call_ms"]["segment 3"]) == len(SIZES)
    assert 0.0 <= found["suitability"] <= 4 / 6
    assert "suitability" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "2"], "tolerance 2.0 is outside [0, 1]"),
        (["--catch-up", "verify"], "the cost model knows propagate and recompute"),
        (["--policy", "patience"], "policy 'patience' has no confidence of an exit by itself"),
        (["--policy", "gate"], "policy 'gate' needs a gate at every early exit"),
    ],
)
def test_bad_input_ends_in_one_line(
    tiny_bundle: Path, corpus_file: Path, options: list[str], message: str
) -> None:
    result = run(tiny_bundle, "--data", corpus_file, "--split", "train", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
