"""When tokens leave early: off, one threshold for every early exit, or one for each.

    str(Thresholds.of("off,0.7"))  # 'off,0.7': the first is not asked, the second lets go at 0.7
    Thresholds.of(0.5).to_json()       # 0.5

One notation, in flags, tables and JSON: `off`, `0.5`, `off,0.7`. JSON has a number where one number holds for
every exit. Python and JSON may also give a list: `[None, 0.7]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from ease_common.errors import RequestError, shown

EXPECTED = "a number in [0, 1], off, or one of these for each early exit, like off,0.7"


@dataclass(frozen=True)
class Thresholds:
    """The confidence at which a token leaves: one value for every early exit or one each; None: that exit is
    not asked.

    No values, or None alone, are off. Raises RequestError for a value outside [0, 1].
    """

    values: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for value in self.values:
            if value is not None and not 0.0 <= value <= 1.0:
                raise RequestError(f"threshold {value} is outside [0, 1]")

    @classmethod
    def of(cls, given: Any) -> "Thresholds":
        """From the notation, a number, a list or None (off). Raises RequestError for anything else."""
        if isinstance(given, Thresholds):
            return given
        parts = (
            given.split(",")
            if isinstance(given, str)
            else given
            if isinstance(given, list | tuple)
            else [given]
        )
        if not parts:
            raise RequestError(f"no threshold in an empty list; give {EXPECTED}")
        return cls(tuple(_value(part, given) for part in parts))

    def __bool__(self) -> bool:
        """Whether a token may leave early at all."""
        return any(value is not None for value in self.values)

    def __str__(self) -> str:
        if not self:
            return "off"
        same = len(set(self.values)) == 1
        return ",".join(
            "off" if value is None else f"{value:g}" for value in (self.values[:1] if same else self.values)
        )

    def at(self, exit_index: int) -> float | None:
        """The threshold of an early exit (from 0); None: it is not asked."""
        if len(self.values) == 1:
            return self.values[0]
        return self.values[exit_index] if exit_index < len(self.values) else None

    def for_exits(self, num_early: int) -> "Thresholds":
        """One for each early exit of a bundle. Raises RequestError for another number of them."""
        if not self:
            return OFF
        if not num_early:
            raise RequestError(
                "this bundle has no early exit: its only exit is after the last layer; leave the "
                "threshold away"
            )
        values = self.values * num_early if len(self.values) == 1 else self.values
        if len(values) != num_early:
            raise RequestError(
                f"{len(values)} thresholds given; this bundle has {num_early} early exits: give one, or "
                "one for each"
            )
        return Thresholds(values)

    def to_json(self) -> float | str:
        """As JSON has it: a number where every exit has the same, else the notation with every digit."""
        if len(set(self.values)) == 1 and self.values[0] is not None:
            return self.values[0]
        return ",".join("off" if value is None else repr(value) for value in self.values) if self else "off"


OFF = Thresholds()
ThresholdsLike: TypeAlias = Thresholds | float | str | Sequence[float | None]  # what `Thresholds.of` takes


def _value(part: Any, given: Any) -> float | None:
    """One threshold, from a number or its notation."""
    if part is None or (isinstance(part, str) and part.strip() == "off"):
        return None
    try:
        if isinstance(part, str | Real) and not isinstance(part, bool):
            return float(part)
    except (ValueError, OverflowError):
        pass
    raise RequestError(f"threshold {shown(given)} is not {EXPECTED}")
