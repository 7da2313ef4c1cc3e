"""How far a command has come: a bar on a terminal, elsewhere a line now and then.

with Bar("step", total=600, console=Console()) as bar:
    bar.update(120, "loss 3.210")  # step 120/600, loss 3.210, 0:04:10 left
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
EVERY = 15.0  # seconds from one line to the next
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class Bar:
    """Progress of `total` units, of which some may be done. What `print` says stands above the bar."""

    def __init__(
        self,
        unit: str,
        *,
        total: int,
        completed: int = 0,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.unit = unit
        self.clock = clock
        live = console.is_terminal
        self.progress = Progress(*COLUMNS, console=console, get_time=clock, disable=not live)
        task = self.progress.add_task(unit, total=total, completed=completed)
        (self.task,) = (one for one in self.progress.tasks if one.id == task)
        self.next_line = float("inf") if live else clock() + EVERY

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, completed: int | None = None, says: str | None = None) -> None:
        """Move on, and change what stands beside it."""
        self.progress.update(self.task.id, completed=completed, description=says)
        if self.clock() >= self.next_line:
            self.next_line = self.clock() + EVERY
            self.print(self.line())

    def line(self) -> str:
        """What a file or a pipe is told."""
        said = "" if self.task.description == self.unit else f", {self.task.description}"
        left = self.task.time_remaining
        time_left = "" if left is None else f", {timedelta(seconds=round(left))} left"
        return f"{self.unit} {self.task.completed:g}/{self.task.total:g}{said}{time_left}"

    def print(self, text: str, **how: Any) -> None:
        """A line of its own."""
        self.progress.console.print(text, soft_wrap=True, **how)


class Each(Protocol):
    """Goes through items; `unit` is what one of them is when it is done."""

    def __call__(self, unit: str, items: Sequence[T], /) -> Iterable[T]: ...


def silently(unit: str, items: Sequence[T]) -> Sequence[T]:
    """The items."""
    return items


def told(unit: str, items: Sequence[T]) -> Iterator[T]:
    """The items, and between them a line on stderr now and then; on a terminal, too, since a bar that draws
    itself would take time from what is measured.
    """
    with Bar(unit, total=len(items), console=Console(stderr=True, force_terminal=False)) as bar:
        for done, item in enumerate(items):
            bar.update(done)
            yield item
