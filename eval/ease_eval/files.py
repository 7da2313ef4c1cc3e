"""Files that are there whole or not at all."""

import os
from pathlib import Path

from ease_runtime.errors import RequestError


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all; a link stays one, a pipe or device is written to. Raises RequestError."""
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
