"""What a long measurement has finished, a JSON line each, so that a run that was killed goes on where it
stopped.

    with Journal(Path("table.json"), {"bundle": ..., "thresholds": ...}) as journal:
        value = journal.once("scores 0.5", lambda: measure_it())  # measured now, or read from the run before

The lines stand in a file beside the one that the run will write, which goes when the run has ended well.
Lines of a run that asked for something else are not used.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ease_common.errors import RequestError
from ease_common.files import held
from ease_common.progress import Each, silently


class Journal:
    """The finished parts of one run, by name.

    `file` is where the run's result goes, which no other run may write meanwhile; None keeps nothing for
    another run. `each` goes through what takes long: `told` says how far it has come.
    """

    def __init__(self, file: Path | None, asked: dict[str, Any], each: Each = silently) -> None:
        self.file = file
        self.each = each
        self.path = None if file is None else file.with_name(f".{file.name}.journal")
        self.asked: dict[str, Any] = json.loads(json.dumps(asked))
        self.found: dict[str, Any] = {}
        self.hold = ExitStack()
        self.num_read = 0  # parts that the run before had finished

    def __enter__(self) -> Self:
        if self.path is None or self.file is None:
            return self
        with ExitStack() as stack:
            self._begin(stack)
            self.hold = stack.pop_all()
        return self

    def _begin(self, stack: ExitStack) -> None:
        """Keep other runs away, and write what an earlier one has left down again. Raises RequestError."""
        assert self.path is not None, "a journal that is kept has a file"
        assert self.file is not None, "a journal that is kept has a file"
        try:
            stack.enter_context(held(self.file))
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
            parts = list(_whole(lines))
            if parts and parts[0] == {"asked": self.asked}:
                self.found = {part["name"]: part["value"] for part in parts[1:]}
                self.num_read = len(self.found)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            again = [
                {"asked": self.asked},
                *({"name": name, "value": value} for name, value in self.found.items()),
            ]
            self.path.write_text("".join(json.dumps(part) + "\n" for part in again), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"could not write {self.file}: {error.strerror}") from None

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A part's value, as JSON gives it back: from the run before, or computed now and noted."""
        if name not in self.found:
            self.found[name] = json.loads(json.dumps(compute()))
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"name": name, "value": self.found[name]}) + "\n")
        return self.found[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.hold:
            if self.path is not None and kind is None:
                self.path.unlink(missing_ok=True)


def _whole(lines: list[str]) -> Any:
    """The lines' values, up to one that was cut off."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return
