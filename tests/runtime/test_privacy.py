"""onnxruntime's telemetry is off wherever EASE imports it: a run leaves HOME as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = (
    "from ease_runtime.cli.main import main; main(['generate', {bundle!r}, '--prompt', 'And', "
    "'--max-tokens', '2', '--threads', '1'])"
)
IMPORT = "import {package}; import os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'; import onnxruntime"


def left_in_home(code: str, home: Path, **environment: str) -> list[Path]:
    """What a fresh interpreter leaves in an empty home directory."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "ORT_DISABLE_TELEMETRY" and not name.startswith("XDG_")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(home.rglob("*"))


def test_a_run_leaves_home_untouched(tiny_bundle: Path, tmp_path: Path) -> None:
    assert left_in_home(RUN.format(bundle=str(tiny_bundle)), tmp_path) == []


@pytest.mark.parametrize("package", ["ease_export", "ease_eval", "ease_eval.peers.peer_worker"])
def test_every_package_turns_it_off_first(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    assert left_in_home(IMPORT.format(package=package), tmp_path) == []


def test_who_wants_it_may_have_it(tmp_path: Path) -> None:
    code = (
        "import ease_runtime, os; print(os.environ['ORT_DISABLE_TELEMETRY']); assert "
        "os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    )
    left_in_home(code, tmp_path, ORT_DISABLE_TELEMETRY="0")
