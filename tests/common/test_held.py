"""Two runs on one output: the second is refused in a line, a killed one holds nothing; and what replaces
something is on the disk first.
"""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from ease_common.errors import RequestError
from ease_common.files import held, write_whole, written_aside
from ease_eval.journal import Journal
from other_run import another_run


def test_the_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    with another_run(final):
        with pytest.raises(RequestError, match=rf"another run is writing {final}; wait for it, or choose"):
            written_aside(final).__enter__()
        with written_aside(tmp_path / "folder.2") as folder:
            (folder / "a").write_text("b")
    with held(final), written_aside(final) as folder:  # a run that saves while it holds its output
        (folder / "a").write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.2"]


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    with another_run(tmp_path / "a") as other:
        other.kill()
        other.wait()
        with held(tmp_path / "a"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_two_measurements_with_one_journal(tmp_path: Path) -> None:
    with another_run(tmp_path / "a.json"), pytest.raises(RequestError, match="another run is writing"):
        Journal(tmp_path / "a.json", {}).__enter__()
    with Journal(tmp_path / "a.json", {}) as journal:
        assert journal.once("part", lambda: 7) == 7
    assert list(tmp_path.iterdir()) == []


def test_training_is_refused_before_it_begins(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="it trains")
    from ease_train.cli import main as train_main

    with another_run(tmp_path / "run"):
        for resumed in ([], ["--resume"]):
            arguments = ["fit", "demo", "--data", "nowhere.txt", "--out", str(tmp_path / "run"), *resumed]
            refused = CliRunner().invoke(train_main, arguments)
            assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
            assert "another run is writing" in refused.stderr


def test_a_name_comes_after_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory is synced before the rename, the directory of the name after it."""
    done: list[str] = []
    names = {}

    def name_of(number: int) -> str:
        return names.setdefault(os.fstat(number).st_ino, os.readlink(f"/proc/self/fd/{number}"))

    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(f"sync {Path(name_of(number)).name}") or sync(number)
    )
    monkeypatch.setattr(
        Path, "rename", lambda one, new: done.append(f"rename {new.name}") or rename(one, new)
    )
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda one, new: done.append(f"replace {new.name}") or replace(one, new)
    )
    with written_aside(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("b")
    partial = f".folder.partial-{os.getpid()}"
    assert done == ["sync a", f"sync {partial}", "sync inner", "rename folder", f"sync {tmp_path.name}"]
    done.clear()
    write_whole(tmp_path / "a.json", "text")
    assert done == [f"sync .a.json.partial-{os.getpid()}", "replace a.json", f"sync {tmp_path.name}"]
