"""Distillation, routing, gradient rules and layer dropout against plain autograd over whole logits."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.methods import losses
from ease_train.methods.gradients import split_gradient
from ease_train.methods.losses import Objective, exit_loss
from ease_train.methods.method import Distill
from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig, Recipe
from ease_train.training.optimizer import create_optimizer

VOCABULARY = 11
WEIGHTS = {2: 0.3, 3: 0.25, 4: 1.5}
Gradients = dict[str, torch.Tensor]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (3, 9))
    return ids[:, :-1], ids[:, 1:]


def make_model(recipe: Recipe, **fields: object) -> Decoder:
    model = Decoder(
        ModelConfig.from_dict({**recipe.model.to_dict(), "vocab_size": VOCABULARY, **fields}, "test")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    return model


def gradients(model: Decoder, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=2e-5 * expected[name].abs().max().item() + 1e-9
        )


def exit_logits(model: Decoder, inputs: torch.Tensor) -> dict[int, torch.Tensor]:
    return {
        layer: model.exit(layer).head(model.exit_hidden(h, layer)).flatten(0, 1)
        for layer, h in model.exit_states(inputs)
    }


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("head", ["tied", "own"])
def test_distillation(
    recipe: Recipe,
    batch: tuple[torch.Tensor, torch.Tensor],
    chunk: int,
    head: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    model, (inputs, targets), temperature = make_model(recipe, exit_head=head), batch, 3.0
    found = exit_logits(model, inputs)
    teacher = F.softmax(found[4].detach() / temperature, dim=-1)
    last = model.exit_hidden(dict(model.exit_states(inputs))[4], 4).detach()
    expected = torch.zeros(())
    for layer, hidden in model.exit_states(inputs):
        loss = F.cross_entropy(found[layer], targets.flatten())
        if layer < 4:
            kl = (
                (teacher * (teacher.log() - F.log_softmax(found[layer] / temperature, dim=-1))).sum(-1).mean()
            )
            loss = (
                loss
                + 0.7 * temperature**2 * kl
                + 0.4 * ((model.exit_hidden(hidden, layer) - last) ** 2).mean()
            )
        expected = expected + WEIGHTS[layer] * loss
    wanted = gradients(model, expected)
    total, by_exit = exit_loss(
        model,
        inputs,
        targets,
        Objective(weights=WEIGHTS, distill=Distill(weight=0.7, temperature=temperature, hidden_weight=0.4)),
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert by_exit[2] == pytest.approx(F.cross_entropy(found[2], targets.flatten()).item(), rel=1e-5)
    assert_same(gradients(model, total), wanted)


def test_the_teacher_gets_no_gradient(recipe: Recipe, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With no loss of its own, the last exit only teaches: nothing above the student's layers learns."""
    model = make_model(recipe, exit_head="own")
    total, _ = exit_loss(
        model, *batch, Objective(weights={2: 1.0}, distill=Distill(weight=1.0, hidden_weight=1.0))
    )
    found = gradients(model, total)
    assert found["exits.2.head.weight"].abs().sum() > 0
    assert found["layers.0.mlp.up_proj.weight"].abs().sum() > 0
    assert "norm.weight" not in found or found["norm.weight"].abs().sum() == 0
    assert all(
        grad.abs().sum() == 0 for name, grad in found.items() if name.startswith(("layers.2", "layers.3"))
    )
    tied = {name: grad.abs().sum() for name, grad in found.items() if name == "lm_head.weight"}
    assert all(total == 0 for total in tied.values())


