"""Exit heads: norms, adapters, tied and own heads, and what of them a checkpoint keeps."""

from pathlib import Path

import pytest
import torch

from ease_train.config import ModelConfig, Recipe
from ease_train.errors import ConfigError
from ease_train.exits import Gate, LowRankAdapter, MLPAdapter
from ease_train.losses import Objective, exit_loss
from ease_train.model import Decoder


def make(**fields: object) -> Decoder:
    values = {"vocab_size": 13, "dim": 32, "num_layers": 4, "exits": [1, 3, 4], "tie_embeddings": False, **fields}
    return Decoder(ModelConfig.from_dict(values, "test"))


def names(model: Decoder) -> set[str]:
    return {name for name in model.state_dict() if not name.startswith(("layers", "embed", "norm", "lm_head"))}


def test_what_each_kind_adds_to_the_weights() -> None:
    assert names(make(exit_norm="shared")) == set()
    assert names(make()) == {"exit_norms.1.weight", "exit_norms.3.weight"}
    low_rank = {f"adapters.{layer}.{part}.weight" for layer in (1, 3) for part in ("down", "up")}
    assert names(make(exit_norm="shared", exit_adapter="low-rank")) == low_rank
    mlp = {f"adapters.{layer}.norm.weight" for layer in (1, 3)}
    assert names(make(exit_norm="shared", exit_adapter="mlp")) == low_rank | mlp
    assert names(make(exit_norm="shared", exit_head="own")) == {"exit_heads.1.weight", "exit_heads.3.weight"}
    assert names(make(exit_norm="shared", gates=[3])) == {"gates.3.score.out.weight", "gates.3.score.out.bias", "gates.3.temperature"}


@pytest.mark.parametrize("kind", ["low-rank", "mlp"])
def test_an_adapter_is_the_identity_until_it_learns(kind: str) -> None:
    model, x = make(exit_adapter=kind, adapter_dim=5), torch.randn(2, 3, 32)
    adapter = model.adapters["3"]
    assert isinstance(adapter, LowRankAdapter | MLPAdapter)
    assert adapter.down.weight.shape == (5, 32)
    assert torch.equal(adapter(x), x)
    assert torch.equal(model.exit_hidden(x, 3), model.exit_norms["3"](x))


def test_an_adapter_stands_before_the_norm() -> None:
    model, x = make(exit_adapter="low-rank"), torch.randn(5, 32)
    adapter = model.adapters["1"]
    with torch.no_grad():
        adapter.up.weight.normal_()
        model.exit_norms["1"].weight.uniform_(0.5, 1.5)
        changed = x + x @ adapter.down.weight.T @ adapter.up.weight.T
        expected = changed / (changed.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * model.exit_norms["1"].weight
        torch.testing.assert_close(model.exit_module(1)(x), expected)
        torch.testing.assert_close(model.exit_hidden(x, 4), model.norm(x))


def test_the_mlp_adapters_formula() -> None:
    model, x = make(exit_adapter="mlp"), torch.randn(5, 32) * 100
    adapter = model.adapters["1"]
    with torch.no_grad():
        adapter.up.weight.normal_()
        normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        inner = normed @ adapter.down.weight.T
        torch.testing.assert_close(adapter(x), x + (inner * torch.sigmoid(inner)) @ adapter.up.weight.T)


def test_heads_are_shared_or_own() -> None:
    tied, own = make(), make(exit_head="own")
    assert all(tied.head(layer) is tied.lm_head for layer in (1, 3, 4))
    assert own.head(4) is own.lm_head
    assert len({id(own.head(layer).weight) for layer in (1, 3, 4)}) == 3
    assert own.head(1).weight.shape == (13, 32)


def test_an_own_head_learns_from_its_exit_alone() -> None:
    model = make(exit_head="own")
    ids = torch.randint(13, (2, 6))
    exit_loss(model, ids[:, :-1], ids[:, 1:], Objective({1: 1.0, 4: 0.0}))[0].backward()
    assert model.exit_heads["1"].weight.grad.abs().sum() > 0
    assert model.exit_heads["3"].weight.grad is None
    assert model.lm_head.weight.grad is None


def test_a_gate_is_a_probability_with_a_temperature() -> None:
    gate, x = Gate(32, 8), torch.randn(7, 32)
    with torch.no_grad():
        logits = gate.score(x)
        assert logits.shape == (7,)
        gate.temperature.fill_(2.5)
        torch.testing.assert_close(gate(x), 1 / (1 + torch.exp(-logits / 2.5)))
        linear = Gate(32, 0)
        torch.testing.assert_close(linear.score(x), x @ linear.score.out.weight[0] + linear.score.out.bias)


def test_all_of_it_survives_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    from ease_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from ease_train.tokens import train_tokenizer

    tokenizer = train_tokenizer(["abc"], recipe.tokenizer)
    more = {"vocab_size": tokenizer.get_vocab_size(), "exit_adapter": "mlp", "exit_head": "own", "gates": [2], "routed_layers": [3]}
    recipe = Recipe.from_dict({**recipe.to_dict(), "model": {**recipe.model.to_dict(), **more}}, "t")
    model = Decoder(recipe.model)
    with torch.no_grad():
        model.gates["2"].temperature.fill_(1.7)
    save_checkpoint(Checkpoint(recipe, model, tokenizer, 0, "x"), tmp_path / "c")
    after = load_checkpoint(tmp_path / "c")
    assert after.recipe == recipe
    assert after.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, after.model.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_adapter": "lowrank"}, "exit_adapter = 'lowrank'; did you mean 'low-rank'?"),
        ({"exit_head": "tie"}, "exit_head = 'tie'; did you mean 'tied'?"),
        ({"gates": [2]}, "gates = [2], expected early exits: [1, 3]"),
        ({"gates": [4]}, "gates = [4], expected early exits: [1, 3]"),
        ({"routed_layers": [5]}, "routed_layers = [5], expected layers from 1 to 4"),
        ({"capacity": 0.0}, "capacity = 0.0, expected a share above 0 and up to 1"),
    ],
)
def test_wrong_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert message in str(error.value)
