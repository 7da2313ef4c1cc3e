"""Every script of examples/ runs as its first line says, on the tiny bundle."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMPT = "And the king"


def run(name: str, *arguments: object) -> str:
    """A script's output."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_scripts_are_short() -> None:
    found = sorted((ROOT / "examples").glob("*.py"))
    assert len(found) == 5
    for script in found:
        lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 35, script


def test_train_and_export(corpus_file: Path, tmp_path: Path) -> None:
    said = run("train_and_export.py", corpus_file, tmp_path / "run", 4)
    assert "step 4: perplexity layer 2 " in said
    assert "2 segments, exits after (2, 4)" in said
    assert (tmp_path / "run" / "bundle" / "manifest.json").is_file()


def test_generate(tiny_bundle: Path) -> None:
    said = run("generate.py", tiny_bundle, PROMPT)
    assert said.startswith(PROMPT)
    assert "of 6 layers" in said


def test_own_policy(tiny_bundle: Path) -> None:
    means = [float(line.split()[-1]) for line in run("own_policy.py", tiny_bundle, PROMPT).splitlines()]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_serve_and_call(tiny_bundle: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    assert "depths [" in run("serve_and_call.py", tiny_bundle, PROMPT, free_port())


def test_sweep(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = run("sweep.py", tiny_bundle, corpus_file, tmp_path / "plot.svg")
    assert said.count("recompute") == 3
    assert (tmp_path / "plot.svg").stat().st_size > 1000
