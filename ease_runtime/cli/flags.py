"""The fields of Options as flags of a command, with their own defaults and help texts."""

import math
import typing
from collections.abc import Callable, Container, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from ease_common.commands import given_flags
from ease_common.errors import RequestError
from ease_common.lists import FiniteFloat, list_of
from ease_runtime.cli.commands import ThresholdFlag
from ease_runtime.options import FLAGS, Options
from ease_runtime.policies.thresholds import Thresholds
from ease_runtime.text.grammar import LONGEST_GRAMMAR, Grammar, JsonSchema, LarkGrammar, Regex

Command = Callable[..., Any]
NAMES = {field: f"--{flag}" for flag, field in FLAGS.items()}


class IdBias(click.ParamType[tuple[int, float]]):
    """A token id and what is added to its logit: 42=-100."""

    name = "ID=BIAS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            found = int(token), float(bias)
        except ValueError:
            self.fail(f"'{value}' is not a token id and a number, like 42=-100", param, ctx)
        if math.isnan(found[1]):
            self.fail(f"'{value}' adds no number to the logit", param, ctx)
        return found


class GrammarFile(click.Path):
    """A file that holds a grammar of a kind."""

    def __init__(self, kind: type[Grammar]) -> None:
        super().__init__(exists=True, dir_okay=False)
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, Grammar):
            return value
        path = Path(str(super().convert(value, param, ctx)))
        if path.stat().st_size > 4 * LONGEST_GRAMMAR:
            self.fail(f"{path} is longer than the {LONGEST_GRAMMAR} characters that are read", param, ctx)
        try:
            return self.kind(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            self.fail(f"{path} cannot be read as UTF-8 text", param, ctx)


KINDS: dict[Any, dict[str, Any]] = {
    int: {"type": int},
    float: {"type": FiniteFloat()},
    str: {"type": str},
    JsonSchema: {"type": GrammarFile(JsonSchema)},
    LarkGrammar: {"type": GrammarFile(LarkGrammar)},
    Regex: {"type": Regex},
    Thresholds: {"type": ThresholdFlag()},
    bool: {"is_flag": True},
    tuple[str, ...]: {"type": str, "multiple": True},
    tuple[int, ...]: list_of(click.INT, "ID[,ID...]"),
    Mapping[int, float]: {"type": IdBias(), "multiple": True},
}


def option_flags(*, without: Container[str] = ()) -> Callable[[Command], Command]:
    """Give a command one flag a field of Options, but for those `without`; `read_flags` makes the options of
    what click passes on.
    """
    hints = typing.get_type_hints(Options)

    def decorate(command: Command) -> Command:
        for field in reversed(fields(Options)):
            if field.name not in without:
                command = _flag(field, hints[field.name])(command)
        return command

    return decorate


def _flag(field: "Field[Any]", hint: Any) -> Callable[[Command], Command]:
    choices = typing.get_args(hint)
    kind = KINDS[choices[0] if type(None) in choices else hint]
    name = NAMES.get(field.name, f"--{field.name.replace('_', '-')}")
    unsaid = hint is bool or field.default in (MISSING, None, ())
    default: dict[str, Any] = {} if unsaid else {"default": field.default, "show_default": True}
    return click.option(name, field.name, help=field.metadata["help"], **kind, **default)


def read_flags(given: Mapping[str, Any]) -> Options:
    """The options that the flags say. Raises RequestError for a value outside its range."""
    options = Options(**{**given, "logit_bias": dict(given.get("logit_bias", ()))})
    if given_flags("catch_up"):
        options.check_catch_up()
    if options.max_tokens == 0:
        raise RequestError("max_tokens 0 is below 1: nothing would be said")
    return options
