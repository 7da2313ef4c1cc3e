"""Tuning: a trained model keeps its weights and gets exits, which start from its own parts and learn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ease_common.errors import ConfigError, DataError
from ease_train.cli import main
from ease_train.convert.text_format import TextFormat
from ease_train.training.checkpoint import Checkpoint, load_checkpoint
from ease_train.training.config import Recipe, load_recipe
from ease_train.training.renames import renamed
from ease_train.training.trainer import StepEvent, Trainer
from ease_train.training.tune import begin_tuning, tuned_recipe

Maker = Callable[..., Recipe]
QUICK = {
    "steps": 30,
    "batch_size": 4,
    "sequence_length": 16,
    "warmup_steps": 2,
    "eval_tokens": 64,
    "save_every": 30,
    "learning_rate": 0.02,
}
TO_2 = {**QUICK, "exits": [2], "layer_weights": {2: 1.0}}


@pytest.fixture
def plain(make_recipe: Maker, small_corpus: str, tmp_path: Path) -> Path:
    """A model without early exits, trained a little."""
    recipe = make_recipe(
        model={"exits": [4]},
        train={"layer_weights": {4: 1.0}, "learning_rate": 0.02, "steps": 40, "save_every": 40},
    )
    for _ in Trainer.begin(recipe, small_corpus).fit(tmp_path / "plain"):
        pass
    return tmp_path / "plain"


def test_a_frozen_model_gets_exits_that_learn(plain: Path, tmp_path: Path) -> None:
    trainer = begin_tuning(load_checkpoint(plain), load_recipe("ee-tuning"), TO_2)
    steps = [event for event in trainer.fit(tmp_path / "tuned") if isinstance(event, StepEvent)]
    assert sum(s.loss for s in steps[-5:]) < sum(s.loss for s in steps[:5])
    before = load_checkpoint(plain)
    after = load_checkpoint(tmp_path / "tuned")
    weights = after.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.model.state_dict().items())
    assert {name.split(".")[2] for name in weights.keys() - before.model.state_dict().keys()} == {
        "norm",
        "adapter",
    }
    assert (after.recipe.model.exits, after.recipe.model.dim, after.step) == ((2, 4), 16, 30)
    assert after.tokenizer.to_str() == before.tokenizer.to_str()


def test_new_exits_start_as_the_models_own_parts(plain: Path) -> None:
    trained = load_checkpoint(plain)
    with torch.no_grad():
        trained.model.norm.weight.uniform_(0.5, 1.5)
    model = begin_tuning(trained, load_recipe("ee-tuning"), {**TO_2, "exit_head": "own"}).model
    hidden = torch.randn(3, 16)
    expected = trained.model.lm_head(trained.model.norm(hidden))
    torch.testing.assert_close(model.exit(2).head(model.exit_hidden(hidden, 2)), expected)
    assert model.exit(2).head.weight is not model.lm_head.weight


def test_a_new_exits_block_is_the_layer_that_follows_and_its_head_the_rows_of_frequent_tokens(
    plain: Path, tmp_path: Path
) -> None:
    trained = load_checkpoint(plain)
    options = {**TO_2, "exit_adapter": "block", "exit_head": "reduced", "exit_vocab_size": 7}
    trainer = begin_tuning(trained, load_recipe("ee-tuning"), options)
    model = trainer.model
    block = model.exit(2).block
    assert block is not None
    assert all(
        torch.equal(value, trained.model.layers[2].state_dict()[name])
        for name, value in block.state_dict().items()
    )
    counts = (
        torch.from_numpy(trainer.blocks[:, :-1].copy())
        .flatten()
        .bincount(minlength=trained.recipe.model.vocab_size)
    )
    outside = torch.ones(len(counts), dtype=torch.bool).index_fill(0, model.reduced_head.ids, False)
    assert len(model.reduced_head.ids) == 7
    assert model.reduced_head.ids.tolist() == sorted(model.reduced_head.ids.tolist())
    assert counts[model.reduced_head.ids].min() >= counts[outside].max() > 0
    assert torch.equal(model.exit(2).head.known.weight, trained.model.lm_head.weight[model.reduced_head.ids])
    counted = tmp_path / "counted.jsonl"
    counted.write_text('{"text": "etetetet et"}\n' * 20)
    elsewhere = begin_tuning(
        trained, load_recipe("ee-tuning"), {**options, "exit_vocab_size": 2}, counted=str(counted)
    ).model
    assert elsewhere.reduced_head.ids.tolist() == sorted(
        trained.tokenizer.token_to_id(letter) for letter in "et"
    )
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {part.split(".adapter.")[0] for part in learns} == {
        "exits.2.norm.weight",
        "exits.2",
        "reduced_head.known.weight",
        "reduced_head.rest.weight",
    }
    kept = begin_tuning(trained, load_recipe("ee-tuning"), {**options, "trains": "adapters"}).model
    still = {name for name, p in kept.named_parameters() if p.requires_grad}
    assert still == learns - {"reduced_head.known.weight"}


def test_a_reduced_head_that_is_there_keeps_its_tokens(
    recipe: Recipe, make_recipe: Maker, small_corpus: str
) -> None:
    fields = {"exit_head": "reduced", "exit_vocab_size": 7}
    checkpoint = Trainer.begin(make_recipe(model=fields), small_corpus).checkpoint
    before = checkpoint.model.reduced_head.ids.clone()
    with torch.no_grad():
        checkpoint.model.reduced_head.ids.copy_(torch.arange(7))
        checkpoint.model.reduced_head.known.weight.fill_(0.5)
    options = {**TO_2, **fields, "exits": [2, 3]}
    model = begin_tuning(checkpoint, load_recipe("ee-tuning"), options).model
    assert before.tolist() != model.reduced_head.ids.tolist() == [*range(7)]
    assert (model.reduced_head.known.weight == 0.5).all()
    larger = begin_tuning(checkpoint, load_recipe("ee-tuning"), {**options, "exit_vocab_size": 8}).model
    assert torch.equal(
        larger.reduced_head.known.weight, checkpoint.model.lm_head.weight[larger.reduced_head.ids]
    )


def test_exits_that_are_there_keep_what_they_learned(recipe: Recipe, small_corpus: str) -> None:
    checkpoint: Checkpoint = Trainer.begin(recipe, small_corpus).checkpoint
    with torch.no_grad():
        checkpoint.model.exit(2).norm.weight.fill_(3.0)
        checkpoint.model.norm.weight.fill_(2.0)
    options = {**QUICK, "exits": [1, 2, 3], "layer_weights": {1: 1.0, 4: 1.0}}
    model = begin_tuning(checkpoint, load_recipe("small"), options).model
    assert [model.exit(layer).norm.weight[0].item() for layer in (1, 2)] == [2.0, 3.0]
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
    with pytest.raises(
        ConfigError, match="the exits have no norm, adapter or head of their own; set exit_adapter = 'mlp'"
    ):
        begin_tuning(
            load_checkpoint(plain),
            load_recipe("ee-tuning"),
            {**TO_2, "exit_adapter": "none", "exit_norm": "shared"},
        )


def test_the_command(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    numbers = "--exits 2 --layer-weights 2 1 --steps 2 --warmup-steps 1 --batch-size 2 --sequence-length 16"
    numbers += " --save-every 2 --eval-tokens 32 --threads 1"
    result = CliRunner().invoke(main, ["tune", str(plain), "--out", str(out), *numbers.split()])
    assert result.exit_code == 0, result.output
    assert load_checkpoint(out, resume=True).recipe.method.trains == "exits"
    assert list(Trainer.resume(out).fit(out)) == []
    assert CliRunner().invoke(main, ["tune", str(plain), "--out", str(out)]).exit_code == 1


SKIP = {**QUICK, "exits": [2, 3], "steps": 6, "save_every": 3, "learning_rate": 0.01}


def test_low_rank_updates_start_at_nothing_and_are_saved_as_plain_weights(
    plain: Path, tmp_path: Path
) -> None:
    trainer = begin_tuning(
        load_checkpoint(plain), load_recipe("layerskip-tuning"), {**SKIP, "lora_rank": 2, "exit_norm": "own"}
    )
    before = load_checkpoint(plain).model
    model = trainer.model
    ids = torch.randint(20, (2, 9))
    torch.testing.assert_close(model(ids), before(ids))
    learns = {
        name.split(".")[-1] if ".update." in name else name
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert learns == {"down", "up", "exits.2.norm.weight", "exits.3.norm.weight"}
    for _ in trainer.fit(tmp_path / "tuned"):
        pass
    after = load_checkpoint(tmp_path / "tuned").model
    torch.testing.assert_close(after(ids), model.eval()(ids))
    weights = after.state_dict()
    were = before.state_dict()
    changed = {name for name, value in were.items() if not torch.equal(value, weights[name])}
    assert changed == {name for name in were if name.startswith("layers.") and "norm" not in name}
    for name in changed:
        assert torch.linalg.matrix_rank(weights[name] - were[name], rtol=1e-3) <= 2


def test_updates_of_low_rank_were_called_otherwise_before() -> None:
    before = "layers.0.mlp.up_proj.parametrizations.weight."
    names = [before + "original", before + "0.down", before + "0.up", "exits.2.norm.weight"]
    matrix = "layers.0.mlp.up_proj."
    now = [matrix + "weight", matrix + "update.down", matrix + "update.up", "exits.2.norm.weight"]
    assert [*renamed(dict.fromkeys(names))] == now


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"lora_rank": 2, "patience": 5, "eval_every": 2}])
def test_layerskip_tuning_resumes_to_the_bit(plain: Path, tmp_path: Path, options: dict[str, int]) -> None:
    def begin() -> Trainer:
        return begin_tuning(load_checkpoint(plain), load_recipe("layerskip-tuning"), {**SKIP, **options})

    whole = [event for event in begin().fit(tmp_path / "whole") if isinstance(event, StepEvent)]
    parts = begin().fit(tmp_path / "parts")
    while (tmp_path / "parts").exists() is False:
        next(parts)
    parts.close()
    again = [
        event
        for event in Trainer.resume(tmp_path / "parts").fit(tmp_path / "parts")
        if isinstance(event, StepEvent)
    ]
    assert [(event.step, event.loss) for event in again] == [(event.step, event.loss) for event in whole[3:]]
    one, other = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_low_rank_updates_of_frozen_layers_are_a_contradiction(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="lora updates the layers, which trains = 'exits' freezes"):
        tuned_recipe(recipe, load_recipe("ee-tuning"), {**TO_2, "lora_rank": 4})


def test_a_model_without_a_token_between_texts_is_told_so(plain: Path, small_corpus: str) -> None:
    checkpoint = load_checkpoint(plain)
    bare = replace(checkpoint, text_format=TextFormat(None, ()))
    with pytest.raises(DataError, match=r"no token that begins or ends a text.*eos_token in"):
        begin_tuning(bare, load_recipe("ee-tuning"), TO_2, small_corpus)
