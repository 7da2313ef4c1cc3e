"""Bundles of every family, in each precision and of either cache: verified, and fp32's greedy tokens those of
transformers, past every window and every rotated part.
"""

from pathlib import Path

import pytest
import torch

import source_models
from ease_export.build import export_bundle
from ease_export.verify import greedy, verify_bundle
from ease_runtime.ort.stack import OrtStack
from ease_train.convert.huggingface import import_model
from ease_train.training.checkpoint import save_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
PROMPT = [2, 47, 92, 137, 182, 227, 272, 317]
NUM_TOKENS = 40
FAMILIES = ("smollm3", "phi3", "phi4", "pythia", "gemma3", "windowed qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundle_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    reference = source_models.make_model(family)
    folder = source_models.write_model(reference, tmp_path / "hf")
    save_checkpoint(import_model(str(folder), (2,)), tmp_path / "checkpoint")
    for precision in ("fp32", "int8", "int4"):
        export_bundle(tmp_path / "checkpoint", tmp_path / precision, precision)
        report = verify_bundle(tmp_path / precision, tmp_path / "checkpoint", 20)
        assert all(difference.ok for difference in report.differences), report
    expected = reference.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=-1, pad_token_id=0
    )
    found = greedy(OrtStack(tmp_path / "fp32", num_threads=None), PROMPT, NUM_TOKENS)
    assert found == expected[0, len(PROMPT) :].tolist()


def test_a_window_over_a_cache_in_the_layout_of_cuda(tmp_path: Path) -> None:
    folder = source_models.write_model(source_models.make_model("gemma3"), tmp_path / "hf")
    save_checkpoint(import_model(str(folder), (2,)), tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "fp32", target="cuda")
    report = verify_bundle(tmp_path / "bundle", tmp_path / "checkpoint", 40)
    assert report.ok, report
