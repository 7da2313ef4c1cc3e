"""Two processes over gloo against one process with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ease_train.checkpoint import load_checkpoint
from ease_train.config import Recipe
from ease_train.errors import ConfigError
from ease_train.parallel import Workers
from ease_train.trainer import StepEvent, Trainer

WORKER = """
import json, sys
from pathlib import Path
import torch
from ease_train.config import Recipe
from ease_train.trainer import StepEvent, Trainer

torch.set_num_threads(1)
recipe = Recipe.from_dict(json.loads(sys.argv[1]), "tiny")
trainer = Trainer.begin(recipe, sys.argv[2])
steps = [event for event in trainer.fit(Path(sys.argv[3])) if isinstance(event, StepEvent)]
print(json.dumps([[step.loss, step.grad_norm, *step.exit_losses.values()] for step in steps]))
torch.distributed.destroy_process_group()
"""


def run_two(recipe: Recipe, corpus: str, out: Path) -> list[list[list[float]]]:
    """What each of two processes reports, step by step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, json.dumps(recipe.to_dict()), corpus, str(out)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**where, "RANK": str(rank)}) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_two_processes_follow_the_curve_of_twice_the_batch(make_recipe: Callable[..., Recipe], small_corpus: str, tmp_path: Path) -> None:
    both = run_two(make_recipe(train={"batch_size": 2}), small_corpus, tmp_path / "two")
    assert both[0] == both[1]
    events = Trainer.begin(make_recipe(train={"batch_size": 4}), small_corpus).fit(tmp_path / "one")
    steps = [event for event in events if isinstance(event, StepEvent)]
    for found, step in zip(both[0], steps, strict=True):
        assert found == pytest.approx([step.loss, step.grad_norm, *step.exit_losses.values()], rel=1e-5)
    one, two = load_checkpoint(tmp_path / "one").model, load_checkpoint(tmp_path / "two").model
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_a_process_alone_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Workers.join("cpu") == (Workers(0, 1), "cpu")
    assert Workers().mean([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]
    assert Workers().share("text") == "text"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match="WORLD_SIZE = 2 without RANK, MASTER_ADDR, MASTER_PORT; start with torchrun or accelerate launch"
    ):
        Workers.join("cpu")
