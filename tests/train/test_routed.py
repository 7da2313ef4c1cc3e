"""Mixture-of-Depths: the choice in training, the causal rule at inference, and what each gradient reaches."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.methods.losses import Objective, exit_loss
from ease_train.model.blocks import Block, rotary_tables
from ease_train.model.decoder import Decoder
from ease_train.model.routed import RoutedBlock
from ease_train.training.config import ModelConfig


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=13,
        dim=16,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        exits=(2, 4),
        routed_layers=(2, 4),
        capacity=0.5,
    )


@pytest.fixture
def block(config: ModelConfig) -> RoutedBlock:
    block = RoutedBlock(config, 1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return block


def tables(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_tables(config)
    return cos[:length], sin[:length]


def alone(block: Block, x: torch.Tensor, positions: list[int], config: ModelConfig) -> torch.Tensor:
    """What the block makes of some tokens of one sequence that see one another only.

    Shape: (S, D) -> (len(positions), D).
    """
    cos, sin = rotary_tables(config)
    return block(x[positions][None], cos[positions], sin[positions])[0]


def test_training_takes_the_top_share_and_scales_by_the_router(
    block: RoutedBlock, config: ModelConfig
) -> None:
    x = torch.randn(3, 10, 16)
    found = block.train()(x, *tables(config, 10))
    scores = block.router(x)
    assert scores.shape == (3, 10)
    for row in range(3):
        positions = sorted(scores[row].topk(5).indices.tolist())
        out = alone(block.block, x[row], positions, config)
        for i, position in enumerate(positions):
            expected = x[row, position] + scores[row, position] * (out[i] - x[row, position])
            torch.testing.assert_close(found[row, position], expected, rtol=1e-4, atol=1e-5)
        for position in set(range(10)) - set(positions):
            assert torch.equal(found[row, position], x[row, position])


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 1), (7, 4), (10, 5)])
def test_at_least_one_token_goes_in(block: RoutedBlock, length: int, count: int) -> None:
    assert block.chosen(torch.randn(2, length, 16))[0].shape == (2, count)


def test_inference_takes_those_that_the_predictor_names(block: RoutedBlock, config: ModelConfig) -> None:
    x = torch.randn(4, 10, 16)
    found = block.eval()(x, *tables(config, 10))
    inside = torch.sigmoid(block.predictor(x)) > 0.5
    assert 0 < inside.sum() < inside.numel()
    for row in range(4):
        positions = inside[row].nonzero().flatten().tolist()
        out = alone(block.block, x[row], positions, config)
        scores = block.router(x[row])
        for position in range(10):
            expected = x[row, position]
            if position in positions:
                expected = expected + scores[position] * (out[positions.index(position)] - expected)
            torch.testing.assert_close(found[row, position], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["predictor", "threshold"])
def test_inference_is_causal_and_training_is_not(config: ModelConfig, rule: str) -> None:
    model = Decoder(replace(config, routing_rule=rule))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    ids = torch.randint(13, (1, 12))
    model.train()(torch.randint(13, (8, 12)))  # a threshold comes from training
    changed = [torch.cat((ids[:, :8], torch.randint(13, (1, 4))), dim=1) for _ in range(8)]
    with torch.no_grad():
        model.eval()
        for other in changed:
            torch.testing.assert_close(model(ids)[:, :8], model(other)[:, :8], rtol=1e-5, atol=1e-5)
        for length in range(1, 13):  # token by token, as far as it goes
            torch.testing.assert_close(
                model(ids[:, :length])[:, -1], model(ids)[:, length - 1], rtol=1e-4, atol=1e-4
            )
        hidden = model.run_layers(model.embed(ids), 1, 3)
        routed = model.layers[3].goes_in(hidden)
        assert 0 < routed.sum() < routed.numel()
        for length in range(1, 13):
            so_far = model.run_layers(model.embed(ids[:, :length]), 1, 3)
            assert torch.equal(model.layers[3].goes_in(so_far)[:, -1], routed[:, length - 1])
        model.train()
        assert any(not torch.allclose(model(ids)[:, :8], model(other)[:, :8], atol=1e-3) for other in changed)


def test_the_predictor_learns_the_choice_and_touches_nothing_else(
    block: RoutedBlock, config: ModelConfig
) -> None:
    x = torch.randn(3, 10, 16, requires_grad=True)
    block.train()(x, *tables(config, 10))
    target = torch.zeros(3, 10)
    for row in range(3):
        target[row, block.router(x)[row].topk(5).indices] = 1.0
    torch.testing.assert_close(
        block.predictor_loss, F.binary_cross_entropy(torch.sigmoid(block.predictor(x)), target)
    )
    block.predictor_loss.backward()
    assert x.grad is None
    assert {name.split(".")[0] for name, p in block.named_parameters() if p.grad is not None} == {"predictor"}


def test_the_router_learns_from_the_loss(config: ModelConfig) -> None:
    model = Decoder(config)
    ids = torch.randint(13, (2, 9))
    objective = Objective(weights={2: 0.5, 4: 1.0}, predictor_weight=3.0)
    total, by_exit = exit_loss(model.train(), ids[:, :-1], ids[:, 1:], objective)
    predictors = [model.layers[i].predictor_loss for i in (1, 3)]
    expected = 0.5 * by_exit[2] + by_exit[4] + 3.0 * torch.stack(predictors).mean().item()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    assert all(model.layers[i].router.out.weight.grad.abs().sum() > 0 for i in (1, 3))
    assert not any(isinstance(model.layers[i], RoutedBlock) for i in (0, 2))


def test_the_predictor_can_be_learned(block: RoutedBlock, config: ModelConfig) -> None:
    optimizer = torch.optim.Adam(block.predictor.parameters(), lr=0.02)
    for _ in range(150):
        block.train()(torch.randn(8, 32, 16), *tables(config, 32))
        optimizer.zero_grad()
        block.predictor_loss.backward()
        optimizer.step()
    x = torch.randn(16, 32, 16)
    chosen = torch.zeros(16, 32).scatter(1, block.chosen(x)[0], 1.0).bool()
    assert (block.goes_in(x) == chosen).float().mean() > 0.85  # a half would be chance


def test_the_threshold_is_a_running_mean_of_what_the_top_share_reaches(config: ModelConfig) -> None:
    block = RoutedBlock(replace(config, routing_rule="threshold", capacity=0.25), 1).train()
    batches = [torch.randn(4, 8, 16) for _ in range(130)]
    reached = []
    for x in batches:
        block(x, *tables(config, 8))
        ordered = sorted(
            block.router(x).flatten().tolist()
        )  # 32 scores: the quantile 0.75 lies between the 24th and the 25th
        reached.append(ordered[23] + 0.25 * (ordered[24] - ordered[23]))
    expected = sum(reached[:100]) / 100
    for value in reached[100:]:
        expected = 0.99 * expected + 0.01 * value
    assert block.threshold.item() == pytest.approx(expected, rel=1e-4)
    assert block.predictor_loss is None
    x = torch.randn(64, 8, 16)
    assert torch.equal(block.eval().goes_in(x), block.router(x) >= block.threshold)
    assert block.goes_in(x).float().mean() == pytest.approx(0.25, abs=0.05)
    assert {name for name, _ in block.named_buffers()} == {"threshold", "num_batches"}
    assert not any(name.startswith("predictor") for name, _ in block.named_parameters())
