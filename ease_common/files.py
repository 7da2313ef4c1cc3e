"""Files and directories that are there whole or not at all, also after a power cut: written aside, settled on
the disk, then renamed. One process at a time writes one.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from ease_common.errors import RequestError


def write_whole(file: Path, text: str | bytes) -> None:
    """Write a file, text in UTF-8, so that it is there whole or not at all; a link stays one, a pipe or a
    device is written to. Raises RequestError.
    """
    content = text.encode() if isinstance(text, str) else text
    file = file.resolve()
    partial = aside(file)
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            file.write_bytes(content)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        settle(partial)
        os.replace(partial, file)
        settle_folder(file.parent)
    except OSError as error:
        raise RequestError(f"could not write {file}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def aside(final: Path) -> Path:
    """Where this process writes what will be at `final`."""
    return final.with_name(f".{final.name}.partial-{os.getpid()}")


def settle(path: Path) -> None:
    """Have the disk hold a file, or all of a directory, before its name does. Raises OSError."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
    for folder in [path, *path.rglob("*")]:
        if folder.is_dir():
            settle_folder(folder)


def settle_folder(folder: Path) -> None:
    """Have the disk hold a directory's names, where the system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep what is written at `path` to this process, which may hold it several times over. One that is
    killed holds nothing.

    Raises RequestError where another process holds it, OSError where nothing can be written.
    """
    from filelock import FileLock, Timeout  # 0.1 s, which only who writes should pay

    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or a device is nobody's
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_file = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_file, timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        if not lock_file.exists():  # which is how a directory without room for names looks
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise RequestError(f"another run is writing {path}; wait for it, or choose another name") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows keeps what is open
                lock_file.unlink()
        lock.release()


@contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """Give a fresh directory to write into; rename it to `final` when the block ends without an error.

    A directory already at `final` is replaced only then. Whatever goes wrong, `final` holds the old content
    or the new one. Raises RequestError where another process writes it.
    """
    previous = final.with_name(f".{final.name}.previous")
    partial = aside(final)
    with held(final):
        restore_interrupted(final)
        for leftover in [previous, *final.parent.glob(f".{escape(final.name)}.partial*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            settle(partial)
            if final.exists():
                final.rename(previous)
            partial.rename(final)
            settle_folder(final.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            restore_interrupted(final)
            shutil.rmtree(previous, ignore_errors=True)


def restore_interrupted(final: Path) -> None:
    """Put back the directory that a killed replacement had moved away."""
    previous = final.parent / f".{final.name}.previous"
    if previous.is_dir() and not final.exists():
        previous.rename(final)
