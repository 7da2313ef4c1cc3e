"""Ctrl-C and SIGTERM end a command by one line and the exit code that shells expect (130, 143), from its
first moment on.

Until the command itself runs (`ease_start`), modules are imported, some of them native ones that an exception
tears apart, so that a signal ends the process there and then. In the command a signal is raised as
KeyboardInterrupt or Terminated, which undoes what was begun.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTHING_KEPT = "run the command again"
IMPORTING = "<frozen importlib._bootstrap>"
Handler = Callable[[int, FrameType | None], Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is."""


def line_of(number: int, how_to_go_on: str = NOTHING_KEPT) -> str:
    """What is said of a signal."""
    return f"{'terminated' if number == signal.SIGTERM else 'interrupted'}; {how_to_go_on}"


def number_of(error: KeyboardInterrupt) -> int:
    """The signal that an exception stands for."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def end_now(number: int, _: FrameType | None) -> None:
    """A handler that ends the process, undoing nothing."""
    with suppress(OSError):
        os.write(2, f"{line_of(number)}\n".encode())
    os._exit(128 + number)


def raise_it(number: int, frame: FrameType | None) -> None:
    """A handler that raises, but in the middle of an import, where the process ends."""
    at = frame
    while at is not None:
        if at.f_code.co_filename == IMPORTING:
            end_now(number, frame)
        at = at.f_back
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def install(handler: Handler) -> dict[int, Any]:
    """Handle both signals so; what handled them before. One that is ignored (nohup) stays so."""
    before: dict[int, Any] = {}
    for number in SIGNALS:
        if (was := signal.getsignal(number)) not in (None, signal.SIG_IGN):
            with suppress(ValueError):  # a thread that cannot
                signal.signal(number, handler)
                before[number] = was
    return before


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Handle both signals so within the block."""
    before = install(handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
