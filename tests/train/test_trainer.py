"""The loop: its schedule, its data order, what it yields, and that an interrupted run goes on bit for bit."""

import csv
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ease_common.errors import ConfigError, DataError, DivergenceError
from ease_train.methods.losses import exit_losses
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import Recipe, TrainConfig
from ease_train.training.optimizer import create_optimizer, learning_rate
from ease_train.training.trainer import EvalEvent, SaveEvent, StepEvent, Trainer

Maker = Callable[..., Recipe]


def test_the_learning_rate_follows_the_formula() -> None:
    settings = TrainConfig(learning_rate=2e-3, warmup_steps=10, steps=110, min_lr_ratio=0.1)
    assert [learning_rate(step, settings) for step in (0, 4, 9)] == pytest.approx([2e-4, 1e-3, 2e-3])
    for share, factor in [(0.0, 1.0), (0.5, 0.55), (1.0, 0.1), (0.25, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)]:
        assert learning_rate(10 + int(100 * share), settings) == pytest.approx(2e-3 * factor)
    falling = [learning_rate(step, settings) for step in range(10, 110)]
    assert falling == sorted(falling, reverse=True)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, TrainConfig(learning_rate=1.0, warmup_steps=0, steps=5)) == 1.0


def test_only_matrices_decay(recipe: Recipe, small_corpus: str) -> None:
    trainer = Trainer.begin(recipe, small_corpus)
    decayed, free = create_optimizer(trainer.model, recipe.train).param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    count = sum(p.numel() for group in (decayed, free) for p in group["params"])
    assert count == sum(p.numel() for p in trainer.model.parameters())


