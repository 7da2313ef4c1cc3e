"""ease-train: what it prints, and how it ends."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ease_train.cli import main
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import recipe_names
from ease_train.training.trainer import Trainer

OPTIONS = (
    "--dim 16 --num-layers 3 --num-heads 2 --num-kv-heads 1 --ffn-dim 32 --max-positions 32 --exits 2 --kind "
    "char --batch-size 2"
)
LIMITS = (
    "--sequence-length 16 --steps 4 --warmup-steps 1 --eval-every 2 --eval-tokens 64 --save-every 2 "
    "--threads 1"
)
WEIGHTS = ["--layer-weights", "2", "0.3", "--layer-weights", "3", "1.0"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def fit(out: Path, corpus: str, *more: str, recipe: str = "demo") -> Result:
    return run(
        "fit", recipe, "--data", corpus, "--out", str(out), *OPTIONS.split(), *LIMITS.split(), *WEIGHTS, *more
    )


def test_fit_then_resume(small_corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    result = fit(out, small_corpus, "--cache", str(tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the tokens of two splits
    assert "exits at [2, 3]" in result.output
    assert "step 4: validation perplexity layer 2" in result.output
    saved = load_checkpoint(out)
    assert (saved.step, saved.recipe.model.exits, saved.recipe.train.layer_weights) == (
        4,
        (2, 3),
        {2: 0.3, 3: 1.0},
    )
    for command in (["fit", "demo"], ["fit"]):
        again = run(*command, "--out", str(out), "--resume")
        assert again.exit_code == 0, again.output
        assert "nothing left to do, all 4 steps are done; train on with --resume --steps N" in again.output
    assert "follows the recipe demo, not small" in one_line(
        run("fit", "small", "--out", str(out), "--resume")
    )
    assert "only --steps may differ (train: seed = 3, was 42)" in one_line(
        fit(out, small_corpus, "--resume", "--seed", "3")
    )
    longer = fit(out, small_corpus, "--resume", "--steps", "6")  # the last --steps holds
    assert longer.exit_code == 0, longer.output
    assert longer.stderr.startswith(
        "warning: the schedules go on as those of 6 steps, not 4: the learning rate was "
    )
    assert load_checkpoint(out).step == 6


def one_line(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--exits", "9"], ["exits = [2, 9]", "expected layers from 1 to 3"]),
        (["--layer-weights", "1", "0.5"], ["layer_weights names layer 1", "exits = [2, 3]"]),
        (["--sequence-length", "64"], ["sequence_length = 64", "max_positions = 32"]),
        (
            ["--batch-size", "99999"],
            ["expected at least 99999", "use a shorter sequence_length or more text"],
        ),
        (["--kind", "bqe"], ["kind = 'bqe'", "did you mean 'bpe'?"]),
    ],
)
def test_a_bad_value_is_one_line_and_leaves_nothing(
    small_corpus: str, tmp_path: Path, more: list[str], words: list[str]
) -> None:
    message = one_line(fit(tmp_path / "c", small_corpus, *more))
    assert all(word in message for word in words), message
    assert not (tmp_path / "c").exists()


def test_a_warning_is_one_line_said_once(small_corpus: str, tmp_path: Path) -> None:
    found = fit(tmp_path / "c", small_corpus, "--rotate-every", "3")
    assert found.exit_code == 0
    assert found.stderr == "warning: method.curriculum: every = 3 has no effect without kind\n"


def test_wrong_names(small_corpus: str, tmp_path: Path) -> None:
    assert "unknown recipe 'demi'; did you mean 'demo'?" in one_line(
        fit(tmp_path / "c", small_corpus, recipe="demi")
    )
    assert "no data file at ./no.txt" in one_line(fit(tmp_path / "c", "./no.txt"))


def test_an_existing_out_is_not_overwritten(small_corpus: str, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    assert "is there already; go on with it (--resume) or choose another --out" in one_line(
        fit(tmp_path / "c", small_corpus)
    )


def test_a_run_needs_a_recipe_or_a_checkpoint(tmp_path: Path) -> None:
    assert "no recipe is named; list them: ease-train recipes" in one_line(
        run("fit", "--out", str(tmp_path / "c"))
    )
    assert "no checkpoint at" in one_line(run("fit", "demo", "--out", str(tmp_path / "c"), "--resume"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "fit", "demi", "--out", str(tmp_path / "c"))
    assert result.exit_code == 1
    assert "unknown recipe" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [["fit"], ["fit", "demo"], ["fit", "demo", "--stepz", "3"], ["fit", "demo", "--steps", "x"], ["fitt"]],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_recipes_are_listed_with_their_papers() -> None:
    result = CliRunner().invoke(main, ["recipes"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    assert all(name in result.output for name in recipe_names())
    assert "arXiv 2207.07061" in result.output


def test_several_seeds(small_corpus: str, tmp_path: Path) -> None:
    result = fit(tmp_path / "c", small_corpus, "--seeds", "3", "--seeds", "5")
    assert result.exit_code == 0, result.output
    seeds = {path.name: load_checkpoint(path).recipe.train.seed for path in (tmp_path / "c").iterdir()}
    assert seeds == {"seed-3": 3, "seed-5": 5}
    assert "--seed and --seeds both choose the seed" in one_line(
        fit(tmp_path / "d", small_corpus, "--seeds", "3", "--seed", "4")
    )


def test_an_interrupted_run_is_saved_and_goes_on_bit_for_bit(
    small_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(tmp_path / "whole", small_corpus).exit_code == 0
    step = Trainer.train_step

    def step_with_ctrl_c(trainer: Trainer, batch: Any) -> Any:
        if trainer.checkpoint.step == 2:
            signal.raise_signal(signal.SIGINT)  # in the middle of step 3
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", step_with_ctrl_c)
    cut = fit(tmp_path / "cut", small_corpus)
    how = f"interrupted; step 3 is saved; go on: ease-train fit --out {tmp_path}/cut --resume"
    assert (cut.exit_code, cut.stderr.strip().splitlines()) == (130, [how])
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "cut").step == 3
    assert run("fit", "demo", "--out", str(tmp_path / "cut"), "--resume", "--threads", "1").exit_code == 0
    one, other = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
