"""Checkpoints of imported models in 16 bits: written weight by weight, mapped when they are read, computed in
fp32. The same model whose weights were widened before says what is right.
"""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import source_models
from ease_common.errors import ModelImportError
from ease_train.convert.huggingface import export_model, import_model
from ease_train.methods.method import GateConfig
from ease_train.model.blocks import Linear
from ease_train.training.checkpoint import load_checkpoint, save_checkpoint
from ease_train.training.config import load_recipe
from ease_train.training.gates import GateTrainer
from ease_train.training.tensors import Tensors, mapped_tensors, write_tensors
from ease_train.training.trainer import Trainer
from ease_train.training.tune import begin_tuning
from peak import grown_by

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
IDS = torch.arange(2, 50).reshape(2, 24) * 5 % 320
QUICK = {
    "steps": 4,
    "batch_size": 2,
    "sequence_length": 16,
    "warmup_steps": 1,
    "eval_tokens": 64,
    "save_every": 4,
    "learning_rate": 0.02,
    "exits": [2],
    "layer_weights": {2: 1.0},
}
OF_16_BITS = {torch.bfloat16, torch.float16}


def written(family: str, dtype: torch.dtype, folder: Path, shard_size: str = "60KB") -> Path:
    """A directory of transformers' in a type, in shards."""
    return source_models.write_model(
        source_models.make_model(family).to(dtype), folder, shard_size=shard_size
    )


