"""Lists on the command line.

They have one grammar: commas and repetition both add, so `--exits 3,6` is `--exits 3 --exits 6`.
"""

import math
from collections.abc import Iterable
from typing import Any

import click

from ease_common.settings import MOST_THREADS


class FiniteFloat(click.types.FloatParamType):
    """A number, neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class FiniteRange(click.FloatRange):
    """A number within a range, never NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return float(super().convert(FiniteFloat().convert(value, param, ctx), param, ctx))


class ThreadCount(click.IntRange):
    """CPU threads, from 1 to four a CPU."""

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = int(super().convert(value, param, ctx))
        if number > MOST_THREADS:
            self.fail(f"{number} threads: expected at most {MOST_THREADS}, 4 a CPU", param, ctx)
        return number


class CommaList(click.ParamType[tuple[Any, ...]]):
    """Values separated by commas, each of `item`'s type."""

    def __init__(self, item: click.ParamType[Any], name: str) -> None:
        self.item = item
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in str(value).split(","))


def joined(_: click.Context, __: click.Parameter, values: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All occurrences of a list option as one list."""
    return tuple(item for occurrence in values for item in occurrence)


def list_of(item: click.ParamType[Any], name: str) -> dict[str, Any]:
    """What makes a click option a list: commas within an occurrence, occurrences after each other."""
    return {"type": CommaList(item, name), "multiple": True, "callback": joined}
