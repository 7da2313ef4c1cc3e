"""The main job through the commands, as a user runs it: train → export → verify → generate → table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    "ease-train": "ease_train.cli",
    "ease-export": "ease_export.cli",
    "ease-run": "ease_runtime.cli.main",
    "ease-eval": "ease_eval.cli.main",
}


def run(program: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", PROGRAMS[program], *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


MODEL = [
    "--dim",
    "32",
    "--num-layers",
    "4",
    "--num-heads",
    "2",
    "--num-kv-heads",
    "1",
    "--exits",
    "2",
    "--layer-weights",
    "2",
    "0.3",
]
MODEL += [
    "--layer-weights",
    "4",
    "1",
    "--max-positions",
    "96",
    "--bpe-vocab-size",
    "300",
    "--sequence-length",
    "64",
]


def test_train_export_run_evaluate(tmp_path: Path, corpus_file: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    bundle = tmp_path / "bundle"
    steps = [
        "--steps",
        "30",
        "--warmup-steps",
        "10",
        "--eval-every",
        "30",
        "--learning-rate",
        "0.01",
        "--threads",
        "1",
    ]
    run("ease-train", "fit", "demo", "--data", corpus_file, "--out", checkpoint, *MODEL, *steps)
    run("ease-export", "build", checkpoint, bundle)
    assert (
        "88 of 88"
        in run("ease-export", "verify", bundle, "--checkpoint", checkpoint, "--tokens", "88").stdout
    )
    told = json.loads(
        run(
            "ease-run",
            "generate",
            bundle,
            "--prompt",
            "And the king",
            "--threshold",
            "0.5",
            "--json",
            "--max-tokens",
            "40",
        ).stdout
    )
    assert {"text", "tokens", "finish_reason", "usage", "timing"} <= told.keys()
    assert {t["depth"] for t in told["tokens"]} <= {2, 4}
    assert "".join(t["text"] for t in told["tokens"]) == told["text"]
    assert told["text"].isprintable()
    amounts = [
        "--scored-tokens",
        "400",
        "--texts",
        "2",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "20",
        "--rounds",
        "1",
    ]
    table = tmp_path / "table.json"
    run(
        "ease-eval", "table", bundle, "--data", corpus_file, "--thresholds", "0.02", "--json", table, *amounts
    )
    off, early = json.loads(table.read_text())["rows"]
    metrics = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    assert off["ppl"] < 150, "thirty steps bring 300 words' perplexity well below chance"
    assert off["ppl"] == pytest.approx(metrics[-1]["perplexity"]["4"], rel=0.25), (
        "test and validation are of one kind"
    )
    assert early["mean_depth"] < off["mean_depth"] == 4


def test_coloured_generation_has_a_legend_and_figures(tiny_bundle: Path) -> None:
    shown = run(
        "ease-run",
        "generate",
        tiny_bundle,
        "--prompt",
        "And",
        "--threshold",
        "0.5",
        "--show-exits",
        "--compare",
        "--max-tokens",
        "30",
    ).stdout
    assert shown.startswith("depth:  2   4   6")
    assert "30 tokens, mean depth" in shown
    assert "of 6 layers" in shown
    assert "full depth:" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1.5"], "threshold 1.5 is outside [0, 1]"),
        (["--threshold", "0.5,0.6,0.7"], "3 thresholds given; this bundle has 2 early exits"),
        (["--policy", "max-prop"], "unknown policy 'max-prop'; did you mean 'max-prob'?"),
        (["--catch-up", "verfy"], "unknown catch-up 'verfy'"),
        (["--prompt", "And the king " * 200], "this model's context of 288 leaves no room"),
        (["--prompt", ""], "the prompt is empty"),
        (["--temperature", "-1"], "temperature -1.0 is not above 0"),
        (["--top-p", "0"], "top_p 0.0 is outside (0, 1]"),
        (["--max-tokens", "0"], "max_tokens 0 is below 1"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_bad_requests_end_in_one_line(tiny_bundle: Path, options: list[str], message: str) -> None:
    failed = run("ease-run", "generate", tiny_bundle, "--prompt", "And", *options, code=1)
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""


def test_usage_errors_have_exit_code_2(tiny_bundle: Path) -> None:
    generate = ("ease-run", "generate", tiny_bundle, "--prompt", "x")
    assert "'half' is not a valid integer" in run(*generate, "--max-tokens", "half", code=2).stderr
    refused = run(*generate, "--threshold", "half", code=1).stderr
    assert refused.startswith("error: threshold 'half' is not a number in [0, 1]")
    assert refused.count("\n") == 1


def test_a_missing_checkpoint_or_bundle_names_the_command_that_makes_it(tmp_path: Path) -> None:
    assert (
        "ease-train fit" in run("ease-export", "build", tmp_path / "none", tmp_path / "bundle", code=1).stderr
    )
    assert (
        "ease-export build" in run("ease-run", "generate", tmp_path / "none", "--prompt", "x", code=1).stderr
    )
    assert list(tmp_path.iterdir()) == []
