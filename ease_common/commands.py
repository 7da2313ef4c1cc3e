"""What the commands of every package share: errors and warnings as one line each."""

import sys
import warnings
from typing import Any

import click
from click.core import ParameterSource

from ease_common.errors import EaseError, SettingWarning
from ease_common.extras import missing_extra


class CommandGroup(click.Group):
    """A group whose commands end an EASE error with one line on stderr and exit code 1 (a traceback with
    --debug).

    A missing extra is such an error. What is warned of is one line too, said once.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("once", SettingWarning)
                warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
                return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.params.get("debug") or (missing := missing_extra(error)) is None:
                raise
            fail(missing)
        except EaseError as error:
            if ctx.params.get("debug"):
                raise
            fail(error)


def fail(error: EaseError) -> None:
    """End the process with an error's one line."""
    click.echo(f"error: {error}", err=True)
    sys.exit(1)


def given_flags(*names: str) -> list[str]:
    """Those of a running command's options, by the names of its parameters, that the user has given; as the
    flags say them.
    """
    context = click.get_current_context()
    sources = {parameter.name: parameter for parameter in context.command.params}
    unasked = (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return [sources[name].opts[0] for name in names if context.get_parameter_source(name) not in unasked]
