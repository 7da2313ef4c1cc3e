"""One table of a recipe as a frozen dataclass: names, types and bounds checked, plain dictionaries in and
out.
"""

import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Self

from ease_common.errors import ConfigError, did_you_mean, shown


@dataclass(frozen=True)
class Bounds:
    """The finite numbers from `low` to `high`, without an end that is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        return (
            above
            and (number < self.high if self.open_high else number <= self.high)
            and math.isfinite(number)
        )

    def __str__(self) -> str:
        if not (self.open_low or self.open_high or self.high == math.inf):
            return f"a number from {self.low} to {self.high}"
        low = f"{'more than' if self.open_low else 'at least'} {self.low}"
        return (
            low
            if self.high == math.inf
            else f"{low} and {'less than' if self.open_high else 'at most'} {self.high}"
        )


AT_LEAST_0 = Bounds(0)
AT_LEAST_1 = Bounds(1)
SHARE = Bounds(0, 1)
ABOVE_0 = Bounds(0, open_low=True)
SEEDS = Bounds(0, 2**63 - 1)
MOST_THREADS = 4 * (os.cpu_count() or 1)  # more would only be started, one by one


def setting(default: Any, help: str, allowed: Bounds | tuple[str, ...] | None = None) -> Any:  # noqa: A002 - the command line's word
    """A dataclass field with its help text and what it may hold: numbers within bounds, one of some words, or
    anything.
    """
    return field(default=default, metadata={"help": help, "allowed": allowed})


def one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError, naming the nearest known value, unless `value` is one of them."""
    if value not in known:
        raise ConfigError(f"{where} = {shown(value)}; {did_you_mean(value, known)}")


@dataclass(frozen=True)
class Section:
    """One table of a recipe: built from and turned into a plain dictionary.

    Raises ConfigError for what a field may not hold.
    """

    table: ClassVar[str]

    def __init_subclass__(cls, table: str) -> None:
        cls.table = table

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            allowed = f.metadata.get("allowed")
            if isinstance(allowed, tuple):
                one_of(f"{self.table}: {f.name}", value, allowed)
            numbers = (
                value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            )
            if isinstance(allowed, Bounds) and not all(number in allowed for number in numbers):
                raise ConfigError(
                    f"{self.table}: {f.name} = {shown(list(value) if isinstance(value, tuple) else value)}, "
                    f"expected {allowed}"
                )
            if any(type(number) is int and number.bit_length() > 63 for number in numbers):
                raise ConfigError(f"{self.table}: {f.name} = {shown(value)} takes more than 64 bits")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build the section, checking names and types. Raises ConfigError naming `where` and the field."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for name in values:
            if name not in fields:
                raise ConfigError(f"{where}: unknown field '{name}'; {did_you_mean(name, fields)}")
        return cls(
            **{name: _coerce(value, hints[name], f"{where}: {name}") for name, value in values.items()}
        )

    @classmethod
    def settings(cls, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Field[Any], Any]]:
        """Every setting with its path and its type, those of the sections within it too."""
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if is_section(hints[f.name]):
                yield from hints[f.name].settings((*path, f.name))
            else:
                yield (*path, f.name), f, hints[f.name]

    def to_dict(self) -> dict[str, Any]:
        """The section as JSON-ready values (tuples as lists, layer numbers as strings)."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def is_section(hint: Any) -> bool:
    """Whether a field of this type is a section of its own."""
    return inspect.isclass(hint) and issubclass(hint, Section)


def laid_over(section: type[Section], values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Two dictionaries of a section: what `values` does not set is taken from `base`, setting by setting."""
    hints = typing.get_type_hints(section)
    within = [
        name for name, value in values.items() if is_section(hints.get(name)) and isinstance(value, Mapping)
    ]
    return {
        **base,
        **values,
        **{name: laid_over(hints[name], values[name], base.get(name, {})) for name in within},
    }


def _coerce(value: Any, hint: Any, where: str) -> Any:
    if is_section(hint) and isinstance(value, Mapping):
        return hint.from_dict(value, where)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    try:
        if origin is types.UnionType:  # only "X | None" is used
            return None if value is None else _coerce(value, arguments[0], where)
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_coerce(item, arguments[0], where) for item in value)
        if origin is dict and isinstance(value, Mapping):
            return {arguments[0](key): _coerce(item, arguments[1], where) for key, item in value.items()}
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if hint in (int, bool, str) and type(value) is hint:
            return value
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} = {shown(value)}: {error}") from None
    raise ConfigError(f"{where} = {shown(value)} is not of the type {getattr(hint, '__name__', hint)}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
