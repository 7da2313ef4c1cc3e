"""Hidden states that are computed once: what is trained from them equals what is trained through
the layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from ease_common.errors import ConfigError, DataError
from ease_train.cli import main
from ease_train.methods.method import GateConfig
from ease_train.model.decoder import Decoder
from ease_train.training import states as states_module
from ease_train.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ease_train.training.config import Recipe, load_recipe
from ease_train.training.gates import GateReport, GateTrainer
from ease_train.training.states import StateCache
from ease_train.training.trainer import EvalEvent, StatesEvent, StepEvent, Trainer
from ease_train.training.tune import begin_tuning

Maker = Callable[..., Recipe]
EXITS = {
    "exits": [2, 3],
    "layer_weights": {2: 1.0, 3: 0.5},
    "exit_vocab_size": 9,
    "distill_temperature": 2.0,
    "distill_hidden_weight": 0.1,
}
QUICK = {
    "steps": 8,
    "batch_size": 8,
    "sequence_length": 32,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_tokens": 64,
    "save_every": 4,
}


@pytest.fixture
def trained(make_recipe: Maker, small_corpus: str) -> Checkpoint:
    return Trainer.begin(
        make_recipe(model={"exits": [4]}, train={"layer_weights": {4: 1.0}}), small_corpus
    ).checkpoint


def begin(trained: Checkpoint, cache: Path | None = None, **options: Any) -> Trainer:
    recipe = load_recipe("kangaroo-reduced-head")
    return begin_tuning(trained, recipe, {**EXITS, **QUICK, **options}, cache=cache)


def ask(model: Decoder) -> Callable[..., Any]:
    def asked(question: Callable[..., Any], blocks: NDArray[np.int32], *more: Any) -> Any:
        ids = torch.from_numpy(blocks.astype(np.int64))
        return question(model, ids[:, :-1], ids[:, 1:], *more)

    return asked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exit_head": "tied", "exit_vocab_size": 0},
        {"labels": "text", "exit_adapter": "mlp"},
        {"accumulate": 2},
    ],
)
def test_training_from_kept_states_is_training(
    trained: Checkpoint, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = begin(trained, **options)
    kept = begin(trained, tmp_path / "cache", **options)
    runs = [list(trainer.fit(tmp_path / name)) for name, trainer in (("plain", plain), ("kept", kept))]
    assert kept.train_states is not None
    assert kept.train_states.full
    assert plain.train_states is None
    steps = [[event for event in run if isinstance(event, StepEvent)] for run in runs]
    evaluations = [[event for event in run if isinstance(event, EvalEvent)] for run in runs]
    for one, other in zip(*steps, strict=True):
        assert {2: one.exit_losses[2], 3: one.exit_losses[3]} == pytest.approx(other.exit_losses, rel=1e-5)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for first, second in zip(*evaluations, strict=True):
        assert first.perplexity == pytest.approx(second.perplexity, rel=1e-5)
        assert first.agreement == pytest.approx(second.agreement, abs=1e-6)
    weights = kept.model.state_dict()
    assert all(
        torch.allclose(value, weights[name], rtol=1e-4, atol=1e-5)
        for name, value in plain.model.state_dict().items()
    )
    untrained = begin(trained, **options).model.state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in weights.items())


def test_the_states_are_the_models(trained: Checkpoint, tmp_path: Path) -> None:
    trainer = begin(trained, tmp_path)
    events = list(trainer.fill_states())
    cache = trainer.train_states
    model = trainer.model
    assert cache is not None
    assert events[0] == StatesEvent(0, len(trainer.blocks), cache.num_bytes, cache.path)
    assert sum(file.stat().st_size for file in cache.path.iterdir()) == cache.num_bytes
    numbers = np.array([3, 0, 5])
    states = cache.of(numbers)
    ids = torch.from_numpy(trainer.blocks[numbers].astype(np.int64))
    with torch.no_grad():
        hidden = dict(model.exit_states(ids[:, :-1]))
        logits = model(ids[:, :-1])
    for layer in (2, 3):
        torch.testing.assert_close(states.hidden[layer], hidden[layer])
    torch.testing.assert_close(states.last, model.norm(hidden[4]))
    assert torch.equal(states.top, logits.argmax(-1))
    torch.testing.assert_close(states.log_sums, (logits / 2.0).logsumexp(-1))
    torch.testing.assert_close(
        states.losses, torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    )


def test_a_killed_fill_goes_on(trained: Checkpoint, tmp_path: Path) -> None:
    trainer = begin(trained)
    model = trainer.model
    blocks = trainer.blocks[:11]
    whole, parts = (StateCache(tmp_path / name, model, blocks, 1.0, "fp32") for name in ("whole", "parts"))
    assert list(whole.fill(ask(model))) == [0, 4, 8, 11]
    filling = parts.fill(ask(model))
    assert [next(filling), next(filling)] == [0, 4]
    filling.close()
    assert not parts.full
    partial = parts.path.with_suffix(".partial")
    with (partial / "last").open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b"half a row")
    (partial / "top").write_bytes((partial / "top").read_bytes()[:-1])
    assert list(StateCache(tmp_path / "parts", model, blocks, 1.0, "fp32").fill(ask(model))) == [3, 7, 11]
    assert parts.full
    for file in whole.path.iterdir():
        assert file.read_bytes() == (parts.path / file.name).read_bytes()
    assert list(parts.fill(ask(model))) == []


def test_the_key_is_all_that_the_states_depend_on(trained: Checkpoint, tmp_path: Path) -> None:
    trainer = begin(trained)
    model = trainer.model
    blocks = trainer.blocks[:5]

    def path(temperature: float = 1.0, precision: str = "fp32", chosen: NDArray[np.int32] = blocks) -> Path:
        return StateCache(tmp_path, model, chosen, temperature, precision).path

    before = path()
    with torch.no_grad():
        model.exit(2).adapter.mlp.up_proj.weight += 1.0
        model.reduced_head.known.weight += 1.0
    assert path() == before
    others = {path(2.0), path(1.0, "bf16"), path(chosen=trainer.blocks[1:6])}
    with torch.no_grad():
        model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    others.add(path())
    assert len(others - {before}) == 4


def test_a_full_disk_is_one_line(
    trained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin(trained, tmp_path)
    monkeypatch.setattr(states_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(
        DataError,
        match=r"hidden states take 0\.0 GB more in .*, which has 0\.0 GB; use another --cache, less text, or "
        r"none",
    ):
        list(trainer.fit(tmp_path / "c"))


def test_layers_that_learn_or_are_dropped_keep_no_states(trained: Checkpoint, tmp_path: Path) -> None:
    assert begin(trained, tmp_path).train_states is not None
    for options in ({"trains": "all"}, {"layer_dropout": 0.1}):
        assert begin(trained, tmp_path, **options).train_states is None


def test_gates_use_the_states_of_tuning(trained: Checkpoint, tmp_path: Path) -> None:
    for _ in begin(trained, tmp_path / "cache").fit(tmp_path / "tuned"):
        pass
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    settings = GateConfig(steps=10, batch_size=2, eval_tokens=64)
    tuned = [load_checkpoint(tmp_path / "tuned") for _ in range(2)]
    plain = GateTrainer(tuned[0], settings)
    cached = GateTrainer(tuned[1], settings, cache=tmp_path / "cache")
    reports = [
        next(event for event in trainer.fit() if isinstance(event, GateReport)) for trainer in (plain, cached)
    ]
    assert kept == {path.name for path in (tmp_path / "cache").iterdir()}
    for layer, quality in reports[0].gates.items():
        assert reports[1].gates[layer].agreement == quality.agreement
        assert reports[1].gates[layer].auc == pytest.approx(quality.auc, abs=1e-3)
        for one, other in zip(plain.gates[layer].parameters(), cached.gates[layer].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_an_imported_model_needs_its_data_named(
    trained: Checkpoint, small_corpus: str, tmp_path: Path
) -> None:
    trained.data = "unknown"
    save_checkpoint(trained, tmp_path / "imported")
    with pytest.raises(
        ConfigError, match="what it was trained on is unknown; name the text to train on with --data"
    ):
        begin(trained)
    result = CliRunner().invoke(main, ["gates", str(tmp_path / "imported"), "--out", str(tmp_path / "gated")])
    assert result.exit_code == 1
    assert "no early exit" in result.stderr
    numbers = "--exits 2 --layer-weights 2 1 --exit-vocab-size 9 --steps 2 --warmup-steps 1 --batch-size 2"
    numbers += " --sequence-length 16 --eval-tokens 32 --threads 1"
    command = [
        "tune",
        str(tmp_path / "imported"),
        "--recipe",
        "kangaroo-reduced-head",
        "--out",
        str(tmp_path / "tuned"),
        *numbers.split(),
    ]
    assert "name the text to train on with --data" in CliRunner().invoke(main, command).stderr
    result = CliRunner().invoke(main, [*command, "--data", small_corpus, "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    assert "hidden states of" in result.output
    gates = [
        "gates",
        str(tmp_path / "tuned"),
        "--out",
        str(tmp_path / "gated"),
        "--cache",
        str(tmp_path / "cache"),
        "--threads",
        "1",
    ]
    result = CliRunner().invoke(main, [*gates, "--steps", "2", "--batch-size", "2", "--eval-tokens", "32"])
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "gated").recipe.model.gates == (2,)
