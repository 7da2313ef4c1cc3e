"""What the fields of Options are made of: a default with its help, and JSON values of the right kind."""

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from numbers import Real
from typing import Any, NoReturn

from ease_common.errors import RequestError, shown
from ease_runtime.policies.thresholds import Thresholds
from ease_runtime.text.grammar import JsonSchema, LarkGrammar, Regex

LONGEST_NAME = 80  # characters
LONGEST_ID = 20  # digits of a token


def leaving(default: Any, help: str) -> Any:  # noqa: A002 - the command line's word
    """A field that says when tokens leave; a request has it in its object `ease`."""
    return field(default=default, metadata={"help": help, "leaving": True})


def read_value(name: str, kind: Any, value: Any) -> Any:
    """A value of JSON or Python as a field of this type. Raises RequestError."""
    choices = typing.get_args(kind)
    if type(None) in choices:  # X | None, or X | what is read as one | None
        return None if value is None else read_value(name, choices[0], value)
    if kind in READERS:
        return READERS[kind](name, value)
    if kind is int and isinstance(value, Real) and not isinstance(value, bool) and value == value // 1:
        return math.floor(value)  # 5.0: some languages' JSON has no other numbers
    if type(value) is not kind:
        _refuse(name, value, {int: "a whole number", str: "a text", bool: "true or false"}[kind])
    return value


def check_name(name: str, value: Any) -> None:
    """Raises RequestError for a text that is too long, or too odd, to be a name."""
    if isinstance(value, str) and (len(value) > LONGEST_NAME or not value.isprintable()):
        _refuse(name, value, "a name")


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise RequestError(f"{name} {shown(value)} is not {expected}")


def _float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        _refuse(name, value, "a number that fits a float")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        _refuse(name, value, "a text or a list of texts")
    return tuple(texts)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        _refuse(name, value, "a list of token ids")
    return tuple(read_value(name, int, token) for token in value)


def _bias(name: str, value: Any) -> dict[int, float]:
    expected = 'an object of token ids and numbers, like {"42": -100}'
    if not isinstance(value, Mapping):
        _refuse(name, value, expected)
    bias = {}
    for token, number in value.items():
        if (
            not isinstance(number, Real)
            or isinstance(number, bool)
            or not str(token).isdecimal()
            or len(str(token)) > LONGEST_ID
        ):
            _refuse(name, value, expected)
        bias[int(token)] = _float(name, number)
    return bias


READERS: dict[Any, Callable[[str, Any], Any]] = {
    float: _float,
    tuple[str, ...]: _texts,
    tuple[int, ...]: _ids,
    JsonSchema: JsonSchema.read,
    LarkGrammar: LarkGrammar.read,
    Regex: Regex.read,
    Thresholds: lambda name, value: Thresholds.of(value),
    Mapping[int, float]: _bias,
}