def test_each_token_trains_the_first_exit_that_is_sure(
    recipe: Recipe, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, (inputs, targets) = make_model(recipe), batch
    found = exit_logits(model, inputs)
    tops = {layer: F.softmax(logits, dim=-1).max(-1).values for layer, logits in found.items()}
    threshold = tops[2].quantile(0.5).item()  # between two tokens, so that rounding moves none across
    at_2 = tops[2] >= threshold
    at_3 = ~at_2 & (tops[3] >= threshold)
    at_4 = ~at_2 & ~at_3
    assert min(at_2.sum(), at_3.sum(), at_4.sum()) > 0
    expected = sum(
        (F.cross_entropy(found[layer], targets.flatten(), reduction="none") * chosen).mean()
        for layer, chosen in {2: at_2, 3: at_3, 4: at_4}.items()
    )
    wanted = gradients(model, expected)
    total, _ = exit_loss(model, inputs, targets, Objective(weights=WEIGHTS, routing_threshold=threshold))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert_same(gradients(model, total), wanted)


def parts(model: Decoder, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[int, Gradients]:
    """The gradient of each exit's weighted loss alone."""
    out = {}
    for layer, weight in WEIGHTS.items():
        out[layer] = gradients(model, exit_loss(model, *batch, Objective(weights={layer: weight}))[0])
    return out


def test_detached_exits_leave_the_layers_to_the_last_one(
    recipe: Recipe, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = make_model(recipe, tie_embeddings=False)
    alone = parts(model, batch)
    found = gradients(model, exit_loss(model, *batch, Objective(weights=WEIGHTS, gradient="detached"))[0])
    layers = {name for name in found if name.startswith(("layers", "embed"))}
    assert_same({n: found[n] for n in layers}, {n: alone[4][n] for n in layers})
    assert_same(
        {n: found[n] for n in ("exits.2.norm.weight",)}, {n: alone[2][n] for n in ("exits.2.norm.weight",)}
    )
    head = {"lm_head.weight": sum(alone[layer]["lm_head.weight"] for layer in WEIGHTS)}
    assert_same({"lm_head.weight": found["lm_head.weight"]}, head)


def test_equilibrium_gives_each_layer_the_mean_of_the_exits_behind_it(
    recipe: Recipe, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = make_model(recipe, tie_embeddings=False)
    alone = parts(model, batch)
    found = gradients(model, exit_loss(model, *batch, Objective(weights=WEIGHTS, gradient="equilibrium"))[0])
    for name in (n for n in found if n.startswith("layers")):
        behind = [layer for layer in WEIGHTS if layer >= int(name.split(".")[1]) + 1]
        expected = sum(alone[layer][name] for layer in behind) / len(behind)
        assert_same({name: found[name]}, {name: expected})
    assert_same({"e": found["exits.3.norm.weight"]}, {"e": alone[3]["exits.3.norm.weight"]})


def test_the_gradient_rules_do_not_touch_the_forward_pass() -> None:
    hidden = torch.randn(2, 3, requires_grad=True)
    for rule in ("joint", "equilibrium", "detached"):
        assert all(torch.equal(part, hidden) for part in split_gradient(hidden, 3, rule))


def test_a_dropped_layer_is_skipped_by_the_whole_sequence(recipe: Recipe) -> None:
    model = make_model(recipe)
    hidden = torch.randn(8, 5, 16)
    with torch.no_grad():
        ran = model.run_layers(hidden, 2, 2)
        found = model.run_layers(hidden, 2, 2, drop=(0.0, 0.5, 0.0, 0.0))
        skipped = [torch.equal(found[row], hidden[row]) for row in range(8)]
        assert 0 < sum(skipped) < 8
        for row in range(8):
            torch.testing.assert_close(found[row], hidden[row] if skipped[row] else ran[row])
        assert torch.equal(model.run_layers(hidden, 1, 4, drop=(1.0, 1.0, 1.0, 1.0)), hidden)


def test_layers_are_dropped_as_often_as_asked(recipe: Recipe) -> None:
    model = make_model(recipe)
    hidden = torch.randn(4000, 1, 16)
    with torch.no_grad():
        share = (
            (model.run_layers(hidden, 3, 3, drop=(0.0, 0.0, 0.3, 0.0)) == hidden)
            .all(-1)
            .float()
            .mean()
            .item()
        )
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)


def test_discriminative_groups(recipe: Recipe) -> None:
    model = make_model(recipe)
    scales = {1: 0.25, 4: 0.5}
    optimizer = create_optimizer(model, recipe.train, scales)
    rate_of = {
        id(p): group["lr"] / recipe.train.learning_rate
        for group in optimizer.param_groups
        for p in group["params"]
    }
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("layers") else 0
        assert rate_of[id(parameter)] == pytest.approx(scales.get(layer, 1.0)), name
        assert decay_of[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0), name
    assert len(rate_of) == len(list(model.parameters()))


def test_recomputed_activations_change_nothing_but_memory(
    recipe: Recipe, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = make_model(recipe)
    expected = gradients(model, exit_loss(model, *batch, Objective(weights=WEIGHTS))[0])
    model.recompute_activations = True
    found = gradients(model, exit_loss(model, *batch, Objective(weights=WEIGHTS))[0])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
