"""A bundle on the hub: pushed, fetched by its name and run, over a stand-in of the hub's API."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ease_runtime.bundle.manifest import MANIFEST_FILE
from hub import Hub, running_hub

EXPORT = [sys.executable, "-m", "ease_export.cli"]
RUN = [sys.executable, "-m", "ease_runtime.cli.main"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as made:
        yield made


def ease(hub: Hub, cache: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own: the hub's client reads its settings once."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    more = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_of_nobody", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        arguments, env={**os.environ, **settings, **more}, capture_output=True, text=True, timeout=300
    )


def test_a_bundle_goes_to_the_hub_and_runs_by_its_name(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    """Its files come as links into the cache, and a second time from the cache alone."""
    pushed = ease(hub, tmp_path, *EXPORT, "push", str(tiny_bundle), "someone/tiny")
    assert pushed.returncode == 0, pushed.stderr
    manifest = json.loads((tiny_bundle / MANIFEST_FILE).read_text())
    assert hub.repos["someone/tiny"].keys() == {"README.md", MANIFEST_FILE, *manifest["files"]}
    assert hub.large, "graphs and weights go as large files"
    assert b"ease-run generate someone/tiny" in hub.repos["someone/tiny"]["README.md"]

    generate = ("generate", "someone/tiny", "--prompt", "And God", "--max-tokens", "5", "--json")
    fetched = ease(hub, tmp_path, *RUN, *generate)
    assert fetched.returncode == 0, fetched.stderr
    here = ease(hub, tmp_path, *RUN, "generate", str(tiny_bundle), *generate[2:])
    assert json.loads(fetched.stdout)["text"] == json.loads(here.stdout)["text"]
    snapshots = tmp_path / "hub" / "models--someone--tiny" / "snapshots"
    files = list(next(snapshots.iterdir()).iterdir())
    assert {path.name for path in files} == {MANIFEST_FILE, *manifest["files"]}
    assert all(path.is_symlink() for path in files)

    away = Hub(endpoint="http://127.0.0.1:9")
    again = ease(away, tmp_path, *RUN, *generate)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["text"] == json.loads(fetched.stdout)["text"]


def test_a_name_that_the_hub_does_not_know_is_one_line(hub: Hub, tmp_path: Path) -> None:
    found = ease(hub, tmp_path, *RUN, "generate", "someone/nothing", "--prompt", "a")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: no bundle at someone/nothing")


def test_a_card_of_ones_own_goes_along(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n")
    arguments = ("push", str(tiny_bundle), "someone/mine", "--card", str(tmp_path / "card.md"))
    assert ease(hub, tmp_path, *EXPORT, *arguments).returncode == 0
    assert hub.repos["someone/mine"]["README.md"] == b"# Mine\n"
