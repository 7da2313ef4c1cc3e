"""JSON and safetensors files of other projects' models."""

import json
from pathlib import Path
from typing import Any

import safetensors

from ease_common.errors import ModelImportError


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None when there is no such file. Raises ModelImportError."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelImportError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelImportError(f"{path} holds no JSON object")
    return values


def opened_tensors(path: Path) -> Any:
    """A safetensors file. Raises ModelImportError."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelImportError(f"{path} is no safetensors file: {error}") from None
