"""Gates: labels, balance, calibration, quality, and that the model under them stays as it was."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_common.errors import ConfigError
from ease_train.cli import main
from ease_train.methods import losses
from ease_train.methods.method import GateConfig
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import Recipe
from ease_train.training.gates import (
    GateReport,
    GateStep,
    GateTrainer,
    agreement,
    auc,
    balanced_loss,
    platt_scaling,
    quality,
)
from ease_train.training.trainer import Trainer

QUICK = {"steps": 60, "batch_size": 8, "learning_rate": 0.03, "eval_tokens": 2000}


@pytest.fixture
def trained(recipe: Recipe, small_corpus: str, tmp_path: Path) -> Path:
    """A model trained for a few steps, its exits disagreeing with its last layer now and then."""
    for _ in Trainer.begin(recipe, small_corpus).fit(tmp_path / "c"):
        pass
    return tmp_path / "c"


def test_the_label_is_agreement_with_the_last_layer(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(trained).model.eval()
    with torch.no_grad():
        for parameter in model.layers[2:].parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        ids = torch.randint(model.config.vocab_size, (4, 16))
        said = {
            layer: model.exit(layer).head(model.exit_hidden(h, layer)).argmax(-1).flatten()
            for layer, h in model.exit_states(ids)
        }
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 7 * model.config.vocab_size)
        found = agreement(model, ids)
    assert set(found) == {2, 3}
    for layer, (hidden, labels) in found.items():
        assert torch.equal(labels, said[layer] == said[4])
        assert 0 < labels.sum() < 64
        torch.testing.assert_close(
            hidden, model.exit_hidden(dict(model.exit_states(ids))[layer], layer).flatten(0, 1)
        )


def test_exits_with_a_reduced_head_agree_where_they_say_the_same(make_recipe: Callable[..., Recipe]) -> None:
    model = Decoder(
        make_recipe(model={"vocab_size": 40, "exit_head": "reduced", "exit_vocab_size": 20}).model
    ).eval()
    ids = torch.randint(40, (4, 16))
    states = dict(model.exit_states(ids))
    last = model.lm_head(model.norm(states[4])).argmax(-1).flatten()
    counts = torch.zeros(40, dtype=torch.int64).index_fill(
        0, last.unique()[::2], 1
    )  # every second token that the last layer says
    model.reduced_head.choose_tokens(counts, model.lm_head.weight)
    found = agreement(model, ids)
    assert 0 < torch.isin(last, model.reduced_head.ids).sum() < 64
    for layer, (hidden, labels) in found.items():
        assert torch.equal(labels, model.exit(layer).head(hidden).argmax(-1) == last)


def test_both_classes_weigh_the_same() -> None:
    scores = torch.randn(50)
    labels = torch.rand(50) < 0.9
    weights = torch.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    expected = F.binary_cross_entropy_with_logits(scores, labels.float(), weights, reduction="sum")
    torch.testing.assert_close(balanced_loss(scores, labels), expected)
    everyone = torch.ones(50, dtype=torch.bool)
    torch.testing.assert_close(balanced_loss(scores, everyone), F.softplus(-scores).mean())


def test_scaling_finds_the_temperature_and_the_shift() -> None:
    logits = torch.randn(200_000) * 1.5 - 0.5
    labels = torch.rand(200_000) < torch.sigmoid(logits)
    temperature, shift = platt_scaling(logits * 3.0 + 0.6, labels)  # logit = (score - 0.6) / 3
    assert temperature == pytest.approx(3.0, rel=0.03)
    assert shift == pytest.approx(-0.6, abs=0.05)


def test_the_quality_of_a_gate_by_hand() -> None:
    probabilities = torch.tensor([0.95, 0.95, 0.95, 0.15])
    labels = torch.tensor([True, True, False, False])
    found = quality(probabilities, labels, 1.5)
    assert found.agreement == 0.5
    assert found.brier == pytest.approx((2 * 0.05**2 + 0.95**2 + 0.15**2) / 4)
    assert found.ece == pytest.approx(0.75 * abs(0.95 - 2 / 3) + 0.25 * 0.15)
    assert found.auc == pytest.approx(0.75)  # of four pairs two are in order and two tied
    assert found.temperature == 1.5


def test_auc_is_the_chance_that_a_pair_is_in_order() -> None:
    scores = torch.randn(60).round(decimals=1)
    labels = torch.rand(60) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    assert auc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(scores, torch.ones(60, dtype=torch.bool)) == 0.5


def test_only_the_gates_change(trained: Path) -> None:
    before = load_checkpoint(trained).model.state_dict()
    trainer = GateTrainer(load_checkpoint(trained), GateConfig(**{**QUICK, "steps": 3}))
    list(trainer.fit())
    after = trainer.checkpoint.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name for name in after if name not in before} == {
        f"exits.{layer}.gate.{part}"
        for layer in (2, 3)
        for part in ("score.out.weight", "score.out.bias", "temperature")
    }
    assert all(after[f"exits.{layer}.gate.temperature"] > 0 for layer in (2, 3))
    fresh = GateTrainer(load_checkpoint(trained), GateConfig(**QUICK)).checkpoint.model.state_dict()
    assert not torch.equal(after["exits.2.gate.score.out.weight"], fresh["exits.2.gate.score.out.weight"])


def test_gates_learn_and_are_calibrated(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    with torch.no_grad():
        for parameter in checkpoint.model.layers[3].parameters():
            parameter.mul_(8.0)  # a last layer that changes its mind
    trainer = GateTrainer(checkpoint, GateConfig(**{**QUICK, "steps": 150, "gate_width": 8}))
    events = list(trainer.fit())
    steps = [event for event in events if isinstance(event, GateStep)]
    assert len(steps) == 150
    for layer in (2, 3):
        early, late = (sum(e.losses[layer] for e in part) / 10 for part in (steps[:10], steps[-10:]))
        assert late < early
    report = events[-1]
    assert isinstance(report, GateReport)
    for layer, found in report.gates.items():
        assert 0.02 < found.agreement < 0.98
        assert found.auc > 0.7
        assert found.ece < 0.1
        assert found.brier < found.agreement * (1 - found.agreement)  # better than always saying the share
        assert trainer.model.exit(layer).gate.temperature.item() == pytest.approx(found.temperature)


def test_the_same_seed_gives_the_same_gates(trained: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        trainer = GateTrainer(load_checkpoint(trained), GateConfig(**{**QUICK, "steps": 4, "seed": seed}))
        list(trainer.fit())
        return trainer.model.exit(2).gate.score.out.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["gates", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output, result.stderr


def test_the_command(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "gated"
    code, output, _ = run(
        str(trained),
        "--out",
        str(out),
        "--steps",
        "5",
        "--eval-tokens",
        "200",
        "--threads",
        "1",
        "--gate-width",
        "6",
    )
    assert code == 0, output
    assert "gate at layer 2: agrees" in output
    gated = load_checkpoint(out)
    assert (gated.recipe.model.gates, gated.recipe.model.gate_width, gated.step) == ((2, 3), 6, 12)
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert set(last["gates"]) == {"2", "3"}
    assert all(math.isfinite(value) for gate in last["gates"].values() for value in gate.values())
    code, output, _ = run(
        str(out), "--out", str(tmp_path / "again"), "--steps", "2", "--eval-tokens", "200", "--threads", "1"
    )
    assert code == 0, output  # gates may be trained anew
    assert load_checkpoint(tmp_path / "again").recipe.model.gate_width == 0
    assert run(str(trained), "--out", str(out))[0] == 1


def test_bad_input(recipe: Recipe, small_corpus: str, tmp_path: Path, trained: Path) -> None:
    code, _, message = run(str(trained), "--out", str(tmp_path / "g"), "--steps", "0")
    assert (code, message) == (1, "error: gates: steps = 0, expected at least 1\n")
    code, _, message = run(str(tmp_path / "none"), "--out", str(tmp_path / "g"))
    assert code == 1
    assert "no checkpoint at" in message
    values = {**recipe.to_dict(), "model": {**recipe.model.to_dict(), "exits": [4]}}
    values["train"]["layer_weights"] = {"4": 1.0}
    trainer = Trainer.begin(Recipe.from_dict(values, "t"), small_corpus)
    with pytest.raises(ConfigError, match=r"no early exit to put a gate at; exits = \[4\]"):
        GateTrainer(trainer.checkpoint, GateConfig())
