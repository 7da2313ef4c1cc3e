"""LoRA folders of peft: merged as peft defines it, or refused in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import source_models
from ease_common.errors import ModelImportError
from ease_train.cli import main
from ease_train.convert.huggingface import import_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
RANK = 3
Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.2.mlp.up_proj"
QKV = "gpt_neox.layers.1.attention.query_key_value"


def write_adapter(
    folder: Path, model: Any, modules: tuple[str, ...], extra: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """A folder as peft saves it, of random changes; `extra` are tensors beside."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = dict[str, torch.Tensor]()
    torch.manual_seed(5)
    for module in modules:
        height, width = model.get_submodule(module).weight.shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, width) / 10
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(height, RANK) / 10
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    for module in modules:
        down, up = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        model.get_submodule(module).update = up @ down
    return folder


@pytest.mark.parametrize(
    ("family", "settings", "scales"),
    [
        ("llama2", {}, {Q: 4.0, UP: 4.0}),
        ("llama2", {"use_rslora": True}, {Q: 12 / 3**0.5, UP: 12 / 3**0.5}),
        ("llama2", {"alpha_pattern": {"up_proj": 6}}, {Q: 4.0, UP: 2.0}),
        ("pythia", {}, {QKV: 4.0}),
    ],
    ids=["plain", "by the root of the rank", "an alpha of its own", "fused"],
)
def test_changes_are_merged(
    family: str, settings: dict[str, Any], scales: dict[str, float], tmp_path: Path
) -> None:
    model = source_models.make_model(family)
    source_models.write_model(model, tmp_path / "hf")
    write_adapter(tmp_path / "lora", model, tuple(scales), **settings)
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        before = model(ids).logits
        for module, scale in scales.items():
            model.get_submodule(module).weight += scale * model.get_submodule(module).update
        expected = model(ids).logits
        found = import_model(str(tmp_path / "hf"), (2,), adapter=tmp_path / "lora").model(ids)
    largest = expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * largest
    assert (found - expected).abs().max() <= 1e-4 * largest


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "of the kind 'IA3', expected LORA"),
    "directions": ({"use_dora": True}, "use_dora = True, which is not merged here; merge it with peft"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "no alpha": ({"lora_alpha": None}, "an alpha of None, expected a number"),
    "patterns": ({"alpha_pattern": {"(a+)+": 2}}, "alpha_pattern"),
    "half a pair": (
        {"extra": {"x.lora_A.weight": torch.zeros(3, 4)}},
        r"holds x\.lora_A\.weight, expected pairs",
    ),
    "NaN": (
        {"extra": {f"base_model.model.{UP}.lora_{k}.weight": torch.full((3, 3), float("nan")) for k in "AB"}},
        "not finite",
    ),
    "no such tensor": (
        {"extra": {f"base_model.model.other.lora_{k}.weight": torch.zeros(3, 3) for k in "AB"}},
        r"changes 1 tensors that the model has not, the first is other\.weight",
    ),
    "another shape": (
        {"extra": {f"base_model.model.{UP}.lora_{k}.weight": torch.zeros(3, 3) for k in "AB"}},
        "the adapter belongs to another model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_low_rank_change_is_refused(case: str, tmp_path: Path) -> None:
    model = source_models.make_model("llama2")
    source_models.write_model(model, tmp_path / "hf")
    settings, message = REFUSED[case]
    write_adapter(tmp_path / "lora", model, (Q,), **settings)
    with pytest.raises(ModelImportError, match=message):
        import_model(str(tmp_path / "hf"), adapter=tmp_path / "lora")


def test_the_command(tmp_path: Path) -> None:
    model = source_models.make_model("llama2")
    folder = source_models.write_model(model, tmp_path / "hf")
    write_adapter(tmp_path / "lora", model, (Q,))
    arguments = ["import", str(folder), "--out", str(tmp_path / "checkpoint"), "--adapter"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "nowhere")])
    assert (result.exit_code, "is no adapter of peft: adapter_config.json is missing" in result.output) == (
        1,
        True,
    )
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "lora")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        main, ["import", "x.gguf", "--out", str(tmp_path / "other"), "--adapter", "lora"]
    )
    assert (result.exit_code, "give a directory, not x.gguf" in result.output) == (1, True)
