"""Flags of ease-eval without effect are told, and a measurement of nothing is refused."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ease_eval.cli.main import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (
            "agreement",
            "--prompts {file}",
            "no token leaves early or is drafted: both sides would be full depth",
        ),
        (
            "agreement",
            "--prompts {file} --threshold off",
            "no token leaves early or is drafted: both sides would be full depth",
        ),
        (
            "agreement",
            "--prompts {file} --catch-up verify",
            "catch_up verify has no effect without a threshold",
        ),
        ("depth", "--data {file} --catch-up verify", "the depths of verify are those of its drafts"),
        ("table", "--data {file} --policy fixed", "policy 'fixed' has no thresholds to measure"),
        ("calibrate", "--data {file} --policy fixed", "policy 'fixed' has no thresholds to measure"),
        ("ppl", "--data {file} --exit-thresholds off,off", "--exit-thresholds with off alone asks no exit"),
        ("compare", "--checkpoint x --policy entropy", "--policy has no effect without --threshold"),
        ("compare", "--checkpoint x --threshold off", "--threshold off asks no exit"),
        (
            "compare",
            "--checkpoint x --prompts {file} --split train",
            "--split has no effect beside --prompts",
        ),
    ],
)
def test_a_measurement_of_nothing_is_refused(
    tiny_bundle: Path, corpus_file: Path, command: str, flags: str, message: str
) -> None:
    result = run(command, tiny_bundle, *flags.format(file=corpus_file).split())
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_flags_that_a_command_does_not_measure_are_told(
    tiny_bundle: Path, corpus_file: Path, tmp_path: Path
) -> None:
    small = ["--scored-tokens", "100", "--rounds", "1", "--thresholds", "0.5"]
    result = run("ppl", tiny_bundle, "--data", corpus_file, *small, "--catch-up", "verify")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "note: --rounds has no effect on ppl",
        "note: verify says what full depth says: its perplexity is off's, and nothing is measured for it",
    ]
    file = tmp_path / "words.jsonl"
    file.write_text(json.dumps({"text": "And the king went up to the mountain"}) + "\n")
    result = run("tasks", tiny_bundle, file, "--threshold", "0.5", "--temperature", "0.5", "--chat")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "note: --temperature has no effect: these files ask for likelihoods, and nothing is generated",
        "note: --chat has no effect: these files ask for likelihoods, and nothing is generated",
    ]