def test_what_a_run_yields(recipe: Recipe, small_corpus: str, tmp_path: Path) -> None:
    events = list(Trainer.begin(recipe, small_corpus).fit(tmp_path / "c"))
    assert [e.step for e in events if isinstance(e, StepEvent)] == list(range(1, 13))
    assert [e.step for e in events if isinstance(e, EvalEvent)] == [6, 12]
    assert [e.step for e in events if isinstance(e, SaveEvent)] == [4, 8, 12]
    steps = [e for e in events if isinstance(e, StepEvent)]
    assert all(
        e.loss == pytest.approx(0.3 * e.exit_losses[2] + 0.2 * e.exit_losses[3] + e.exit_losses[4], rel=1e-5)
        for e in steps
    )
    assert steps[-1].loss < steps[0].loss
    lines = [
        json.loads(line)
        for line in (tmp_path / "c" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert lines[-1]["perplexity"]["4"] == pytest.approx(events[-2].perplexity[4])


def test_the_validation_perplexity_is_a_mean_over_tokens(recipe: Recipe, small_corpus: str) -> None:
    trainer = Trainer.begin(recipe, small_corpus)
    found = trainer.evaluate().perplexity
    assert trainer.validation.shape == (4, 17)  # eval_tokens 64
    ids = torch.from_numpy(trainer.validation.astype(np.int64))
    expected = exit_losses(trainer.model, ids[:, :-1], ids[:, 1:])
    assert found == pytest.approx({layer: math.exp(loss) for layer, loss in expected.items()}, rel=1e-6)


def test_an_epoch_reads_every_block_once_in_an_order_of_its_own(
    make_recipe: Maker, small_corpus: str
) -> None:
    trainer = Trainer.begin(make_recipe(train={"batch_size": 3}), small_corpus)
    trainer.blocks = np.arange(11 * 17, dtype=np.int32).reshape(11, 17)
    epochs = []
    for epoch in range(2):
        seen = []
        for place in range(3):
            trainer.checkpoint.step = 3 * epoch + place
            seen += trainer.next_batch()[:, 0].tolist()
        assert len(set(seen)) == 9  # three batches of three; the incomplete one is left out
        epochs.append(seen)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("killed_after", [4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(
    recipe: Recipe, small_corpus: str, tmp_path: Path, killed_after: int
) -> None:
    whole = list(Trainer.begin(recipe, small_corpus).fit(tmp_path / "whole"))
    losses = {
        e.step: (e.loss, e.exit_losses, e.learning_rate, e.grad_norm)
        for e in whole
        if isinstance(e, StepEvent)
    }
    for event in Trainer.begin(recipe, small_corpus).fit(tmp_path / "cut"):
        if event.step == killed_after + 1:
            break  # step 8 or 5 was computed, but the last checkpoint is that of step 4
    resumed = [e for e in Trainer.resume(tmp_path / "cut").fit(tmp_path / "cut") if isinstance(e, StepEvent)]
    assert [e.step for e in resumed] == list(range(5, 13))
    assert all((e.loss, e.exit_losses, e.learning_rate, e.grad_norm) == losses[e.step] for e in resumed)
    one = load_checkpoint(tmp_path / "whole", resume=True)
    other = load_checkpoint(tmp_path / "cut", resume=True)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert [line["step"] for line in other.metrics] == [line["step"] for line in one.metrics]


def test_a_seed_is_a_run(make_recipe: Maker, small_corpus: str) -> None:
    def first_loss(seed: int) -> float:
        trainer = Trainer.begin(make_recipe(train={"seed": seed}), small_corpus)
        return trainer.train_step(trainer.next_batch()).loss

    assert first_loss(1) == first_loss(1)
    assert first_loss(1) != first_loss(2)


def run_with_a_bad_weight(trainer: Trainer, out: Path) -> None:
    for event in trainer.fit(out):
        if event.step == 5 and isinstance(event, StepEvent):
            with torch.no_grad():
                trainer.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan


def test_divergence_stops_and_keeps_the_last_checkpoint(
    recipe: Recipe, small_corpus: str, tmp_path: Path
) -> None:
    message = (
        r"the loss is nan.* at step 6; the last checkpoint is kept; try a lower learning_rate than 0\.002"
    )
    with pytest.raises(DivergenceError, match=message):
        run_with_a_bad_weight(Trainer.begin(recipe, small_corpus), tmp_path / "c")
    kept = load_checkpoint(tmp_path / "c", resume=True)
    assert kept.step == 4
    assert all(torch.isfinite(p).all() for p in kept.model.parameters())


def test_divergence_before_the_first_checkpoint_promises_none(recipe: Recipe, small_corpus: str) -> None:
    trainer = Trainer.begin(recipe, small_corpus)
    with torch.no_grad():
        trainer.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(DivergenceError, match=r"the loss is nan.* at step 1; try a lower"):
        trainer.train_step(trainer.next_batch())


def test_a_gradient_that_is_no_number_leaves_the_weights_alone(recipe: Recipe, small_corpus: str) -> None:
    trainer = Trainer.begin(recipe, small_corpus)
    trainer.model.embed.weight.register_hook(lambda grad: grad * math.inf)
    before = trainer.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(DivergenceError, match=r"gradient's norm (nan|inf)"):
        trainer.train_step(trainer.next_batch())
    assert torch.equal(trainer.model.layers[0].mlp.up_proj.weight, before)


def test_a_corpus_too_small_for_one_batch(make_recipe: Maker, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(20)), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"few\.jsonl \(train\) has 63 tokens: 3 blocks of 16, expected at least 50"
    ):
        Trainer.begin(make_recipe(train={"batch_size": 50}), str(path))


def test_accumulation_is_one_larger_batch(make_recipe: Maker, small_corpus: str) -> None:
    whole = Trainer.begin(make_recipe(train={"batch_size": 6}), small_corpus)
    parts = Trainer.begin(make_recipe(train={"batch_size": 2, "accumulate": 3}), small_corpus)
    for _ in range(3):
        assert np.array_equal(whole.next_batch(), parts.next_batch())
        one = whole.train_step(whole.next_batch())
        other = parts.train_step(parts.next_batch())
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.exit_losses == pytest.approx(one.exit_losses, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.003)])
def test_half_precision_follows_fp32_from_afar(
    make_recipe: Maker, small_corpus: str, precision: str, tolerance: float
) -> None:
    exact, rounded = (
        Trainer.begin(make_recipe(train={"precision": p}), small_corpus) for p in ("fp32", precision)
    )
    steps = [[trainer.train_step(trainer.next_batch()) for _ in range(6)] for trainer in (exact, rounded)]
    losses = [[step.loss for step in of_one] for of_one in steps]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert [step.grad_norm for step in steps[1]] == pytest.approx(
        [step.grad_norm for step in steps[0]], rel=2 * tolerance
    )
    assert losses[1] != losses[0]
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())
    assert rounded.evaluate().perplexity == pytest.approx(exact.evaluate().perplexity, rel=0.05)


