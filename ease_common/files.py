"""Files and directories that are there whole or not at all: written aside, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ease_common.errors import RequestError


def write_whole(file: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all; a link stays one, a pipe or device is
    written to. Raises RequestError.
    """
    file = file.resolve()
    partial = file.with_name(f".{file.name}.partial")
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            file.write_text(text, encoding="utf-8")
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(f"could not write {file}: {error.strerror}") from None


@contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """Give a fresh directory to write into; rename it to `final` when the block ends without an error.

    A directory already at `final` is replaced only then. Whatever goes wrong, `final` holds the old content
    or the new one.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.partial"
    previous = final.parent / f".{final.name}.previous"
    restore_interrupted(final)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            final.rename(previous)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        restore_interrupted(final)
        shutil.rmtree(previous, ignore_errors=True)


def restore_interrupted(final: Path) -> None:
    """Put back the directory that a killed replacement had moved away."""
    previous = final.parent / f".{final.name}.previous"
    if previous.is_dir() and not final.exists():
        previous.rename(final)
