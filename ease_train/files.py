"""Directories that are there whole or not at all: written aside, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """Give a fresh directory to write into; rename it to `final` when the block ends without an error.

    A directory already at `final` is replaced only then. Whatever goes wrong, `final` holds the old content or the new one.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = final.parent / f".{final.name}.partial", final.parent / f".{final.name}.previous"
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
