"""Bundles of checkpoints in 16 bits, built weight by weight: those of the same weights in fp32, byte by
byte.
"""

import sys
from pathlib import Path

import pytest
import torch

import source_models
from ease_export.build import export_bundle
from ease_export.gptq import calibration_ids, quantize
from ease_export.verify import verify_bundle
from ease_train.convert.huggingface import import_model
from ease_train.training.checkpoint import load_checkpoint, save_checkpoint
from peak import grown_by

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
KINDS = [("fp32", "cpu"), ("int8", "cpu"), ("int4", "cpu"), ("fp16", "cuda"), ("int4", "cuda")]


@pytest.fixture(scope="module", params=["smollm2", "gemma3", "pythia"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in bf16, and the same in fp32."""
    folder = tmp_path_factory.mktemp("narrow")
    model = source_models.make_model(request.param).to(torch.bfloat16)
    source_models.write_model(model, folder / "hf")
    import_model(str(folder / "hf"), (2,), out=folder / "narrow")
    wide = load_checkpoint(folder / "narrow")
    wide.model.float()
    save_checkpoint(wide, folder / "wide")
    return folder / "narrow", folder / "wide"


def files_of(bundle: Path) -> dict[str, bytes]:
    """All but the manifest, which names the checkpoint."""
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize(("precision", "target"), KINDS)
def test_a_bundle_is_that_of_the_wide_checkpoint(
    pair: tuple[Path, Path], precision: str, target: str, tmp_path: Path
) -> None:
    for path in pair:
        export_bundle(path, tmp_path / path.name, precision, target=target)
    narrow, wide = (files_of(tmp_path / path.name) for path in pair)
    assert narrow.keys() == wide.keys()
    assert [name for name in wide if narrow[name] != wide[name]] == []
    if target == "cpu":
        report = verify_bundle(tmp_path / "narrow", pair[0], 16)
        assert all(difference.ok for difference in report.differences), report


def test_gptq_rounds_the_wide_checkpoint_s_numbers(pair: tuple[Path, Path]) -> None:
    loaded = [load_checkpoint(path) for path in pair]
    ids = calibration_ids(loaded[0], None, 512)
    narrow, wide = (quantize(checkpoint, ids)[1] for checkpoint in loaded)
    assert narrow.described.keys() == wide.described.keys()
    for name in narrow.described:
        assert torch.equal(narrow.made(name).float(), wide.made(name).float()), name


SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
PREPARED = """
from pathlib import Path
import torch
from ease_export.build import check_finite
from ease_export.quantize import WeightQuantizer
from ease_export.weights import GraphTensor, WeightFiles
from ease_train.training.checkpoint import load_checkpoint
folder = Path({folder!r})
"""
WRITTEN = """
model = load_checkpoint(folder / "checkpoint").model
check_finite(model, "checkpoint")
quantizer = WeightQuantizer(model, "int8", {})
files = WeightFiles(folder)
for matrix in quantizer.matrices:
    weight = GraphTensor.of_weights((matrix.weight,), torch.float32)
    files.tensor("w", weight, "fp32")
    for held in quantizer.held(weight):
        for kind, tensor in held.tensors.items():
            files.tensor(kind, tensor, "int8")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_built_is_made_a_matrix_at_a_time(tmp_path: Path) -> None:
    """Of 134 MB in bf16, 268 in fp32, 75 in int8; the largest matrix has 2. Tracing sees no weights, and is
    left out here.
    """
    model = source_models.make_model("llama2", **SIZES, num_hidden_layers=16).to(torch.bfloat16)
    source_models.write_model(model, tmp_path / "hf")
    import_model(str(tmp_path / "hf"), out=tmp_path / "checkpoint")
    size = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    assert size > 100e6
    assert grown_by(PREPARED.format(folder=str(tmp_path)), WRITTEN) < 100e6
    assert (tmp_path / "fp32").stat().st_size > 1.9 * size
    assert (tmp_path / "int8").stat().st_size > 0.5 * size
