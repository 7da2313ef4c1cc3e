"""The common ground: one line for errors and missing extras, one grammar of lists, whole-or-nothing files."""

import io
import os
import stat
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from ease_common import errors
from ease_common.commands import CommandGroup
from ease_common.errors import BundleError, DataError, EaseError, RequestError, SettingWarning, did_you_mean
from ease_common.extras import extra_of, missing_extra
from ease_common.files import write_whole, written_aside
from ease_common.lists import FiniteFloat, list_of
from ease_common.progress import Bar, silently, told


def test_one_root_catches_every_error() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ValueError)
    ]
    assert len(kinds) > 8
    assert all(issubclass(kind, EaseError) for kind in kinds)


def test_did_you_mean_names_the_nearest_or_all() -> None:
    assert did_you_mean("margn", ("margin", "gate")) == "did you mean 'margin'?"
    assert did_you_mean("xyz", ("margin", "gate")) == "known: gate, margin"


@click.group(cls=CommandGroup)
@click.option("--debug", is_flag=True)
def commands(debug: bool) -> None:
    """Of a test."""


@commands.command()
@click.argument("what")
def run(what: str) -> None:
    if what == "bundle":
        raise BundleError("no bundle there")
    if what == "data":
        raise DataError("no data there")
    if what == "extra":
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    if what == "ours":
        raise ModuleNotFoundError("No module named 'ease_typo'", name="ease_typo")
    warnings.warn("patience has no effect", SettingWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("bundle", "error: no bundle there\n"),
        ("data", "error: no data there\n"),
        ("extra", "error: torch is not installed; install it: pip install 'ease-lm[train]'\n"),
    ],
)
def test_an_error_is_one_line(what: str, line: str) -> None:
    result = CliRunner().invoke(commands, ["run", what])
    assert (result.exit_code, result.stderr) == (1, line)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(["--debug", "run", "bundle"], BundleError), (["run", "ours"], ModuleNotFoundError)],
)
def test_what_is_no_users_fault_keeps_its_traceback(arguments: list[str], kind: type[Exception]) -> None:
    assert isinstance(CliRunner().invoke(commands, arguments).exception, kind)


def test_a_warning_is_one_line() -> None:
    result = CliRunner().invoke(commands, ["run", "warn"])
    assert (result.exit_code, result.stderr) == (0, "warning: patience has no effect\n")


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch", "train"),
        ("datasets", "train"),
        ("matplotlib.pyplot", "eval"),
        ("lm_eval", "lm-eval"),
        ("fastapi", "serve"),
        ("json", None),
    ],
)
def test_extras_come_from_the_packages_own_metadata(module: str, extra: str | None) -> None:
    assert extra_of(module) == extra


def test_a_module_that_no_extra_brings_is_no_missing_extra() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'x'", name="x")) is None


@click.command()
@click.option("--exits", **list_of(click.INT, "LAYER[,LAYER...]"))
@click.option("--rates", default=["0.5,0.7"], **list_of(FiniteFloat(), "X[,X...]"))
def lists(exits: tuple[int, ...], rates: tuple[float, ...]) -> None:
    click.echo(f"{exits} {rates}")


@pytest.mark.parametrize(
    "arguments", [["--exits", "3,6"], ["--exits", "3", "--exits", "6"], ["--exits", "3, 6"]]
)
def test_commas_and_repetition_both_add(arguments: list[str]) -> None:
    assert CliRunner().invoke(lists, arguments).output == "(3, 6) (0.5, 0.7)\n"


def test_an_empty_list_and_one_in_place_of_the_default() -> None:
    assert CliRunner().invoke(lists, ["--rates", "1", "--rates", "2,3"]).output == "() (1.0, 2.0, 3.0)\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--exits", "3,x"], "'x'"), (["--rates", "nan"], "finite"), (["--rates", "1,inf"], "finite")],
)
def test_what_is_no_item_is_named(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(lists, arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "a.json"
    link = tmp_path / "link"
    write_whole(file, "one")
    link.symlink_to(file)
    write_whole(link, "two")
    assert (file.read_text(), link.is_symlink()) == ("two", True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RequestError, match=r"could not write .*: No space left on device"):
        write_whole(file, "three")
    assert (file.read_text(), list(file.parent.iterdir())) == ("two", [file])


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_directory_is_replaced_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    with written_aside(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(FileNotFoundError), written_aside(final) as folder:
        (folder / "missing" / "a").write_text("new")
    assert (final / "a").read_text() == "old"
    with written_aside(final) as folder:
        (folder / "a").write_text("new")
    assert (final / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize(("terminal", "lines"), [(False, 4), (True, 0)])
def test_progress_without_a_terminal_is_a_line_every_15_seconds(terminal: bool, lines: int) -> None:
    now = 0.0
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Bar("step", total=600, console=console, clock=lambda: now) as bar:
        for step in range(1, 121):
            now = step / 2
            bar.update(step, f"loss {600 - step}")
    said = [line for line in out.getvalue().splitlines() if " left" in line]
    assert len(said) == lines
    if not terminal:
        assert said[-1] == "step 120/600, loss 480, 0:04:00 left"


def test_what_is_told_of_items_is_a_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ease_common.progress.EVERY", 0.0)
    assert list(told("texts timed", ["a", "b", "c"])) == list(silently("", ["a", "b", "c"]))
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(",")[0] for line in said.err.splitlines()] == [
        f"texts timed {done}/3" for done in range(3)
    ]