def upcast(path: Path, other: Path) -> Path:
    """The checkpoint at `path` with its weights in fp32."""
    checkpoint = load_checkpoint(path)
    checkpoint.model.float()
    save_checkpoint(checkpoint, other)
    return other


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in bf16, and the same in fp32."""
    folder = tmp_path_factory.mktemp("narrow")
    import_model(str(written("smollm2", torch.bfloat16, folder / "hf")), (2,), out=folder / "narrow")
    return folder / "narrow", upcast(folder / "narrow", folder / "wide")


def kinds_of(weights: dict[str, Tensor], matrices: bool) -> set[torch.dtype]:
    return {value.dtype for value in weights.values() if (value.ndim > 1) == matrices}


@pytest.mark.parametrize(
    ("family", "dtype", "of_norms"),
    [
        ("llama3", torch.bfloat16, {torch.bfloat16}),
        ("llama3", torch.float16, {torch.float16}),
        ("llama3", torch.float32, {torch.float32}),
        ("phi4", torch.bfloat16, {torch.bfloat16}),
        ("pythia", torch.float16, {torch.float16}),
        ("qwen2.5", torch.bfloat16, {torch.bfloat16}),
        ("gemma3", torch.bfloat16, {torch.float32}),  # 1 + w has more digits
    ],
)
def test_an_import_keeps_the_type_and_computes_in_fp32(
    family: str, dtype: torch.dtype, of_norms: set[torch.dtype], tmp_path: Path
) -> None:
    folder = written(family, dtype, tmp_path / "hf")
    without_weights = import_model(str(folder), (2,), out=tmp_path / "checkpoint").model
    assert {value.device.type for value in without_weights.parameters()} == {"meta"}
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert kinds_of(weights, matrices=True) == {dtype}
    assert kinds_of(weights, matrices=False) == of_norms
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_size <= 1.05 * source
    in_memory = import_model(str(folder), (2,)).model.state_dict()
    loaded = load_checkpoint(tmp_path / "checkpoint").model
    assert all(torch.equal(value, in_memory[name]) for name, value in loaded.state_dict().items())
    wide = load_checkpoint(upcast(tmp_path / "checkpoint", tmp_path / "wide")).model
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS), wide(IDS))
        torch.testing.assert_close(loaded(IDS), reference(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["smollm2", "gemma3", "pythia"])
def test_a_model_goes_back_in_its_type(family: str, tmp_path: Path) -> None:
    folder = written(family, torch.bfloat16, tmp_path / "hf", "1GB")
    import_model(str(folder), (2,), out=tmp_path / "checkpoint")
    export_model(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert after.keys() == before.keys()
    assert all(torch.equal(value.float(), before[name].float()) for name, value in after.items())
    assert kinds_of(after, matrices=True) == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.bfloat16


def test_an_import_that_fails_late_leaves_nothing(tmp_path: Path) -> None:
    folder = written("smollm2", torch.bfloat16, tmp_path / "hf", "1GB")
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"][7] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelImportError, match=r"model.norm.weight holds nan at \[7\]"):
        import_model(str(folder), out=tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"exit_head": "reduced", "exit_vocab_size": 40, "distill_weight": 1.0}]
)
def test_exits_are_trained_on_a_frozen_narrow_model(
    pair: tuple[Path, Path], small_corpus: str, options: dict[str, Any], cached: bool, tmp_path: Path
) -> None:
    """They learn what they learn on the wide one, to the bit; its matrices stay mapped, and in bf16."""
    states = []
    for number, path in enumerate(pair):
        cache = tmp_path / f"cache-{number}" if cached else None
        trainer = begin_tuning(
            load_checkpoint(path), load_recipe("ee-tuning"), {**QUICK, **options}, small_corpus, cache=cache
        )
        for _ in trainer.fit(tmp_path / f"tuned-{number}"):
            pass
        states.append(load_checkpoint(tmp_path / f"tuned-{number}").model.state_dict())
    narrow, wide = states
    before = load_checkpoint(pair[0]).model.state_dict()
    for name, value in narrow.items():
        assert torch.equal(value.float(), wide[name].float()), name
        if name in before and not name.startswith("exits."):
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])
    assert {narrow[name].dtype for name in narrow if ".adapter." in name} == {torch.float32}


def test_what_is_trained_is_in_fp32_and_no_one_else_s(
    pair: tuple[Path, Path], small_corpus: str, tmp_path: Path
) -> None:
    given = load_checkpoint(pair[0])
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    trainer = begin_tuning(
        given, load_recipe("standard"), {**QUICK, "exits": [4], "layer_weights": {4: 1.0}}, small_corpus
    )
    for _ in trainer.fit(tmp_path / "trained"):
        pass
    after = load_checkpoint(tmp_path / "trained").model.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert not torch.equal(
        after["layers.0.mlp.up_proj.weight"], before["layers.0.mlp.up_proj.weight"].float()
    )
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


def test_gates_on_a_narrow_model_are_those_of_the_wide_one(
    pair: tuple[Path, Path], small_corpus: str
) -> None:
    settings = GateConfig(steps=3, batch_size=2, eval_tokens=200)
    trainers = [GateTrainer(load_checkpoint(path), settings, small_corpus) for path in pair]
    reports = [list(trainer.fit())[-1] for trainer in trainers]
    assert reports[0] == reports[1]
    assert kinds_of(trainers[0].checkpoint.model.state_dict(), matrices=True) == {
        torch.bfloat16,
        torch.float32,
    }


def test_a_run_with_patience_and_updates_of_low_rank_goes_on(
    pair: tuple[Path, Path], small_corpus: str, tmp_path: Path
) -> None:
    options = {**QUICK, "exits": [2], "lora_rank": 2, "patience": 3, "eval_every": 2}
    base = load_recipe("standard")
    trainer = begin_tuning(
        load_checkpoint(pair[0]), base, {**options, "layer_weights": {2: 0.5, 4: 1.0}}, small_corpus
    )
    for _ in trainer.fit(tmp_path / "tuned"):
        pass
    assert Trainer.resume(tmp_path / "tuned").ended


@pytest.mark.parametrize("bias", [False, True])
def test_a_gradient_passes_a_frozen_matrix_that_nobody_holds_in_fp32(bias: bool) -> None:
    narrow = Linear(48, 32, bias=bias).requires_grad_(False)
    narrow.weight.data = narrow.weight.data.bfloat16()
    wide = deepcopy(narrow).float()
    kept = list[torch.Tensor]()
    x = torch.randn(2, 5, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        product = narrow(x)
    assert {tensor.dtype for tensor in kept if tensor.numel() >= narrow.weight.numel()} == {torch.bfloat16}
    expected = wide(x)
    assert torch.equal(product, expected)
    gradients = [torch.autograd.grad(found.square().sum(), x)[0] for found in (product, expected)]
    torch.testing.assert_close(*gradients)


def test_autocast_multiplies_by_a_frozen_matrix_as_it_is_kept() -> None:
    narrow = Linear(48, 32, bias=True).requires_grad_(False)
    narrow.weight.data = narrow.weight.data.bfloat16()
    wide = deepcopy(narrow).float()
    x = torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        products = narrow(x), wide(x)
    gradients = [torch.autograd.grad(product.float().square().sum(), x)[0] for product in products]
    assert torch.equal(*products)
    assert torch.equal(*gradients)


def test_a_file_is_written_as_safetensors_writes_it(tmp_path: Path) -> None:
    """Any type, and shapes without numbers."""
    tensors = {
        "ids": torch.arange(5),
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(3, 5).half(),
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(4, 3).T,
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "ours", Tensors.of(tensors), {"format": "pt"})
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, tmp_path / "theirs", {"format": "pt"}
    )
    for found in (
        load_file(tmp_path / "ours"),
        mapped_tensors(tmp_path / "ours"),
        load_file(tmp_path / "theirs"),
    ):
        assert found.keys() == tensors.keys()
        for name, value in found.items():
            assert value.dtype == tensors[name].dtype
            assert torch.equal(value, tensors[name])


SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
PREPARED = """
from pathlib import Path
from ease_train.convert.huggingface import import_model
from ease_train.training.checkpoint import load_checkpoint
folder = Path({folder!r})
import_model(str(folder / "tiny"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["smollm2", "phi3"])
def test_an_import_holds_a_weight_at_a_time(family: str, tmp_path: Path) -> None:
    """Of 120 MB in bf16, 240 in fp32; the largest matrix has 2 (of Phi, 4)."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = source_models.make_model(family, **SIZES, **heads).to(torch.bfloat16)
    source_models.write_model(model, tmp_path / "hf")
    written(family, torch.bfloat16, tmp_path / "tiny")
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    code = 'import_model(str(folder / "hf"), (8,), out=folder / "out"); load_checkpoint(folder / "out")'
    assert grown_by(PREPARED.format(folder=str(tmp_path)), code) < size / 4
    assert size > 100e6
