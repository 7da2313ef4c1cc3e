"""What the commands of every package share: errors as one line, and the formats of some options."""

import sys
from typing import Any

import click
from click.core import ParameterSource

from ease_runtime.device import DEVICES
from ease_runtime.errors import EaseError
from ease_runtime.thresholds import Thresholds

DEVICE_FLAG = click.option(
    "--device",
    default="auto",
    show_default=True,
    help=f"One of: {', '.join(DEVICES)}; auto is CUDA where it can run the bundle.",
)


class ErrorGroup(click.Group):
    """A group whose commands end an EASE error with one line on stderr and exit code 1 (a traceback with --debug)."""

    errors: tuple[type[ValueError], ...] = (EaseError,)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except self.errors as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(1)


def given_flags(*names: str) -> list[str]:
    """Those of a running command's options, by the names of its parameters, that the user has given; as the flags say them."""
    context = click.get_current_context()
    sources = {parameter.name: parameter for parameter in context.command.params}
    unasked = (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return [sources[name].opts[0] for name in names if context.get_parameter_source(name) not in unasked]


class ThresholdFlag(click.ParamType[Thresholds]):
    """One threshold for every early exit, or one each: 0.5 or off,0.7."""

    name = "X[,X...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Thresholds:
        return Thresholds.of(value)


class ThresholdRows(click.ParamType[tuple[Thresholds, ...]]):
    """Several settings, each one threshold for every early exit: 0.5,0.7,0.9."""

    name = "X[,X...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Thresholds, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(ThresholdFlag().convert(part, param, ctx) for part in str(value).split(","))
