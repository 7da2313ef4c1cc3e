"""Ctrl-C and SIGTERM at any moment of a command: one line, 130 or 143, and nothing half written.

The moments are given by what the process does (its n-th import, the n-th file it opens), not by the clock.
"""

import json
import signal
from pathlib import Path

import pytest

from hit import interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", [("import", "click", 1), ("import", "onnxruntime", 1), ("open", "manifest.json", 1)]
)
def test_a_bundle_that_is_loading(tiny_bundle: Path, moment: tuple[str, str, int], number: int) -> None:
    arguments = ["generate", str(tiny_bundle), "--prompt", "And the king"]
    code, lines = interrupted(moment, number, "ease_run", *arguments)
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert (code, lines) == (128 + number, [f"{word}; run the command again"])


def test_a_batch_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = json.dumps({"prompt": "And the king", "max_tokens": 3})
    prompts.write_text(f"{line}\n" * 3)
    command = ["batch", str(tiny_bundle), str(prompts), str(out), "--batch-size", "1"]
    code, lines = interrupted(("open", "out.jsonl", 2), signal.SIGINT, "ease_run", *command)
    assert (code, lines[-1]) == (
        130,
        f"interrupted; {out} keeps the answers so far; run the command again to go on",
    )
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / ".out.jsonl.lock").exists()


def test_a_command_that_is_asked_for_help_is_not_touched() -> None:
    code, lines = interrupted(("import", "nothing", 1), signal.SIGINT, "ease_eval", "--help")
    assert (code, lines) == (0, [])
