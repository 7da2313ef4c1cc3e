"""Two processes over gloo against one process with twice the batch, started as a user would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ease_common.errors import ConfigError
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import Recipe
from ease_train.training.parallel import Workers
from ease_train.training.trainer import StepEvent, Trainer

ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--dynamo_backend",
    "no",
]
ACCELERATE += ["--mixed_precision", "no", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]

WORKER = """
import json, sys
from pathlib import Path
import torch
from ease_train.training.config import Recipe
from ease_train.training.trainer import StepEvent, Trainer

torch.set_num_threads(1)
recipe = Recipe.from_dict(json.loads(sys.argv[1]), "tiny")
out, sharded = Path(sys.argv[3]), bool(int(sys.argv[4]))
curve = []

def note(event):
    if isinstance(event, StepEvent):
        curve.append([event.step, event.loss, event.grad_norm, *event.exit_losses.values()])

trainer = Trainer.begin(recipe, sys.argv[2], sharded=sharded)
for event in trainer.fit(out):
    note(event)
    if event.step == 6:
        break  # the last checkpoint is that of step 4
for event in Trainer.resume(out, sharded=sharded).fit(out):
    note(event)
Path(sys.argv[5], f"{trainer.workers.rank}.json").write_text(json.dumps([trainer.workers.count, curve]))
"""


def launch(launcher: list[str], *command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    found = subprocess.run(
        [sys.executable, *launcher, *command],
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr


def one_process(recipe: Recipe, corpus: str, out: Path) -> list[list[float]]:
    events = Trainer.begin(recipe, corpus).fit(out)
    return [
        [e.step, e.loss, e.grad_norm, *e.exit_losses.values()] for e in events if isinstance(e, StepEvent)
    ]


def assert_same_model(one: Path, two: Path) -> None:
    expected, found = (load_checkpoint(path).model.state_dict() for path in (one, two))
    assert list(expected) == list(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(["--multi_gpu"], id="DDP"),
        pytest.param(["--use_fsdp", "--fsdp_version", "2"], id="FSDP", marks=pytest.mark.slow),
    ],
)
def test_accelerate_launch_follows_the_curve_of_twice_the_batch(
    make_recipe: Callable[..., Recipe], small_corpus: str, tmp_path: Path, kind: list[str]
) -> None:
    """The command of the README; what the run says is read from its checkpoint."""
    expected = one_process(make_recipe(train={"batch_size": 4}), small_corpus, tmp_path / "one")
    options = [
        "--kind",
        "char",
        "--dim",
        "16",
        "--num-layers",
        "4",
        "--num-heads",
        "2",
        "--num-kv-heads",
        "1",
        "--ffn-dim",
        "32",
    ]
    options += [
        "--max-positions",
        "32",
        "--sequence-length",
        "16",
        "--steps",
        "12",
        "--batch-size",
        "2",
        "--warmup-steps",
        "3",
    ]
    options += ["--learning-rate", "2e-3", "--log-every", "1", "--eval-every", "6", "--eval-tokens", "64"]
    for layer, weight in ((2, 0.3), (3, 0.2), (4, 1.0)):
        options += ["--exits", str(layer), "--layer-weights", str(layer), str(weight)]
    launch(
        [*ACCELERATE, *kind, "-m"],
        "ease_train.cli",
        "fit",
        "demo",
        "--data",
        small_corpus,
        "--out",
        str(tmp_path / "two"),
        *options,
    )
    metrics = [line for line in load_checkpoint(tmp_path / "two").metrics if "loss" in line]
    found = [
        [line["step"], line["loss"], line["grad_norm"], *line["exit_losses"].values()] for line in metrics
    ]
    assert len(found) == 12
    for found_step, expected_step in zip(found, expected, strict=True):
        assert found_step == pytest.approx(expected_step, rel=1e-5)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("sharded", "tables"),
    [
        pytest.param(True, {"train": {"recompute_activations": True}}, id="FSDP"),
        pytest.param(
            False,
            {"train": {"accumulate": 2}, "method": {"curriculum": "rotational"}},
            id="DDP",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_torchrun_follows_the_curve_of_twice_the_batch_and_resumes(
    make_recipe: Callable[..., Recipe],
    small_corpus: str,
    tmp_path: Path,
    sharded: bool,
    tables: dict[str, dict[str, Any]],
) -> None:
    """Weights and optimizer in shards, or whole with exits that rest; both runs are cut after step 6 and go
    on from step 4.
    """
    method = tables.get("method", {})
    train = tables["train"]
    expected = one_process(
        make_recipe(train={**train, "batch_size": 4}, method=method), small_corpus, tmp_path / "one"
    )
    recipe = make_recipe(train={**train, "batch_size": 2}, method=method)
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    arguments = (
        json.dumps(recipe.to_dict()),
        small_corpus,
        str(tmp_path / "two"),
        str(int(sharded)),
        str(tmp_path),
    )
    launch(TORCHRUN, str(tmp_path / "worker.py"), *arguments)
    (count, curve), other = (
        json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)
    )
    assert [count, curve] == other
    assert count == 2
    assert [step[0] for step in curve] == [*range(1, 7), *range(5, 13)]
    for found in curve:
        assert found == pytest.approx(expected[int(found[0]) - 1], rel=1e-5)
    assert_same_model(tmp_path / "one", tmp_path / "two")
    one, two = (
        load_checkpoint(tmp_path / name, resume=True).train_state["optimizer"]["state"]
        for name in ("one", "two")
    )
    assert {
        number: {name: value.shape for name, value in values.items()} for number, values in two.items()
    } == {number: {name: value.shape for name, value in values.items()} for number, values in one.items()}
    assert next(Trainer.resume(tmp_path / "two").fit(tmp_path / "two"), None) is None  # whole, and at its end


def test_a_process_alone_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Workers.join("cpu") == Workers(0, 1, torch.device("cpu"))
    assert Workers().mean([1.0, 2.0]) == [1.0, 2.0]
    assert Workers().share("text") == "text"
    with pytest.raises(ConfigError, match="one process has nothing to shard the weights over"):
        Workers.join("cpu", sharded=True)


def test_an_environment_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = (
        "WORLD_SIZE = 2 without RANK, MASTER_ADDR, MASTER_PORT; start with torchrun or accelerate launch"
    )
    with pytest.raises(ConfigError, match=message):
        Workers.join("cpu")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="accelerate's DEEPSPEED is not supported"):
        Workers.join("cpu")


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="device = 'cuda' cannot be used here"):
        Workers.join("cuda")
    with pytest.raises(ConfigError, match="device = 'gpu' cannot be used here"):
        Workers.join("gpu")
    assert Workers.join("auto").device.type == "cpu"
