"""The original EASE's API: its README, its presets, its loss and its four figures, each against the
formula.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

import ease_train
from ease_common.errors import ConfigError, DataError
from ease_train import (
    PRESETS,
    AlphaSchedule,
    DEEDTransformer,
    MoDTransformer,
    StandardTransformer,
    TokenRoutedTransformer,
    UniversalConfig,
    UniversalTrainer,
)
from ease_train.methods.originals import LayeredDecoder
from ease_train.model.routed import RoutedBlock

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MODELS = [StandardTransformer, DEEDTransformer, TokenRoutedTransformer, MoDTransformer]


@pytest.fixture
def batches() -> Batches:
    """Sequences that count upwards, so that there is something to learn."""
    out = []
    for _ in range(4):
        ids = (torch.randint(20, (3, 1)) + torch.arange(9)) % 20
        out.append((ids[:, :-1], ids[:, 1:]))
    return out


def lively(model: LayeredDecoder) -> LayeredDecoder:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.35)
    return model


def test_the_readme_of_the_original(batches: Batches) -> None:
    config = UniversalConfig(layer_weights={1: 0.7, 2: 0, 3: 0.3}, routing_threshold=0.9, exit_layer=1)
    model = DEEDTransformer(vocab_size=1000, dim=64, num_layers=3)
    trainer = UniversalTrainer(config, vocab_size=1000)
    optimizer = trainer.create_optimizer(model, base_lr=1e-3)
    first, weights = trainer.train_epoch(model, batches, optimizer)
    for _ in range(14):
        last, _ = trainer.train_epoch(model, batches, optimizer)
    assert weights == {1: 0.7, 2: 0.0, 3: 0.3}
    assert first == pytest.approx(math.log(1000), rel=0.05)
    assert last < first / 2
    stats = trainer.evaluate(model, batches)
    assert set(stats) == {"ppl", "acc", "shallow_ratio", "compute_cost"}
    assert stats["ppl"] < 50


@pytest.mark.parametrize("make", MODELS)
def test_every_model_takes_the_originals_arguments(make: Callable[..., LayeredDecoder]) -> None:
    model = lively(make(vocab_size=20, dim=16, num_layers=3)).eval()
    x = torch.randint(20, (2, 5))
    every = model.forward_all_layers(x)
    assert len(model.layers) == len(every) == 3
    assert all(logits.shape == (2, 5, 20) for logits in every)
    torch.testing.assert_close(model(x), every[-1])
    shallow, deep, confidence = model.forward_train(x)
    assert torch.equal(shallow, every[0])
    assert torch.equal(deep, every[-1])
    torch.testing.assert_close(confidence, F.softmax(every[0], dim=-1).amax(-1))
    assert not any(
        "norm" in name for name in model.state_dict() if not name.startswith("layers")
    )  # no final norm
    assert model.lm_head.weight is not model.embed.weight


def test_layers_are_counted_from_one() -> None:
    model = lively(StandardTransformer(20, 16, 3))
    x = torch.randint(20, (2, 5))
    hidden = model.run_layers(model.embed(x), 1, 2)
    torch.testing.assert_close(model.forward_all_layers(x)[1], model.lm_head(hidden))
    torch.testing.assert_close(model.forward_train(x, exit_layer=2)[0], model.lm_head(hidden))
    with pytest.raises(ConfigError, match="exit_layer = 4, expected a layer from 1 to 3"):
        model.forward_train(x, exit_layer=4)


@pytest.mark.parametrize("weights", [{1: 0.7, 2: 0, 3: 0.3}, {1: 2.0, 2: 1.0, 3: 0.5}, {2: 1.0}, None])
def test_the_loss_is_the_weighted_sum(weights: dict[int, float] | None, batches: Batches) -> None:
    model = lively(DEEDTransformer(20, 16, 3))
    trainer = UniversalTrainer(UniversalConfig({1: 0.5, 2: 0, 3: 0.5}), vocab_size=20)
    x, y = batches[0]
    used = weights or {1: 0.5, 3: 0.5}
    logits = model.forward_all_layers(x)
    expected = sum(
        weight * F.cross_entropy(logits[layer - 1].flatten(0, 1), y.flatten())
        for layer, weight in used.items()
    )
    torch.testing.assert_close(trainer.compute_loss(model, x, y, weights), expected)


def test_all_zero_means_the_last_layer(batches: Batches) -> None:
    with pytest.warns(UserWarning, match="all layer_weights are 0: only the last layer, 3, is trained"):
        config = UniversalConfig({1: 0, 2: 0, 3: 0}, routing_threshold=0)
    model, (x, y) = lively(DEEDTransformer(20, 16, 3)), batches[0]
    trainer = UniversalTrainer(config, vocab_size=20)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(trainer.compute_loss(model, x, y), expected)
    torch.testing.assert_close(trainer.compute_loss(model, x, y, {1: 0.0}), expected)
    with pytest.warns(UserWarning, match="all layer_weights are 0"):
        shorter = UniversalConfig({1: 0, 2: 0}, routing_threshold=0)
    trainer = UniversalTrainer(shorter, vocab_size=20)
    torch.testing.assert_close(trainer.compute_loss(model, x, y), expected)
    assert trainer.train_epoch(model, batches, trainer.create_optimizer(model, 1e-3))[1] == {
        1: 0.0,
        2: 0.0,
        3: 1.0,
    }


def test_a_layer_without_weight_gets_nothing(batches: Batches) -> None:
    model = lively(DEEDTransformer(20, 16, 3))
    UniversalTrainer(UniversalConfig({1: 1.0, 2: 0, 3: 0}), vocab_size=20).compute_loss(
        model, *batches[0]
    ).backward()
    assert all(p.grad is None for layer in model.layers[1:] for p in layer.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.layers[0].parameters())


def test_normalisation() -> None:
    config = UniversalConfig({1: 2.0, 2: 1.0, 3: 1.0}, normalize_weights=True)
    assert config.weights_at(0, 1) == pytest.approx({1: 0.5, 2: 0.25, 3: 0.25})


def test_alpha_replaces_the_first_and_last_weights(batches: Batches) -> None:
    schedule = AlphaSchedule("linear", start=0.9, end=0.1)
    config = UniversalConfig({1: 0.5, 2: 0.25, 3: 0.5}, alpha_schedule=schedule)
    assert config.weights_at(1, 5) == pytest.approx({1: 0.7, 2: 0.25, 3: 0.3})
    assert UniversalConfig({2: 0.5}, alpha_schedule=schedule).weights_at(1, 5, 4) == pytest.approx(
        {1: 0.7, 2: 0.5, 4: 0.3}
    )
    model = DEEDTransformer(20, 16, 3)
    trainer = UniversalTrainer(config, vocab_size=20)
    _, weights = trainer.train_epoch(
        model, batches, trainer.create_optimizer(model, 1e-3), epoch=4, max_epochs=5
    )
    assert weights == pytest.approx({1: 0.1, 2: 0.25, 3: 0.9})


def test_an_epoch_is_clipped_steps_of_adamw(batches: Batches) -> None:
    model = lively(DEEDTransformer(20, 16, 3))
    twin = DEEDTransformer(20, 16, 3)
    twin.load_state_dict(model.state_dict())
    trainer = UniversalTrainer(UniversalConfig({1: 0.7, 2: 0, 3: 0.3}), vocab_size=20)
    mean, _ = trainer.train_epoch(model, batches, trainer.create_optimizer(model, 0.01), grad_clip=0.5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    losses = []
    for x, y in batches:
        logits = twin.forward_all_layers(x)
        loss = 0.7 * F.cross_entropy(logits[0].flatten(0, 1), y.flatten()) + 0.3 * F.cross_entropy(
            logits[2].flatten(0, 1), y.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert mean == pytest.approx(sum(losses) / 4, rel=1e-4)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_optimizer_groups() -> None:
    model = DEEDTransformer(20, 16, 3)
    trainer = UniversalTrainer(
        UniversalConfig({1: 0.7, 2: 0, 3: 0.3}, layer_lr_scales={1: 1.0, 2: 0.5, 3: 0.1}), vocab_size=20
    )
    optimizer = trainer.create_optimizer(model, base_lr=0.01)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("layers") else None
        assert rates[id(parameter)] == pytest.approx({None: 0.01, 1: 0.01, 2: 0.005, 3: 0.001}[layer]), name
    assert len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
def test_the_four_figures(threshold: float, batches: Batches) -> None:
    model = lively(DEEDTransformer(20, 16, 4)).eval()
    batches = [
        *batches[:3],
        (batches[3][0][:1], batches[3][1][:1]),
    ]  # a smaller last batch: the mean is over batches
    config = UniversalConfig({1: 0, 2: 1, 3: 0, 4: 1}, exit_layer=2, routing_threshold=threshold)
    stats = UniversalTrainer(config, vocab_size=20).evaluate(model, batches)
    losses = []
    right = 0
    shallow = 0
    tokens = 0
    for x, y in batches:
        total = 0.0
        every = F.softmax(torch.stack(model.forward_all_layers(x)), dim=-1).detach()
        for row in range(len(x)):
            for place in range(x.shape[1]):
                leaves = threshold > 0 and every[1, row, place].max() >= threshold
                chosen = every[1 if leaves else 3, row, place]
                total -= math.log(chosen[y[row, place]])
                right += int(chosen.argmax() == y[row, place])
                shallow = shallow + int(leaves)
                tokens = tokens + 1
        losses.append(total / y.numel())
    assert 0 < shallow < tokens or threshold == 0
    assert stats["ppl"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    assert stats["acc"] == pytest.approx(right / tokens)
    assert stats["shallow_ratio"] == pytest.approx(shallow / tokens)
    assert stats["compute_cost"] == pytest.approx((shallow * 2 + (tokens - shallow) * 4) / (tokens * 4))


def test_the_presets_under_both_names() -> None:
    third = pytest.approx(1 / 3)
    expected = {
        ("standard_llm",): ({1: 0, 2: 0, 3: 1}, 0),
        ("lpt", "deep_supervision"): ({1: third, 2: third, 3: third}, 0),
        ("lpt_routing", "deep_supervision_routing"): ({1: third, 2: third, 3: third}, 0.7),
        ("standard_routing", "auxiliary_loss"): ({1: 0.5, 2: 0, 3: 0.5}, 0.95),
        ("asymmetric", "asymmetric_best"): ({1: 0.7, 2: 0, 3: 0.3}, 0.95),
        ("asymmetric_with_l2",): ({1: 0.7, 2: 1, 3: 0.3}, 0.95),
        ("deep_focus",): ({1: 0.3, 2: 0, 3: 0.7}, 0.95),
    }
    assert set(PRESETS) == {name for names in expected for name in names}
    for names, (weights, threshold) in expected.items():
        for name in names:
            assert PRESETS[name].layer_weights == weights
            assert PRESETS[name].routing_threshold == threshold
            assert PRESETS[name].exit_layer == 1


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains(name: str, batches: Batches) -> None:
    model = DEEDTransformer(20, 16, 3)
    trainer = UniversalTrainer(PRESETS[name], vocab_size=20)
    optimizer = trainer.create_optimizer(model, 1e-2)
    losses = [trainer.train_epoch(model, batches, optimizer)[0] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert trainer.evaluate(model, batches)["compute_cost"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layer_weights": {1: -1.0, 3: 1.0}},
            "layer_weights = {1: -1.0}, expected layers from 1 and numbers of at least 0",
        ),
        ({"layer_weights": {0: 1.0}}, "layer_weights = {0: 1.0}"),
        ({"layer_weights": {}}, "layer_weights is empty"),
        (
            {"layer_weights": {1: 1.0}, "routing_threshold": 1.5},
            "routing_threshold = 1.5, expected a number from 0 to 1",
        ),
        ({"layer_weights": {1: 1.0}, "exit_layer": 0}, "exit_layer = 0, expected a layer from 1"),
        ({"layer_weights": {1: 1.0}, "layer_lr_scales": {1: -0.5}}, "layer_lr_scales = {1: -0.5}"),
    ],
)
def test_what_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        UniversalConfig(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layer_weights": {1: 0.5, 3: 0.5}, "exit_layer": 3},
            "exit_layer = 3 is the last layer: routing_threshold = 0.95 has no effect",
        ),
        ({"layer_weights": {1: 0, 3: 1.0}}, "sends tokens out at layer 1, whose weight is 0"),
        (
            {"layer_weights": {1: 0.5, 3: 0.5}, "routing_threshold": 1},
            "routing_threshold = 1 lets a token leave only when",
        ),
        ({"layer_weights": {1: 0.5, 3: 0.5}, "normalize_weights": True}, "normalize_weights has no effect"),
    ],
)
def test_what_means_nothing_warns(arguments: dict[str, object], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        UniversalConfig(**arguments)
    assert caught[0].filename == __file__


def test_layers_and_vocabularies_that_do_not_fit_the_model(batches: Batches) -> None:
    model = DEEDTransformer(20, 16, 2)
    trainer = UniversalTrainer(UniversalConfig({1: 0.5, 3: 0.5}, layer_lr_scales={4: 0.1}), vocab_size=20)
    with pytest.raises(ConfigError, match=r"layer_weights names layers \[3\], expected layers from 1 to 2"):
        trainer.compute_loss(model, *batches[0])
    with pytest.raises(ConfigError, match=r"layer_lr_scales names layers \[4\]"):
        trainer.create_optimizer(model, 1e-3)
    with pytest.raises(ConfigError, match="vocab_size = 21, expected the model's: 20"):
        UniversalTrainer(UniversalConfig({1: 0.5, 2: 0.5}), vocab_size=21).compute_loss(model, *batches[0])
    with pytest.raises(ConfigError, match=r"exit_layer names layers \[3\], expected layers from 1 to 2"):
        UniversalTrainer(UniversalConfig({1: 0.5, 3: 0.1, 4: 0.5}, exit_layer=3), vocab_size=20).evaluate(
            model, batches
        )
    with pytest.raises(DataError, match="no batches"):
        UniversalTrainer(UniversalConfig({1: 0.5, 2: 0.5}), vocab_size=20).evaluate(model, [])


def test_token_routed_training_is_joint_then_routed(batches: Batches) -> None:
    model, (x, y) = (
        lively(
            TokenRoutedTransformer(vocab_size=20, dim=16, num_layers=3, exit_layer=1, routing_threshold=0.3)
        ),
        batches[0],
    )
    shallow, deep, confidence = model.forward_train(x)
    losses = [
        F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        for logits in (shallow, deep)
    ]
    joint = (0.7 * losses[0] + 0.3 * losses[1]).mean()
    torch.testing.assert_close(model.routed_loss(x, y, epoch=0), joint)
    torch.testing.assert_close(model.routed_loss(x, y, epoch=4), joint)
    leaves = confidence >= 0.3
    assert 0 < leaves.sum() < leaves.numel()
    torch.testing.assert_close(model.routed_loss(x, y, epoch=5), torch.where(leaves, *losses).mean())
    logits, left = model.routed_logits(x)
    assert torch.equal(left, leaves)
    assert torch.equal(logits, torch.where(leaves[..., None], shallow, deep))
    with pytest.raises(
        ConfigError, match="exit_layer = 3, expected a layer from 1 to 2: one before the last"
    ):
        TokenRoutedTransformer(20, 16, 3, exit_layer=3)


def test_mixture_of_depths_routes_every_second_block(batches: Batches) -> None:
    model = MoDTransformer(vocab_size=20, dim=16, num_layers=5)
    assert [isinstance(layer, RoutedBlock) for layer in model.layers] == [False, True, False, True, False]
    assert model.layers[1].capacity == 0.125
    assert MoDTransformer(20, 16, 2, capacity=0.5).layers[1].capacity == 0.5
    assert MoDTransformer(20, 16, 1).auxiliary_loss().item() == 0.0
    trainer = UniversalTrainer(UniversalConfig({1: 0, 5: 1}, routing_threshold=0), vocab_size=20)
    optimizer = trainer.create_optimizer(model, 1e-2)
    losses = [trainer.train_epoch(model, batches, optimizer)[0] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert 0 < model.auxiliary_loss().item() < 5
    assert trainer.evaluate(model, batches)["ppl"] < 20


def test_every_exported_name_loads() -> None:
    for name in ease_train.__all__:
        assert getattr(ease_train, name) is not None
    assert set(ease_train.__all__) <= set(dir(ease_train))
    with pytest.raises(AttributeError, match="has no attribute 'StandardTransformr'"):
        ease_train.StandardTransformr  # noqa: B018 - the attribute access is the test


@pytest.mark.parametrize(
    "code",
    [
        "import ease_train.data.corpora, ease_train.training.config, ease_train.methods.schedules",
        "from ease_train.cli import main",
    ],
)
def test_what_needs_no_torch_imports_none(code: str) -> None:
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    modules = json.loads(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    )
    assert "ease_train" in modules
    assert not {"torch", "datasets", "safetensors", "tokenizers"} & set(modules)
