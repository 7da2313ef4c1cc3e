"""Lists on the command line. They have one grammar: commas and repetition both add, so `--exits 3,6` is `--exits 3 --exits 6`."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import click


class FiniteFloat(click.ParamType[float]):
    """A number, neither NaN nor infinite."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class CommaList(click.ParamType[tuple[Any, ...]]):
    """Values separated by commas, each of `item`'s type."""

    def __init__(self, item: click.ParamType[Any], name: str) -> None:
        self.item, self.name = item, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in str(value).split(","))


def joined(_: click.Context, __: click.Parameter, values: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All occurrences of a list option as one list; the callback of `list_option`."""
    return tuple(item for occurrence in values for item in occurrence)


def list_option(
    *names: str, item: click.ParamType[Any], metavar: str, **settings: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A click option that takes a list: commas within an occurrence, occurrences after each other."""
    return click.option(*names, type=CommaList(item, metavar), multiple=True, callback=joined, metavar=metavar, **settings)
