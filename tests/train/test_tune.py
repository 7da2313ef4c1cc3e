"""Tuning: a trained model keeps its weights and gets exits, which start from its own parts and learn."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ease_train.checkpoint import Checkpoint, load_checkpoint
from ease_train.cli import main
from ease_train.config import Recipe, load_recipe
from ease_train.errors import ConfigError
from ease_train.trainer import StepEvent, Trainer
from ease_train.tune import begin_tuning, tuned_recipe

Maker = Callable[..., Recipe]
QUICK = {"steps": 30, "batch_size": 4, "sequence_length": 16, "warmup_steps": 2, "eval_tokens": 64, "save_every": 30, "learning_rate": 0.02}
TO_2 = {**QUICK, "exits": [2], "layer_weights": {2: 1.0}}


@pytest.fixture
def plain(make_recipe: Maker, small_corpus: str, tmp_path: Path) -> Path:
    """A model without early exits, trained a little."""
    recipe = make_recipe(model={"exits": [4]}, train={"layer_weights": {4: 1.0}, "learning_rate": 0.02, "steps": 40, "save_every": 40})
    for _ in Trainer.begin(recipe, small_corpus).fit(tmp_path / "plain"):
        pass
    return tmp_path / "plain"


def test_a_frozen_model_gets_exits_that_learn(plain: Path, tmp_path: Path) -> None:
    trainer = begin_tuning(load_checkpoint(plain), load_recipe("ee-tuning"), TO_2)
    steps = [event for event in trainer.fit(tmp_path / "tuned") if isinstance(event, StepEvent)]
    assert sum(s.loss for s in steps[-5:]) < sum(s.loss for s in steps[:5])
    before, after = load_checkpoint(plain), load_checkpoint(tmp_path / "tuned")
    weights = after.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.model.state_dict().items())
    assert {name.split(".")[0] for name in weights.keys() - before.model.state_dict().keys()} == {"exit_norms", "adapters"}
    assert (after.recipe.model.exits, after.recipe.model.dim, after.step) == ((2, 4), 16, 30)
    assert after.tokenizer.to_str() == before.tokenizer.to_str()


def test_new_exits_start_as_the_models_own_parts(plain: Path) -> None:
    trained = load_checkpoint(plain)
    with torch.no_grad():
        trained.model.norm.weight.uniform_(0.5, 1.5)
    model = begin_tuning(trained, load_recipe("ee-tuning"), {**TO_2, "exit_head": "own"}).model
    hidden = torch.randn(3, 16)
    expected = trained.model.lm_head(trained.model.norm(hidden))
    torch.testing.assert_close(model.head(2)(model.exit_hidden(hidden, 2)), expected)
    assert model.head(2).weight is not model.lm_head.weight


def test_exits_that_are_there_keep_what_they_learned(recipe: Recipe, small_corpus: str) -> None:
    checkpoint: Checkpoint = Trainer.begin(recipe, small_corpus).checkpoint
    with torch.no_grad():
        checkpoint.model.exit_norms["2"].weight.fill_(3.0)
        checkpoint.model.norm.weight.fill_(2.0)
    options = {**QUICK, "exits": [1, 2, 3], "layer_weights": {1: 1.0, 4: 1.0}}
    model = begin_tuning(checkpoint, load_recipe("small"), options).model
    assert [model.exit_norms[layer].weight[0].item() for layer in ("1", "2")] == [2.0, 3.0]
    assert all(parameter.requires_grad for parameter in model.parameters())  # the recipe trains all


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 32}, "dim = 32 would change the trained model"),
        ({"kind": "bpe"}, "kind = 'bpe' would change the trained model"),
        ({"exitz": [2]}, "unknown field 'exitz'; did you mean 'exits'?"),
        ({"exits": [9]}, "exits = [9], expected layers from 1 to 4"),
        ({"exits": [2], "layer_weights": {3: 1.0}}, "layer_weights names layer 3, which is no exit"),
    ],
)
def test_wrong_options(recipe: Recipe, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tuned_recipe(recipe, load_recipe("ee-tuning"), options)
    assert message in str(error.value)


def test_exits_without_parts_of_their_own_cannot_learn_alone(plain: Path) -> None:
    with pytest.raises(ConfigError, match="the exits have no norm, adapter or head of their own; set exit_adapter = 'mlp'"):
        begin_tuning(load_checkpoint(plain), load_recipe("ee-tuning"), {**TO_2, "exit_adapter": "none", "exit_norm": "shared"})


def test_the_command(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    numbers = "--exits 2 --layer-weights 2 1 --steps 2 --batch-size 2 --sequence-length 16 --save-every 2 --eval-tokens 32 --threads 1"
    result = CliRunner().invoke(main, ["tune", str(plain), "--out", str(out), *numbers.split()])
    assert result.exit_code == 0, result.output
    assert load_checkpoint(out, resume=True).recipe.method.trains == "exits"
    assert list(Trainer.resume(out).fit(out)) == []
    assert CliRunner().invoke(main, ["tune", str(plain), "--out", str(out)]).exit_code == 1
