"""Exit heads: norms, adapters, tied and own heads, and what of them a checkpoint keeps."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_common.errors import ConfigError
from ease_train.methods.losses import Objective, exit_loss, exit_losses
from ease_train.methods.method import Distill
from ease_train.model.blocks import Block
from ease_train.model.decoder import Decoder
from ease_train.model.exits import Gate, LowRankAdapter, MLPAdapter
from ease_train.training.config import ModelConfig, Recipe

BLOCKS = {"exit_adapter": "block", "exit_head": "reduced", "exit_vocab_size": 2}


def make(**fields: object) -> Decoder:
    values = {
        "vocab_size": 13,
        "dim": 32,
        "num_layers": 4,
        "exits": [1, 3, 4],
        "tie_embeddings": False,
        **fields,
    }
    return Decoder(ModelConfig.from_dict(values, "test"))


def names(model: Decoder) -> set[str]:
    return {
        name for name in model.state_dict() if not name.startswith(("layers", "embed", "norm", "lm_head"))
    }


def test_what_each_kind_adds_to_the_weights() -> None:
    assert names(make(exit_norm="shared")) == set()
    assert names(make()) == {"exits.1.norm.weight", "exits.3.norm.weight"}
    low_rank = {f"exits.{layer}.adapter.{part}.weight" for layer in (1, 3) for part in ("down", "up")}
    assert names(make(exit_norm="shared", exit_adapter="low-rank")) == low_rank
    mlp = {f"exits.{layer}.adapter.norm.weight" for layer in (1, 3)}
    assert names(make(exit_norm="shared", exit_adapter="mlp")) == low_rank | mlp
    assert names(make(exit_norm="shared", exit_head="own")) == {"exits.1.head.weight", "exits.3.head.weight"}
    block = {name.removeprefix("layers.0.") for name in make().state_dict() if name.startswith("layers.0.")}
    assert names(make(exit_norm="shared", exit_adapter="block")) == {
        f"exits.{layer}.adapter.{name}" for layer in (1, 3) for name in block
    }
    assert names(make(exit_norm="shared", exit_head="reduced", exit_vocab_size=5)) == {
        "reduced_head.known.weight",
        "reduced_head.rest.weight",
        "reduced_head.ids",
        "reduced_head.log_shares",
    }
    assert names(make(exits=[4], exit_head="reduced", exit_vocab_size=5)) == set()
    assert names(make(exit_norm="shared", gates=[3])) == {
        "exits.3.gate.score.out.weight",
        "exits.3.gate.score.out.bias",
        "exits.3.gate.temperature",
    }


@pytest.mark.parametrize("kind", ["low-rank", "mlp"])
def test_an_adapter_is_the_identity_until_it_learns(kind: str) -> None:
    model = make(exit_adapter=kind, adapter_dim=5)
    x = torch.randn(2, 3, 32)
    adapter = model.exit(3).adapter
    assert isinstance(adapter, LowRankAdapter | MLPAdapter)
    assert adapter.down.weight.shape == (5, 32)
    assert torch.equal(adapter(x), x)
    assert torch.equal(model.exit_hidden(x, 3), model.exit(3).norm(x))


def test_an_adapter_stands_before_the_norm() -> None:
    model = make(exit_adapter="low-rank")
    x = torch.randn(5, 32)
    adapter = model.exit(1).adapter
    with torch.no_grad():
        adapter.up.weight.normal_()
        model.exit(1).norm.weight.uniform_(0.5, 1.5)
        changed = x + x @ adapter.down.weight.T @ adapter.up.weight.T
        expected = changed / (changed.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * model.exit(1).norm.weight
        torch.testing.assert_close(model.exit(1).tokenwise()(x), expected)
        torch.testing.assert_close(model.exit_hidden(x, 4), model.norm(x))


def test_the_mlp_adapters_formula() -> None:
    model = make(exit_adapter="mlp")
    x = torch.randn(5, 32) * 100
    adapter = model.exit(1).adapter
    with torch.no_grad():
        adapter.up.weight.normal_()
        normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        inner = normed @ adapter.down.weight.T
        torch.testing.assert_close(adapter(x), x + (inner * torch.sigmoid(inner)) @ adapter.up.weight.T)


def test_an_exits_block_is_a_layer_before_its_norm() -> None:
    model = make(exit_adapter="block")
    x = torch.randn(2, 5, 32)
    block = model.exit(3).block
    assert isinstance(block, Block)
    assert model.exit(4).block is None
    assert model.exit(3).tokenwise() is model.exit(3).norm
    torch.testing.assert_close(model.exit_hidden(x, 3), model.exit(3).norm(x))  # until it learns
    with torch.no_grad():
        block.load_state_dict(model.layers[0].state_dict())
        model.exit(3).norm.weight.uniform_(0.5, 1.5)
        torch.testing.assert_close(model.exit_hidden(x, 3), model.exit(3).norm(model.run_layers(x, 1, 1)))
        assert torch.equal(model.exit_hidden(x, 4), model.norm(x))


def test_every_part_of_a_block_learns() -> None:
    model = make(exit_adapter="block")
    ids = torch.randint(13, (2, 6))
    for _ in range(2):  # what adds to the identity moves first
        exit_loss(model, ids[:, :-1], ids[:, 1:], Objective(weights={1: 1.0, 4: 0.0}))[0].backward()
        with torch.no_grad():
            for parameter in model.exit(1).adapter.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.exit(1).adapter.parameters())


def reduced(**fields: object) -> Decoder:
    """A model whose early exits know the tokens 2, 3, 7 and 11."""
    model = make(exit_head="reduced", exit_vocab_size=4, **fields)
    counts = torch.zeros(13, dtype=torch.int64)
    counts[[7, 2, 11, 3]] = torch.tensor([9, 8, 7, 6])
    model.reduced_head.choose_tokens(counts, model.lm_head.weight)
    return model


def test_a_reduced_head_knows_the_most_frequent_tokens() -> None:
    model = reduced()
    x = torch.randn(2, 5, 32)
    assert model.reduced_head.ids.tolist() == [2, 3, 7, 11]
    assert model.exit(1).head is model.exit(3).head is model.reduced_head
    assert model.exit(4).head is model.lm_head
    assert (model.exit(4).head.ids, model.exit(1).head.ids) == (None, model.reduced_head.ids)
    logits = model.exit(1).head(x)
    whole = model.lm_head(x)
    torch.testing.assert_close(logits[..., [2, 3, 7, 11]], whole[..., [2, 3, 7, 11]])
    torch.testing.assert_close(model.exit(4).head(x), whole)


def test_what_a_reduced_head_gives_the_rest_is_shared_out_as_it_was_counted() -> None:
    model = make(exit_head="reduced", exit_vocab_size=4)
    x = torch.randn(2, 5, 32)
    model.reduced_head.choose_tokens(
        torch.tensor([3, 0, 90, 90, 0, 1, 0, 90, 0, 0, 0, 90, 0]), model.lm_head.weight
    )  # once more each: 4 + 2 + 7 of 13
    distribution = model.exit(1).head(x).softmax(-1)
    classes = F.linear(x, model.exit(1).head.weight).softmax(-1)
    torch.testing.assert_close(distribution[..., [2, 3, 7, 11]], classes[..., :4])
    torch.testing.assert_close(distribution[..., 0], classes[..., 4] * 4 / 13)
    torch.testing.assert_close(distribution[..., [5, 12]], classes[..., 4:] * torch.tensor([2, 1]) / 13)
    expected = (
        4 * model.lm_head.weight[0]
        + model.lm_head.weight[5]
        + model.lm_head.weight[[1, 4, 5, 6, 8, 9, 10, 12]].sum(0)
    ) / 13
    torch.testing.assert_close(model.reduced_head.rest.weight[0], expected)


def test_to_a_reduced_heads_loss_all_it_does_not_know_is_one_token() -> None:
    model = reduced().double()
    temperature = 3.0
    ids = torch.randint(13, (3, 9))
    inputs = ids[:, :-1]
    targets = ids[:, 1:].flatten()
    objective = Objective(
        weights={1: 1.0, 3: 0.5, 4: 0.2}, distill=Distill(weight=0.7, temperature=temperature)
    )
    loss, losses = exit_loss(model, inputs, ids[:, 1:], objective)
    rows = {
        layer: model.exit_hidden(hidden, layer).flatten(0, 1) for layer, hidden in model.exit_states(inputs)
    }
    teacher = (model.lm_head(rows[4]) / temperature).softmax(-1).detach()[:, model.reduced_head.ids]
    teacher = torch.cat((teacher, 1 - teacher.sum(-1, keepdim=True)), -1)
    known = torch.isin(targets, model.reduced_head.ids)
    expected = 0.2 * F.cross_entropy(model.lm_head(rows[4]), targets)
    assert 0 < known.sum() < len(targets)
    places = torch.where(known, torch.searchsorted(model.reduced_head.ids, targets), 4)
    for layer, weight in ((1, 1.0), (3, 0.5)):
        logits = torch.cat((model.reduced_head.known(rows[layer]), model.reduced_head.rest(rows[layer])), -1)
        each = F.cross_entropy(logits, places)
        kl = (teacher * (teacher.log() - (logits / temperature).log_softmax(-1))).sum() / len(targets)
        expected = expected + weight * (each + 0.7 * temperature**2 * kl)
        assert losses[layer] == pytest.approx(each.item(), rel=1e-5)
        whole = F.cross_entropy(model.exit(layer).head(rows[layer]), targets)
        assert exit_losses(model, inputs, ids[:, 1:])[layer] == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    parameters = [
        p for name, p in model.named_parameters() if name != "embed.weight" and not name.startswith("layers")
    ]
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_heads_are_shared_or_own() -> None:
    tied = make()
    own = make(exit_head="own")
    assert all(tied.exit(layer).head is tied.lm_head for layer in (1, 3, 4))
    assert own.exit(4).head is own.lm_head
    assert len({id(own.exit(layer).head.weight) for layer in (1, 3, 4)}) == 3
    assert own.exit(1).head.weight.shape == (13, 32)


def test_an_own_head_learns_from_its_exit_alone() -> None:
    model = make(exit_head="own")
    ids = torch.randint(13, (2, 6))
    exit_loss(model, ids[:, :-1], ids[:, 1:], Objective(weights={1: 1.0, 4: 0.0}))[0].backward()
    assert model.exit(1).head.weight.grad.abs().sum() > 0
    assert model.exit(3).head.weight.grad is None
    assert model.lm_head.weight.grad is None


def test_a_gate_is_a_probability_with_a_temperature() -> None:
    gate = Gate(32, 8)
    x = torch.randn(7, 32)
    with torch.no_grad():
        logits = gate.score(x)
        assert logits.shape == (7,)
        gate.temperature.fill_(2.5)
        torch.testing.assert_close(gate(x), 1 / (1 + torch.exp(-logits / 2.5)))
        linear = Gate(32, 0)
        torch.testing.assert_close(linear.score(x), x @ linear.score.out.weight[0] + linear.score.out.bias)


@pytest.mark.parametrize("kind", [{"exit_adapter": "mlp", "exit_head": "own"}, BLOCKS])
def test_all_of_it_survives_a_checkpoint(recipe: Recipe, tmp_path: Path, kind: dict[str, object]) -> None:
    from ease_train.data.tokens import train_tokenizer
    from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

    tokenizer = train_tokenizer(["abc"], recipe.tokenizer)
    more = {"vocab_size": tokenizer.get_vocab_size(), **kind, "gates": [2], "routed_layers": [3]}
    recipe = Recipe.from_dict({**recipe.to_dict(), "model": {**recipe.model.to_dict(), **more}}, "t")
    model = Decoder(recipe.model)
    with torch.no_grad():
        model.exit(2).gate.temperature.fill_(1.7)
        if model.reduced_head is not None:
            model.reduced_head.choose_tokens(torch.arange(recipe.model.vocab_size), model.lm_head.weight)
    save_checkpoint(Checkpoint(recipe, model, tokenizer, 0, "x"), tmp_path / "c")
    after = load_checkpoint(tmp_path / "c")
    assert after.recipe == recipe
    assert after.model.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, after.model.state_dict()[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_adapter": "lowrank"}, "exit_adapter = 'lowrank'; did you mean 'low-rank'?"),
        ({"exit_vocab_size": 5}, "exit_vocab_size = 5 needs exit_head = 'reduced', not 'tied'"),
        (
            {"exit_head": "reduced"},
            "exit_vocab_size = 0, expected at least 1 and less than 13 with exit_head = 'reduced'",
        ),
        (
            {"exit_head": "reduced", "exit_vocab_size": 13},
            "exit_vocab_size = 13, expected at least 1 and less than 13",
        ),
        ({"exit_head": "tie"}, "exit_head = 'tie'; did you mean 'tied'?"),
        ({"gates": [2]}, "gates = [2], expected early exits: [1, 3]"),
        ({"gates": [4]}, "gates = [4], expected early exits: [1, 3]"),
        ({"routed_layers": [5]}, "routed_layers = [5], expected layers from 1 to 4"),
        ({"capacity": 0.0}, "capacity = 0.0, expected more than 0 and at most 1"),
    ],
)
def test_wrong_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**fields)
    assert message in str(error.value)
