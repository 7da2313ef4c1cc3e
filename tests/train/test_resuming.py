"""What a run that goes on may be asked for: obeyed where it can be, else refused, never ignored."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ease_common.errors import ConfigError, DataError, SettingWarning
from ease_train.data.corpora import load_documents, sum_of
from ease_train.methods.method import GateConfig
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import Recipe
from ease_train.training.gates import GateTrainer
from ease_train.training.optimizer import learning_rate
from ease_train.training.resuming import ResumeOptions
from ease_train.training.trainer import StepEvent, Trainer
from ease_train.training.tune import begin_tuning

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def text(small_corpus: str, tmp_path: Path) -> Path:
    return Path(shutil.copy(small_corpus, tmp_path / "text.txt"))


@pytest.fixture
def begun(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(train={"steps": 4, "save_every": 2, "warmup_steps": 1})


@pytest.fixture
def out(begun: Recipe, text: Path, tmp_path: Path) -> Path:
    """A run of 4 steps that has ended."""
    list(Trainer.begin(begun, str(text), base=begun).fit(tmp_path / "run"))
    return tmp_path / "run"


def steps_of(trainer: Trainer, out: Path) -> list[StepEvent]:
    return [event for event in trainer.fit(out) if isinstance(event, StepEvent)]


def test_the_checkpoint_knows_its_text(out: Path, text: Path) -> None:
    sums = {split: sum_of(load_documents(str(text), split)) for split in ("train", "validation")}
    assert json.loads((out / "config.json").read_text())["data_sha256"] == sums
    assert load_checkpoint(out).data_sha256 == sums
    assert load_checkpoint(out).num_documents == {
        split: len(load_documents(str(text), split)) for split in sums
    }


def test_more_steps_follow_the_longer_schedule(out: Path, begun: Recipe) -> None:
    longer = replace(begun.train, steps=8)
    rates = [learning_rate(3, begun.train), learning_rate(4, longer)]
    said = f"those of 8 steps, not 4: the learning rate was {rates[0]:.3g}, and is {rates[1]:.3g} at step 5"
    with pytest.warns(SettingWarning, match=said):
        trainer = Trainer.resume(out, asked=ResumeOptions({"steps": 8}))
    found = steps_of(trainer, out)
    assert [(event.step, event.learning_rate) for event in found] == [
        (step + 1, learning_rate(step, longer)) for step in range(4, 8)
    ]
    assert load_checkpoint(out).recipe == replace(load_checkpoint(out).recipe, train=longer)
    assert Trainer.resume(out, asked=ResumeOptions({"steps": 8})).ended
    with pytest.raises(ConfigError, match=r"--steps 6: the run at .* has 8 steps already; expected more"):
        Trainer.resume(out, asked=ResumeOptions({"steps": 6}))


@pytest.mark.filterwarnings("ignore::ease_common.errors.SettingWarning")
def test_a_moved_text_is_the_same_text(out: Path, text: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out, elsewhere)
    here = steps_of(Trainer.resume(out, asked=ResumeOptions({"steps": 6})), out)
    moved = tmp_path / "moved.txt.gz"
    moved.write_bytes(gzip.compress(text.read_bytes()))
    text.unlink()
    with pytest.raises(DataError, match=r"no data file at .*text\.txt; say with --data where it is"):
        Trainer.resume(out)
    there = steps_of(Trainer.resume(elsewhere, asked=ResumeOptions({"steps": 6}, str(moved))), elsewhere)
    assert [(e.step, e.loss) for e in here] == [(e.step, e.loss) for e in there]
    assert load_checkpoint(elsewhere).data == str(moved)
    assert Trainer.resume(elsewhere).ended
    for name, value in load_checkpoint(out).model.state_dict().items():
        assert torch.equal(value, load_checkpoint(elsewhere).model.state_dict()[name])


def test_other_text_is_refused(out: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("the", "hte"))
    refusal = (
        r"\(train\) holds other text than this checkpoint was trained on: its sha256 is .*…, expected .*…; "
        r"say with --data"
    )
    with pytest.raises(DataError, match=r"other\.txt " + refusal):
        Trainer.resume(out, asked=ResumeOptions(data=str(other)))
    shutil.copy(other, text)
    checkpoint = load_checkpoint(out)
    with pytest.raises(DataError, match=r"text\.txt " + refusal):
        Trainer.resume(out)
    with pytest.raises(DataError, match=refusal):
        begin_tuning(checkpoint, checkpoint.recipe, {})
    with pytest.raises(DataError, match=refusal):
        GateTrainer(checkpoint, GateConfig(steps=1))
    assert (
        begin_tuning(checkpoint, checkpoint.recipe, {}, str(text)).checkpoint.data_sha256
        != checkpoint.data_sha256
    )
    assert (
        GateTrainer(checkpoint, GateConfig(steps=1), str(text)).checkpoint.data_sha256
        == checkpoint.data_sha256
    )


def test_an_older_checkpoint_takes_the_text_that_it_is_given(out: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    del config["data_sha256"], config["base"]
    (out / "config.json").write_text(json.dumps(config))
    assert Trainer.resume(out).checkpoint.data_sha256
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.warns(
        SettingWarning,
        match=r"does not know the sum of its text; .*moved\.txt is taken for what it calls .*text\.txt",
    ):
        assert Trainer.resume(out, asked=ResumeOptions(data=str(moved))).checkpoint.data == str(moved)


def test_another_recipe_is_refused(out: Path, begun: Recipe) -> None:
    assert Trainer.resume(out, asked=ResumeOptions(recipe=begun)).ended
    with pytest.raises(
        ConfigError, match=r"follows the recipe tiny, not small; .*: ease-train fit --out .* --resume"
    ):
        Trainer.resume(out, asked=ResumeOptions(recipe=replace(begun, name="small")))
    with pytest.raises(
        ConfigError,
        match=r"tiny has changed since .* began \(train: batch_size = 3, was 2\); leave the recipe out",
    ):
        Trainer.resume(out, asked=ResumeOptions(recipe=begun.with_options({"batch_size": 3})))


def test_other_settings_are_refused_and_the_same_are_not(out: Path) -> None:
    assert Trainer.resume(
        out, asked=ResumeOptions({"batch_size": 2, "dim": 16, "ffn_dim": 32, "exits": (2, 3), "kind": "char"})
    ).ended
    with pytest.raises(
        ConfigError, match=r"only --steps may differ \(train: seed = 7, was 42\); leave the option out"
    ):
        Trainer.resume(out, asked=ResumeOptions({"seed": 7, "batch_size": 2}))
    with pytest.raises(ConfigError, match=r"model: dim = 32, was 16"):
        Trainer.resume(out, asked=ResumeOptions({"dim": 32}))
