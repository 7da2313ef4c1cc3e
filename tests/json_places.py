"""Where anything stands in a JSON value, for tests that put junk everywhere."""

from collections.abc import Iterator
from typing import Any


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value, keys and numbers of elements."""
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))