def test_fp16_leaves_out_a_step_that_overflows_and_goes_on(
    make_recipe: Maker, small_corpus: str, tmp_path: Path
) -> None:
    """The loss is scaled up before the backward pass, less each time that the gradient overflows; resuming
    keeps the scale.
    """
    trainer = Trainer.begin(make_recipe(train={"precision": "fp16", "save_every": 1}), small_corpus)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    step = trainer.train_step(trainer.next_batch())
    assert not math.isfinite(step.grad_norm)
    assert math.isfinite(step.loss)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**99
    trainer.save(tmp_path / "c")
    assert Trainer.resume(tmp_path / "c").scaler.get_scale() == 2.0**99
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.model.embed.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(DivergenceError, match=r"gradient's norm (nan|inf)"):
        trainer.train_step(trainer.next_batch())


def test_patience_ends_a_run_that_gets_no_better(
    make_recipe: Maker, small_corpus: str, tmp_path: Path
) -> None:
    def run(patience: int, perplexities: list[float], out: Path) -> tuple[list[int], Trainer]:
        settings = {"patience": patience, "eval_every": 1, "save_every": 100, "steps": len(perplexities)}
        trainer = Trainer.begin(make_recipe(train=settings), small_corpus)
        trainer.evaluate = lambda: EvalEvent(
            trainer.checkpoint.step, {4: perplexities[trainer.checkpoint.step - 1]}
        )
        return [event.step for event in trainer.fit(out) if isinstance(event, StepEvent)], trainer

    noisy = [9.0, 8.0, 8.5, 7.0, 7.5, 7.2, 7.1, 6.0]
    assert run(0, noisy, tmp_path / "a")[0] == list(range(1, 9))
    assert run(1, noisy, tmp_path / "b")[0] == [1, 2, 3]
    assert run(2, noisy, tmp_path / "c")[0] == [1, 2, 3, 4, 5, 6]
    assert load_checkpoint(tmp_path / "a").step == 8
    assert load_checkpoint(tmp_path / "c").step == 4  # the best, though it stopped after 6
    assert Trainer.resume(tmp_path / "c").checkpoint.step == 6
    assert list(Trainer.resume(tmp_path / "c").fit(tmp_path / "c")) == []


PATIENT = {
    "patience": 3,
    "eval_every": 2,
    "save_every": 4,
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "steps": 16,
}


