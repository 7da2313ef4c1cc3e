"""The chunked exit loss against plain autograd over whole logits."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.methods import losses
from ease_train.methods.losses import Objective, exit_loss, exit_losses
from ease_train.model.decoder import Decoder
from ease_train.training.config import Recipe

VOCABULARY = 11


def model_and_batch(recipe: Recipe, **fields: object) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    model = Decoder(
        type(recipe.model).from_dict({**recipe.model.to_dict(), "vocab_size": VOCABULARY, **fields}, "test")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # losses that differ from exit to exit
    ids = torch.randint(VOCABULARY, (3, 9))
    return model, ids[:, :-1], ids[:, 1:]


def naive(
    model: Decoder, inputs: torch.Tensor, targets: torch.Tensor, weights: dict[int, float]
) -> torch.Tensor:
    total = torch.zeros(())
    for layer, hidden in model.exit_states(inputs):
        logits = model.lm_head(model.exit_hidden(hidden, layer))
        total = total + weights.get(layer, 0.0) * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_value_and_gradients(recipe: Recipe, tied: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * VOCABULARY)  # 24 rows: an odd rest, or all at once
    model, inputs, targets = model_and_batch(recipe, tie_embeddings=tied)
    weights = {2: 0.3, 3: 0.25, 4: 1.5}
    expected = naive(model, inputs, targets, weights)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, by_exit = exit_loss(model, inputs, targets, Objective(weights=weights))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(sum(weights[layer] * by_exit[layer] for layer in weights), rel=1e-6)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5 * scale)


def test_the_gradient_scales_with_what_follows(recipe: Recipe) -> None:
    model, inputs, targets = model_and_batch(recipe)
    exit_loss(model, inputs, targets, Objective(weights={4: 1.0}))[0].backward()
    once = model.embed.weight.grad.clone()
    model.zero_grad()
    (exit_loss(model, inputs, targets, Objective(weights={4: 1.0}))[0] * 3.0).backward()
    torch.testing.assert_close(model.embed.weight.grad, once * 3.0)


def test_an_exit_without_weight_gets_no_gradient(recipe: Recipe) -> None:
    model, inputs, targets = model_and_batch(recipe)
    exit_loss(model, inputs, targets, Objective(weights={2: 0.0, 3: 1.0, 4: 0.0}))[0].backward()
    assert model.exit(2).norm.weight.grad is None
    assert model.norm.weight.grad is None
    assert all(
        p.grad is None for p in model.layers[3].parameters()
    )  # no layer runs past the last exit with a weight
    assert model.exit(3).norm.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.layers[0].parameters())


def test_each_exits_own_loss(recipe: Recipe) -> None:
    model, inputs, targets = model_and_batch(recipe)
    found = exit_losses(model, inputs, targets)
    assert list(found) == [2, 3, 4]
    for layer in found:
        assert found[layer] == pytest.approx(naive(model, inputs, targets, {layer: 1.0}).item(), rel=1e-6)
    assert len({round(value, 3) for value in found.values()}) == 3


def test_in_a_model_without_final_norm(make_recipe: Callable[..., Recipe]) -> None:
    model, inputs, targets = model_and_batch(make_recipe(model={"final_norm": False}))
    weights = {2: 0.5, 4: 0.5}
    loss, _ = exit_loss(model, inputs, targets, Objective(weights=weights))
    torch.testing.assert_close(loss, naive(model, inputs, targets, weights))
