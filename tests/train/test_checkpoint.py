"""A checkpoint is there whole or not at all, and what is wrong with a bad one is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ease_common.errors import CheckpointError
from ease_common.files import written_aside
from ease_train.data.tokens import train_tokenizer
from ease_train.model.decoder import Decoder
from ease_train.training import checkpoint as checkpoint_module
from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ease_train.training.config import Recipe
from ease_train.training.renames import METHOD


@pytest.fixture
def saved(recipe: Recipe, tmp_path: Path) -> Path:
    save_checkpoint(make(recipe, step=3), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def make(recipe: Recipe, step: int, **model: object) -> Checkpoint:
    tokenizer: Tokenizer = train_tokenizer(["abcdefgh"], recipe.tokenizer)
    values = recipe.to_dict()
    values["model"] = {**values["model"], "vocab_size": tokenizer.get_vocab_size(), **model}
    recipe = Recipe.from_dict(values, "tiny")
    state = {"optimizer": {"x": torch.arange(3.0)}, "rng": torch.get_rng_state()}
    return Checkpoint(recipe, Decoder(recipe.model), tokenizer, step, "corpus.txt", [{"step": step}], state)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(recipe: Recipe, tmp_path: Path, tied: bool) -> None:
    before = make(recipe, 5, tie_embeddings=tied)
    save_checkpoint(before, tmp_path / "c")
    after = load_checkpoint(tmp_path / "c", resume=True)
    assert (after.recipe, after.step, after.data, after.metrics) == (
        before.recipe,
        5,
        "corpus.txt",
        [{"step": 5}],
    )
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name]), name
    assert (after.model.lm_head.weight is after.model.embed.weight) == tied
    assert torch.equal(after.train_state["optimizer"]["x"], before.train_state["optimizer"]["x"])
    assert load_checkpoint(tmp_path / "c").train_state is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("culprit", ["write_tensors", "torch.save", "torch.save, wrapped"])
def test_a_full_disk_leaves_the_old_checkpoint(
    recipe: Recipe, saved: Path, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    def full(*_: object) -> None:
        raise (
            RuntimeError("unexpected pos 64 vs 0")
            if "wrapped" in culprit
            else OSError(28, "No space left on device")
        )

    if culprit == "write_tensors":
        monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"could not save step 4 to .*; the checkpoint of before is still at"
    ):
        save_checkpoint(make(recipe, step=4), saved)
    monkeypatch.undo()
    assert load_checkpoint(saved, resume=True).step == 3
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]
    save_checkpoint(make(recipe, step=4), saved)
    assert load_checkpoint(saved).step == 4


def test_a_first_save_that_fails_leaves_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(make(recipe, step=1), tmp_path / "c")
    assert "of before" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_the_two_renames_is_repaired(saved: Path) -> None:
    previous = saved.parent / f".{saved.name}.previous"
    saved.rename(previous)  # what a process killed after the first rename leaves
    (saved.parent / f".{saved.name}.partial").mkdir()
    assert load_checkpoint(saved, resume=True).step == 3
    assert not previous.exists()


def test_a_kill_after_both_renames_keeps_the_new_one(recipe: Recipe, saved: Path) -> None:
    shutil.copytree(saved, saved.parent / f".{saved.name}.previous")
    save_checkpoint(make(recipe, step=9), saved)
    assert load_checkpoint(saved).step == 9
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]


def write_half(final: Path) -> None:
    with written_aside(final) as folder:
        (folder / "a").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt


def test_an_exception_inside_keeps_the_old_directory(tmp_path: Path) -> None:
    final = tmp_path / "d"
    final.mkdir()
    (final / "a").write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        write_half(final)
    assert (final / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*; make one: ease-train fit demo --out"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "train_state/state.pt"]
)
def test_incomplete(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(
        CheckpointError, match=f"is no complete checkpoint: {name} is missing; train it again"
    ):
        load_checkpoint(saved, resume=True)


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def test_newer(saved: Path) -> None:
    edit_config(saved, format_version=99)
    with pytest.raises(
        CheckpointError, match=r"has format_version 99, this version of EASE reads up to 2; update: pip"
    ):
        load_checkpoint(saved)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_config(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "metrics.jsonl", "train_state/state.pt"]
)
def test_damaged_file(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"\x80not this")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint") as error:
        load_checkpoint(saved, resume=True)
    assert "\n" not in str(error.value)


def test_weights_of_another_model(recipe: Recipe, saved: Path, tmp_path: Path) -> None:
    save_checkpoint(make(recipe, 1, exits=[1, 2, 3, 4]), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"weights do not fit the model: missing \[\], unexpected \['exits\.1\.norm\.weight'\]",
    ):
        load_checkpoint(saved)


def test_nothing_is_unpickled(saved: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("opened",))

    torch.save({"optimizer": Trap()}, saved / "train_state" / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(saved, resume=True)


OLD_NAMES = {  # of one exit's weight in format 1
    "exits.2.norm.weight": "exit_norms.2.weight",
    "exits.2.adapter.norm.weight": "adapters.2.norm.weight",
    "exits.2.adapter.down.weight": "adapters.2.down.weight",
    "exits.2.head.weight": "exit_heads.2.weight",
    "exits.2.gate.score.out.weight": "gates.2.score.out.weight",
    "exits.2.gate.temperature": "gates.2.temperature",
    "reduced_head.known.weight": "draft_head.weight",
    "reduced_head.rest.weight": "draft_rest.weight",
    "reduced_head.ids": "draft_ids",
    "reduced_head.log_shares": "draft_log_shares",
}
KINDS: list[dict[str, Any]] = [
    {"exit_adapter": "mlp", "exit_head": "own", "gates": [2]},
    {"exit_adapter": "block", "exit_head": "reduced", "exit_vocab_size": 3},
]


def in_format_1(name: str) -> str:
    if (exact := OLD_NAMES.get(name)) is not None:
        return exact
    _, layer, *rest = name.split(".")
    old = {"norm": "exit_norms", "adapter": "adapters", "head": "exit_heads", "gate": "gates"}
    return ".".join((old[rest[0]], layer, *rest[1:])) if name.startswith("exits.") else name


def write_as_format_1(path: Path) -> None:
    """Turn a checkpoint of today into one of format 1."""
    weights = load_file(path / "model.safetensors")
    save_file({in_format_1(name): value for name, value in weights.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    method = config["recipe"]["method"]
    flat = {old: method[table][name] for old, (table, name) in METHOD.items()}
    tables = {table for table, _ in METHOD.values()}
    config["recipe"]["method"] = {name: value for name, value in method.items() if name not in tables} | flat
    (path / "config.json").write_text(json.dumps({**config, "format_version": 1}))


@pytest.mark.parametrize("kind", KINDS)
def test_format_1_is_read(recipe: Recipe, tmp_path: Path, kind: dict[str, Any]) -> None:
    values = recipe.to_dict()
    values["method"] |= {
        "distill": {"weight": 0.5, "temperature": 3.0},
        "curriculum": {"kind": "rotational", "every": 3},
    }
    before = make(Recipe.from_dict(values, "tiny"), 5, **kind)
    before.train_state["weights"] = {
        in_format_1(name): value for name, value in before.model.state_dict().items()
    }
    save_checkpoint(before, tmp_path / "c")
    write_as_format_1(tmp_path / "c")
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert not [name for name in stored if name.startswith(("exits.", "reduced_head."))]
    assert {*OLD_NAMES.values()} & stored.keys()
    after = load_checkpoint(tmp_path / "c", resume=True)
    assert after.recipe == before.recipe
    for weights in (after.model.state_dict(), after.train_state["weights"]):
        assert weights.keys() == before.model.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in before.model.state_dict().items())


def test_the_shared_exits_have_names_of_today_or_of_format_1() -> None:
    from ease_train.training.renames import renamed

    folder = Path(__file__).parents[2] / "exits" / "smollm2-135m-instruct"
    recipe = Recipe.from_dict(
        {
            k: v
            for k, v in json.loads((folder / "ease.json").read_text()).items()
            if k not in ("step", "figures")
        },
        "x",
    )
    with torch.device("meta"):
        expected = Decoder(recipe.model).exit_state()
    found = renamed(load_file(folder / "ease_exits.safetensors"))
    assert expected.keys() - found.keys() == {"reduced_head.known.weight"}, "its rows are the LM head's"
    assert {name: value.shape for name, value in found.items()} == {
        name: expected[name].shape for name in found
    }
