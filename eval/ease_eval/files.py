"""Files that are there whole or not at all."""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ease_runtime.errors import RequestError
from ease_runtime.thresholds import Thresholds


def as_json(value: Any) -> Any:
    """What json can write, of a value of dataclasses: thresholds in their notation, everything else as it is."""
    if isinstance(value, Thresholds):
        return value.to_json()
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, list | tuple) else value


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
