"""What the commands of every package share: errors and warnings as one line each."""

import errno
import io
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

import click
from click.core import ParameterSource

from ease_common.errors import EaseError, RequestError, SettingWarning, out_of_memory, without_panics
from ease_common.extras import missing_extra
from ease_common.interrupts import NOTHING_KEPT, handled, line_of, number_of, raise_it

GO_ON = "ease.how_to_go_on"


class CommandGroup(click.Group):
    """A group whose commands end an EASE error with one line on stderr and exit code 1 (a traceback with
    --debug).

    A missing extra is such an error; so is memory or a disk that is full. What is warned of is one line too,
    said once. Ctrl-C and SIGTERM are one line, and the exit codes 130 and 143.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings(), handled(raise_it), without_panics():
                warnings.simplefilter("once", SettingWarning)
                warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
                take_any_text()
                if sys.stdout is None:
                    raise RequestError("standard output is closed; send it to /dev/null if nobody reads it")
                found = super().invoke(ctx)
                sys.stdout.flush()  # a full disk is said here, not by the interpreter at its end
                return found
        except KeyboardInterrupt as error:
            number = number_of(error)
            click.echo(f"\r{line_of(number, ctx.meta.get(GO_ON, NOTHING_KEPT))}", err=True)
            sys.exit(128 + number)
        except ModuleNotFoundError as error:
            if ctx.params.get("debug") or (missing := missing_extra(error)) is None:
                raise
            fail(missing)
        except EaseError as error:
            if ctx.params.get("debug"):
                raise
            fail(error)
        except (MemoryError, OSError, RuntimeError) as error:
            if ctx.params.get("debug") or (known := exhausted(error)) is None:
                raise
            fail(known)


def take_any_text() -> None:
    """Have the standard streams escape characters that their encoding lacks, and let bytes that are no text
    through to whoever reads lines (as halves of surrogate pairs).
    """
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # some of it was read already
                stream.reconfigure(errors=errors)


def say_how_to_go_on(how: str) -> None:
    """What a running command says when it is interrupted from here on."""
    click.get_current_context().meta[GO_ON] = how


def exhausted(error: BaseException) -> EaseError | None:
    """What to say where memory or a disk is full, or a stream is closed; None for any other error."""
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if out_of_memory(error):
        wanted = f" ({text[:200]})" if text else ""
        return RequestError(
            f"not enough memory{wanted}; run less at once (--batch-size, --max-prompt), a smaller model or a "
            "lower precision, or free some"
        )
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
        what = getattr(error, "filename", None) or "the output"
        return RequestError(
            f"could not write {what}: {os.strerror(number)}; free some space, or write elsewhere"
        )
    return None


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
