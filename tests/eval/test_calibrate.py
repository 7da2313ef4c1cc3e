"""Calibration: the statistics on data whose truth is known, and the whole on a bundle."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ease_common.errors import BundleError, RequestError
from ease_eval.cli.main import main
from ease_eval.measure.calibrate import (
    binomial_tail,
    calibrate,
    candidates,
    harm,
    hoeffding_bentkus,
    lowest_threshold,
    walk,
    write_certificate,
)
from ease_eval.measure.perplexity import Scores, record_exits, score_documents
from ease_runtime.bundle.manifest import load_manifest
from ease_runtime.engine.engine import Engine
from ease_runtime.generation import Timing
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import FULL_DEPTH, make_policy


def test_binomial_tail_by_hand() -> None:
    assert binomial_tail(0, 3, 0.5) == pytest.approx(1 / 8)
    assert binomial_tail(1, 3, 0.5) == pytest.approx(4 / 8)
    assert binomial_tail(9, 3, 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(("delta", "truth"), [(0.1, 0.1), (0.05, 0.05), (0.2, 0.25)])
def test_p_values_are_valid(delta: float, truth: float) -> None:
    """Where the risk is at or above delta, a p-value below u comes with probability at most u (in 3000 draws
    of 60 documents).
    """
    dice = np.random.default_rng(0)
    risks = dice.binomial(1, truth, (3000, 60)).mean(axis=1)
    p_values = np.array([hoeffding_bentkus(float(r), 60, delta) for r in risks])
    for u in (0.01, 0.05, 0.1, 0.3):
        assert (p_values <= u).mean() <= u + 2 * math.sqrt(u / 3000)


def test_p_values_have_power() -> None:
    assert hoeffding_bentkus(0.0, 100, 0.05) < 0.02
    assert hoeffding_bentkus(0.01, 1000, 0.05) < 1e-8
    assert hoeffding_bentkus(0.05, 1000, 0.05) > 0.5
    assert hoeffding_bentkus(0.9, 10, 0.05) == 1.0


def test_the_promise_holds_on_fresh_documents() -> None:
    """Candidates whose true risks rise from 0.01 to 0.2: in 600 draws the one chosen is above delta at most
    epsilon of the time.
    """
    dice = np.random.default_rng(3)
    delta = 0.08
    epsilon = 0.1
    size = 150
    truths = np.linspace(0.01, 0.2, 25)
    wrong = chosen = 0
    for _ in range(600):
        documents = dice.beta(2.0, 2.0 * (1 - truths[:, None]) / truths[:, None], (25, size))
        certified, _ = walk(list(documents), delta, epsilon)
        wrong += certified > 0 and truths[certified - 1] > delta
        chosen += certified > 0
    assert wrong / 600 <= epsilon
    assert chosen == 600
    assert truths[certified - 1] > 0.03  # and it is not timid for nothing


def test_the_walk_stops_at_the_first_that_fails() -> None:
    fine = np.zeros(200)
    bad = np.full(200, 0.5)
    assert walk([fine, bad, fine], 0.05, 0.05)[0] == 1
    assert len(walk([fine, bad, fine], 0.05, 0.05)[1]) == 2
    assert walk([bad], 0.05, 0.05)[0] == 0


def test_lowest_threshold_by_search() -> None:
    dice = np.random.default_rng(1)
    for level in (0.0, 0.1, 0.3, 1.0):
        confidence = dice.integers(0, 8, 60) / 8.0
        wrong = (dice.random(60) > confidence).astype(float)
        fine = [t for t in sorted(set(confidence)) if wrong[confidence >= t].mean() <= level]
        assert lowest_threshold(confidence, wrong, level) == (fine[0] if fine else None)


def test_candidates_grow_eager() -> None:
    dice = np.random.default_rng(2)
    confidences = dice.random((2, 400))
    harms = (dice.random((2, 400)) > confidences).astype(float)
    vectors = candidates(confidences, harms, 0.2)
    assert len(vectors) > 3
    for careful, eager in pairwise(vectors):
        assert all(
            a is None or (b is not None and b <= a) for a, b in zip(careful.values, eager.values, strict=True)
        )
        assert careful != eager


def test_harm_by_hand() -> None:
    off = Scores(np.array([-1.0, -1.0, -1.0]), np.array([6, 6, 6]), np.array([1, 2, 3]))
    early = Scores(np.array([-0.5, -1.25, -9.0]), np.array([2, 2, 2]), np.array([1, 9, 3]))
    assert harm(early, off, "disagreement").tolist() == [0.0, 1.0, 0.0]
    assert harm(early, off, "loss").tolist() == [0.0, 0.25, 1.0]


# On a bundle


@pytest.fixture(scope="module")
def documents(tiny_bundle: Path) -> list[list[int]]:
    size = load_manifest(tiny_bundle).vocab_size
    return [np.random.default_rng(i).integers(0, size, 40).tolist() for i in range(40)]


@pytest.mark.parametrize("policy", ["max-prob", "similarity", "patience"])
def test_recorded_exits_are_those_of_scoring(
    tiny_bundle: Path, documents: list[list[int]], policy: str
) -> None:
    """Confidences, tokens and log-probabilities of an exit, against scoring with that exit alone."""
    engine = Engine(OrtStack(tiny_bundle))
    everything = make_policy(policy, [1.0], engine.stack.exit_layers)
    confidences, exits, off = record_exits(engine, documents[:3], everything)
    assert confidences.shape == (2, 3 * 39)
    (full,) = score_documents(engine, documents[:3], [FULL_DEPTH], "recompute")
    np.testing.assert_array_equal(off.says, full.says)
    for k, thresholds in enumerate([(0.0, None), (None, 0.0)]):
        (alone,) = score_documents(
            engine, documents[:3], [make_policy("max-prob", thresholds, (2, 4, 6))], "recompute"
        )
        np.testing.assert_array_equal(exits[k].says, alone.says)
        np.testing.assert_allclose(exits[k].logprobs, alone.logprobs, rtol=1e-6)
    threshold = float(np.median(confidences[0]))
    (left,) = score_documents(
        engine, documents[:3], [make_policy(policy, [threshold, None], (2, 4, 6))], "recompute"
    )
    assert ((confidences[0] >= threshold) == (left.depths == 2)).all()


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_a_bundle_is_calibrated_and_says_so(
    tiny_bundle: Path, documents: list[list[int]], catch_up: str, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    engine = Engine(OrtStack(bundle))
    settings = {
        "policy": "max-prob",
        "catch_up": catch_up,
        "risk": "disagreement",
        "data": "made up",
        "split": "validation",
    }
    certificate = calibrate(engine, documents, delta=0.5, epsilon=0.1, **settings)
    assert certificate.num_fit_documents + certificate.num_test_documents == 40
    assert certificate.thresholds == certificate.tested[-1].thresholds or certificate.tested[-1].p_value > 0.1
    write_certificate(bundle, certificate)
    llm = LLM(bundle)
    generation = llm.submit("And the king", Options(max_tokens=20))
    list(llm.follow(generation, Timing()))
    sequence = generation.choices[0].sequence
    assert sequence.decision.policy.thresholds == certificate.thresholds
    assert sequence.request.catch_up == catch_up
    assert (
        "thresholds from the bundle's calibration: disagreement at most 0.5 with probability 0.9, on made up"
        in sequence.notes[0]
    )
    off = llm.submit("And the king", Options(max_tokens=20, threshold=(None,)))
    assert not off.choices[0].sequence.decision.policy.thresholds
    same = certificate.thresholds
    promised = Options(threshold=same, catch_up=catch_up)
    assert llm.notes(promised)
    others: list[dict[str, Any]] = [
        {"threshold": (0.3,)},
        {"depth_budget": 3.0},
        {"decay": 50.0},
        {"min_exit": 4},
    ]
    others.append({"catch_up": "propagate" if catch_up == "recompute" else "recompute"})
    assert [llm.notes(replace(promised, **other)) for other in others] == [[]] * len(others)


def test_a_calibration_that_nobody_wrote_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = bundle / "manifest.json"
    values = json.loads(path.read_text())
    for junk in ({"thresholds": [0.5, 2.0]}, {"thresholds": [0.5] * 3}, {"policy": 3}, {"a": 1}):
        good = {
            "policy": "max-prob",
            "catch_up": "recompute",
            "risk": "loss",
            "data": "x",
            "delta": 0.1,
            "epsilon": 0.1,
            "thresholds": [1, None],
        }
        path.write_text(json.dumps({**values, "calibration": {**good, **junk} if "a" not in junk else junk}))
        with pytest.raises(BundleError, match="its calibration is not what ease-eval calibrate writes"):
            load_manifest(bundle)
    path.write_text(json.dumps({**values, "calibration": good}))
    assert load_manifest(bundle).calibration == good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 0.0}, "delta 0.0 is outside (0, 1)"),
        ({"epsilon": 1.5}, "epsilon 1.5 is outside (0, 1)"),
        ({"risk": "los"}, "unknown risk 'los'; did you mean 'loss'?"),
        ({"catch_up": "verify"}, "it needs no calibration"),
        ({"policy": "gate"}, "policy 'gate' needs a gate"),
    ],
)
def test_what_cannot_be_calibrated(
    tiny_bundle: Path, documents: list[list[int]], change: dict[str, object], message: str
) -> None:
    settings = {
        "policy": "max-prob",
        "catch_up": "recompute",
        "risk": "loss",
        "data": "x",
        "split": "x",
        "delta": 0.1,
        "epsilon": 0.1,
    }
    with pytest.raises(RequestError) as caught:
        calibrate(Engine(OrtStack(tiny_bundle)), documents, **{**settings, **change})
    assert message in str(caught.value)


def test_a_tolerance_that_nothing_holds_changes_no_bundle(
    tiny_bundle: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """Nine documents cannot show one in a thousand."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = (bundle / "manifest.json").read_bytes()
    command = [
        "calibrate",
        str(bundle),
        "--data",
        str(corpus_file),
        "--delta",
        "0.001",
        "--documents",
        "9",
        "--tokens",
        "40",
        "--split",
        "train",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "no threshold holds disagreement at 0.001 with confidence 0.95" in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("exact", [True, False])
def test_agreement_says_where_verify_holds_up_to_rounding(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    monkeypatch.setattr("ease_runtime.ort.load_tests._exact_everywhere", lambda stack: exact)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the sea"}\n')
    command = ["agreement", str(tiny_bundle), "--prompts", str(prompts), "--max-tokens", "5"]
    result = CliRunner().invoke(main, [*command, "--threshold", "0.2", "--catch-up", "verify"])
    assert result.exit_code == 0, result.output
    assert ("verify holds up to rounding here" in result.output) is not exact


def test_agreement_of_verify_and_of_the_others(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"turns": ["And the king went", "x"]}, {"prompt": "the sea"}, {"question": "a voice?"}]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    command = [
        "agreement",
        str(tiny_bundle),
        "--prompts",
        str(prompts),
        "--max-tokens",
        "30",
        "--threshold",
        "0.2",
    ]
    result = CliRunner().invoke(main, [*command, "--catch-up", "verify"])
    assert result.exit_code == 0, result.output
    assert "3 of 3 texts are those of full depth; mean ROUGE-L 1.000" in result.output
    assert "drafts accepted" in result.output
    drafted = CliRunner().invoke(main, [*command, "--draft", "auto", "--json", str(tmp_path / "drafts.json")])
    assert drafted.exit_code == 0, drafted.output
    assert "3 of 3 texts are those of full depth" in drafted.output
    of_all = [one["drafters"] for one in json.loads((tmp_path / "drafts.json").read_text())]
    assert {name for one in of_all for name in one} <= {"exit", "ngram"}
    assert sum(count["judged"] for one in of_all for count in one.values()) > 0
    lossy = CliRunner().invoke(main, [*command, "--json", str(tmp_path / "out.json")])
    assert lossy.exit_code == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["prompt"] for one in found] == ["And the king went", "the sea", "a voice?"]
    assert any(one["first_difference"] is not None and one["rouge_l"] < 1 for one in found)
    prompts.write_text('{"other": 1}\n')
    assert 'line 1: expected "turns" or one of' in CliRunner().invoke(main, command).stderr
