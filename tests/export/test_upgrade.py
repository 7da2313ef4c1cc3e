"""Bundles of an older format: refused in a line that names the command, which builds them again from their
checkpoint.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ease_common.errors import BundleError
from ease_export.cli import main
from ease_runtime.bundle.manifest import FORMAT_VERSION, MANIFEST_FILE, load_manifest
from ease_runtime.engine.engine import Engine
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.ort.stack import OrtStack

CANDIDATE = {"thresholds": [None, 0.25], "risk": 0.01, "p_value": 0.01, "mean_depth": 5.0}
CALIBRATION = {
    "policy": "max-prob",
    "catch_up": "recompute",
    "thresholds": [None, 0.25],
    "risk": "disagreement",
    "delta": 0.1,
    "epsilon": 0.1,
    "data": "x",
    "tested": [CANDIDATE],
}
NEW = ("target", "activations", "weights", "cache_layout", "exactness", "drafting_head")


@pytest.fixture
def old(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle as version 4 wrote it, with a calibration, beside its checkpoint."""
    shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    edit(bundle, format_version=4, calibration=CALIBRATION)
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(
        json.dumps({name: value for name, value in values.items() if name not in NEW})
    )
    return bundle


def edit(bundle: Path, **changes: Any) -> None:
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps(values | changes))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def upgrade(bundle: Path, *flags: str) -> Result:
    return CliRunner().invoke(main, ["upgrade", str(bundle), *flags])


def test_an_older_bundle_is_built_again(old: Path, tiny_bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=f"this runtime reads {FORMAT_VERSION}; .*: ease-export upgrade {old}$"
    ):
        load_manifest(old)
    result = upgrade(old)
    assert result.exit_code == 0, result.output
    assert "its calibration is kept" in result.output
    found = load_manifest(old)
    fresh = load_manifest(tiny_bundle)
    assert found.calibration == {
        **CALIBRATION,
        "thresholds": "off,0.25",
        "tested": [{**CANDIDATE, "thresholds": "off,0.25"}],
    }
    assert (found.precision, found.segments, found.exits, found.weights) == (
        fresh.precision,
        fresh.segments,
        fresh.exits,
        fresh.weights,
    )
    sequence = LLM(old).submit("And the king", Options(max_tokens=2)).choices[0].sequence
    assert str(sequence.decision.policy.thresholds) == "off,0.25"
    before = content(old)
    again = upgrade(old)
    assert again.exit_code == 0
    assert "already" in again.output
    assert content(old) == before


def test_what_export_writes_is_true(tiny_bundle: Path) -> None:
    found = load_manifest(tiny_bundle)
    assert (found.target, found.cache_layout, found.exactness, found.drafting_head) == (
        "cpu",
        "BGTP",
        "bits",
        None,
    )
    assert (found.weights.bits, found.weights.block, found.weights.symmetric, found.weights.exact_grid) == (
        32,
        None,
        False,
        False,
    )
    assert LLM(tiny_bundle).stack.exact


def test_a_checkpoint_that_is_gone_or_another_is_one_line(
    old: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    checkpoint = tmp_path / tiny_checkpoint.name
    before = content(old)
    away = checkpoint.rename(tmp_path / "away")
    result = upgrade(old)
    assert result.exit_code == 1
    assert (
        f"which is not at {checkpoint}; say where it is: ease-export upgrade {old} --checkpoint CHECKPOINT"
        in result.stderr
    )
    with (away / "model.safetensors").open("ab") as file:
        file.write(b" ")
    other = upgrade(old, "--checkpoint", str(away))
    assert other.exit_code == 1
    assert f"{away} is not what {old} was built from: its model.safetensors differs" in other.stderr
    assert [one.stderr.count("\n") for one in (result, other)] == [1, 1]
    assert content(old) == before


def test_a_calibration_of_other_exits_is_not_kept(old: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    edit(old, calibration={**CALIBRATION, "thresholds": [0.1, 0.2, 0.3]})
    away = (tmp_path / tiny_checkpoint.name).rename(tmp_path / "away")
    result = upgrade(old, "--checkpoint", str(away))
    assert result.exit_code == 0, result.output
    assert f"find thresholds again: ease-eval calibrate {old}" in result.stderr
    assert load_manifest(old).calibration == {}


def test_no_bundle_is_one_line(tmp_path: Path) -> None:
    result = upgrade(tmp_path)
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"error: no bundle at {tmp_path}; make one: ease-export build CHECKPOINT {tmp_path}\n"
    )


def test_a_bundle_of_the_layout_of_before_runs_and_is_built_again(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Version 5 began with one layout for both targets. It says what the new one says, to the bit."""
    shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    bundle = tmp_path / "bundle"
    built = CliRunner().invoke(
        main, ["build", str(tmp_path / tiny_checkpoint.name), str(bundle), "--target", "cuda"]
    )
    assert (built.exit_code, "for cuda" in built.output) == (0, True), built.output
    edit(bundle, target="cpu", num_kv_heads=None)
    said = []
    for path in (bundle, tiny_bundle):
        engine = Engine(OrtStack(path))
        tokens = engine.generate(engine.start([3, 5, 8], max_new_tokens=40))
        said.append([(token.id, token.logprob) for token in tokens])
    assert said[0] == said[1]
    assert len({token for token, _ in said[0]}) > 3
    assert upgrade(bundle).exit_code == 0
    assert load_manifest(bundle).cache_layout == "BGTP"
    refused = CliRunner().invoke(
        main,
        ["build", str(tiny_checkpoint), str(bundle), "--precision", "fp16", "--target", "cpu"],
    )
    assert (refused.exit_code, "choose --target cuda" in refused.output) == (1, True), refused.output
