"""A tokenizer that knows tokens the model has no row for: one line at every door, never a number."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer

from ease_common.errors import BundleError, ConfigError, RequestError
from ease_eval.cli.main import main as evaluate
from ease_eval.measure.perplexity import score_documents
from ease_eval.tasks.likelihood import score_continuation
from ease_runtime.bundle.manifest import FileInfo, load_manifest, sha256_of
from ease_runtime.cli.main import main as runtime
from ease_runtime.llm import LLM
from ease_runtime.policies import FULL_DEPTH
from ease_train.cli import main as train
from ease_train.training.config import load_recipe
from ease_train.training.trainer import Trainer

TOOL = 320  # the first id past the embedding
SAID = f"the text has '<tool>', the token {TOOL}, for which this model has no row: its vocabulary has {TOOL}"


def with_tool(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.save(str(tokenizer_file))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tool") / "bundle"
    shutil.copytree(tiny_bundle, path)
    with_tool(path / "tokenizer.json")
    manifest = load_manifest(tiny_bundle)
    file = path / "tokenizer.json"
    files = {**manifest.files, file.name: FileInfo(sha256_of(file), file.stat().st_size)}
    (path / "manifest.json").write_text(replace(manifest, files=files).to_json())
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tool.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"And the king <tool> went up to the sea. {i}"}) + "\n" for i in range(40)
        )
    )
    return path


def test_a_text_is_refused_before_it_runs(bundle: Path) -> None:
    llm = LLM(bundle)
    with pytest.raises(RequestError, match=SAID):
        llm.encode("And <tool>")
    with pytest.raises(RequestError, match=SAID):
        llm.submit("And <tool>")


@pytest.mark.parametrize("beyond", [TOOL, 5000, -1])
def test_ids_are_refused_wherever_they_come_in(bundle: Path, beyond: int) -> None:
    engine = LLM(bundle).engine
    message = f"the token id {beyond} is outside the vocabulary of {TOOL}"
    doors: list[Callable[[], object]] = [
        lambda: engine.start([0, beyond], max_new_tokens=1),
        lambda: score_continuation(engine, [0, 17], [beyond], [FULL_DEPTH], "recompute"),
        lambda: score_continuation(engine, [0, beyond], [17], [FULL_DEPTH], "recompute"),
        lambda: score_documents(engine, [[0, 17, beyond]], [FULL_DEPTH], "propagate"),
    ]
    for door in doors:
        with pytest.raises(RequestError, match=message):
            door()
    assert engine.sequences == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (runtime, ["generate", "BUNDLE", "--prompt", "And <tool>"]),
        (evaluate, ["ppl", "BUNDLE", "--data", "TEXT", "--thresholds", "0.5"]),
        (evaluate, ["tasks", "BUNDLE", "TASK"]),
    ],
)
def test_commands_end_with_one_line(
    bundle: Path, text: Path, tmp_path: Path, main: click.Command, arguments: list[str]
) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"question": "And <tool>", "choices": ["went", "spoke"], "answer": 0}) + "\n")
    named = {"BUNDLE": str(bundle), "TEXT": str(text), "TASK": str(task)}
    result = CliRunner().invoke(main, [named.get(argument, argument) for argument in arguments])
    assert (result.exit_code, SAID in result.output, "Traceback" in result.output) == (1, True, False), (
        result.output
    )


def test_training_text_is_refused(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    with_tool(checkpoint / "tokenizer.json")
    settings = [
        "--exits",
        "2,6",
        "--layer-weights",
        "2",
        "1",
        "--sequence-length",
        "32",
        "--batch-size",
        "1",
        "--steps",
        "1",
    ]
    arguments = ["tune", str(checkpoint), "--data", str(text), "--out", str(tmp_path / "tuned"), *settings]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 1, result.output
    assert f"past the model's vocabulary of {TOOL}, the first is '<tool>' (id {TOOL})" in result.output


def test_a_vocabulary_has_room_for_its_tokenizer(corpus_file: Path) -> None:
    recipe = load_recipe("demo").with_options(
        {"bpe_vocab_size": 300, "vocab_size": 299, "dim": 32, "num_heads": 2, "num_kv_heads": 1}
    )
    with pytest.raises(
        ConfigError, match=r"vocab_size = 299, expected 0 \(the tokenizer's size\) or at least that: 300"
    ):
        Trainer.begin(recipe, str(corpus_file))


def test_rows_without_tokens_are_harmless(bundle: Path) -> None:
    assert LLM(bundle).token_text(5000) == ""
    assert np.isfinite(
        score_continuation(LLM(bundle).engine, [0, 17], [TOOL - 1], [FULL_DEPTH], "recompute")[0].logprobs
    ).all()


def test_a_start_token_without_a_row_is_a_damaged_manifest(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "manifest.json").write_text(
        replace(load_manifest(tiny_bundle), start_id=TOOL).to_json()
    )
    with pytest.raises(BundleError, match=f"start_id = {TOOL} is outside the vocabulary"):
        load_manifest(tmp_path / "bundle")
