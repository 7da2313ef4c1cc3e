"""Results as JSON."""

from dataclasses import fields, is_dataclass
from typing import Any

from ease_runtime.policies.thresholds import Thresholds


def as_json(value: Any) -> Any:
    """What json can write, of a value of dataclasses: thresholds in their notation, everything else
    as it is.
    """
    if isinstance(value, Thresholds):
        return value.to_json()
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, list | tuple) else value