@pytest.mark.parametrize("killed_after", [5, 9])
def test_patience_keeps_the_best_model_and_the_curve(
    make_recipe: Maker, small_corpus: str, tmp_path: Path, killed_after: int
) -> None:
    """Whether or not the run is killed, the model is that of the best evaluation, which is not the
    last one.
    """
    run = Trainer.begin(make_recipe(train=PATIENT), small_corpus)
    evaluations = {}
    models = {}
    for event in run.fit(tmp_path / "whole"):
        if isinstance(event, EvalEvent):
            evaluations[event.step] = event.perplexity[4]
            models[event.step] = {name: value.clone() for name, value in run.model.state_dict().items()}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best < max(evaluations)
    for event in Trainer.begin(make_recipe(train=PATIENT), small_corpus).fit(tmp_path / "cut"):
        if event.step == killed_after:
            break
    resumed = list(Trainer.resume(tmp_path / "cut").fit(tmp_path / "cut"))
    found = {event.step: event.perplexity[4] for event in resumed if isinstance(event, EvalEvent)}
    assert found == {step: value for step, value in evaluations.items() if step > killed_after // 4 * 4}
    saved = [event for event in resumed if isinstance(event, SaveEvent)][-1]
    assert (saved.step, saved.model_step) == (max(evaluations), best)
    for name in ("whole", "cut"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint.step == best
        assert all(
            torch.equal(value, models[best][key]) for key, value in checkpoint.model.state_dict().items()
        )


def test_a_sample_is_greedy_at_full_depth(make_recipe: Maker, small_corpus: str) -> None:
    trainer = Trainer.begin(make_recipe(train={"sample_tokens": 5}), small_corpus)
    tokenizer = trainer.checkpoint.tokenizer
    ids = [0]
    for _ in range(5):
        ids.append(int(trainer.model(torch.tensor([ids]))[0, -1].argmax()))
    assert trainer.evaluate().sample == tokenizer.decode(ids[1:])
    assert trainer.sample(0) == ""
    assert len(trainer.sample(10_000)) <= trainer.recipe.model.max_positions


def test_the_metrics_are_a_table_too(recipe: Recipe, small_corpus: str, tmp_path: Path) -> None:
    steps = [e for e in Trainer.begin(recipe, small_corpus).fit(tmp_path / "c") if isinstance(e, StepEvent)]
    with (tmp_path / "c" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [float(row["exit_losses_3"]) for row in rows] == [step.exit_losses[3] for step in steps]
    assert [row["step"] for row in rows if row["perplexity_4"]] == ["6", "12"]


KILLED = """
import json, sys
from pathlib import Path
from typing import Any
import torch
from ease_train.training.config import Recipe
from ease_train.training.trainer import Trainer

torch.set_num_threads(1)
out = Path(sys.argv[3])
recipe = Recipe.from_dict(json.loads(sys.argv[1]), "tiny")
trainer = Trainer.resume(out) if out.exists() else Trainer.begin(recipe, sys.argv[2])
for event in trainer.fit(out):
    print(event.step, flush=True)
"""


def test_a_kill_at_any_moment_loses_nothing(make_recipe: Maker, small_corpus: str, tmp_path: Path) -> None:
    """Saving after every step, so that a kill falls into a save more often than not."""
    recipe = make_recipe(
        train={"steps": 300, "save_every": 1, "eval_every": 300}, method={"layer_dropout": 0.2}
    )
    out = tmp_path / "killed"
    for lines in (5, 23):  # the first to see a checkpoint, then somewhere behind it
        command = [sys.executable, "-c", KILLED, json.dumps(recipe.to_dict()), small_corpus, str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
        assert process.returncode == -signal.SIGKILL
    resumed = Trainer.resume(out)
    begun = resumed.checkpoint.step
    assert begun >= 10
    whole = Trainer.begin(recipe, small_corpus)
    for _ in range(begun):
        whole.train_step(whole.next_batch())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    after = [resumed.train_step(resumed.next_batch()).loss for _ in range(5)]
    assert after == [whole.train_step(whole.next_batch()).loss for _ in range(5)]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"train": {"warmup_steps": 13}}, "train: warmup_steps = 13, expected at most steps = 12; set both"),
        (
            {"method": {"exit_warmup": "linear", "exit_warmup_steps": 99}},
            "method.exit_warmup: steps = 99, expected at most steps = 12; set both",
        ),
        (
            {"method": {"routing_threshold": 0.5, "routing_warmup_steps": 99}},
            "method.routing: warmup_steps = 99, expected at most steps = 12; set both",
        ),
    ],
)
def test_a_warm_up_longer_than_the_run_is_refused(
    make_recipe: Maker, small_corpus: str, tables: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer.begin(make_recipe(**tables), small_corpus)
    assert str(error.value) == message
