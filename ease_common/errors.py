"""Every error that EASE raises for bad input. All are kinds of ValueError: the input was wrong, not the code.

EaseError
├── BundleError           a bundle that is missing, incomplete, altered, of another format, or that points
│                         outside its directory
├── RequestError          a prompt, an option or a policy that cannot be used
├── DeviceError           a device that is not there, or on which the graphs do not compute what they should
├── ExportError           a bundle that cannot be written, or that does not match its checkpoint
├── MissingExtraError     a package that this command needs is not installed
├── PanicError            a library of Rust's gave up over what it was given
└── TrainError            training, importing and what they read
    ├── ConfigError       a recipe, a field or a value that cannot be used
    ├── DataError         a corpus that cannot be read or is too small
    ├── CheckpointError   a checkpoint that is missing, incomplete or of a newer version
    ├── ModelImportError  another project's model that cannot be read or computed here
    └── DivergenceError   the loss stopped being a number
"""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

OUT_OF_MEMORY = re.compile(
    "bad_alloc|can(no|')t allocate memory|failed to allocate|out of memory|not enough memory",
    re.IGNORECASE,
)


class EaseError(ValueError):
    """Base of every error that EASE raises for bad input."""


class BundleError(EaseError):
    """A bundle that is missing, incomplete, altered, of another format, or points outside its directory."""


class RequestError(EaseError):
    """A prompt, an option or a policy that cannot be used."""


class DeviceError(EaseError):
    """A device that is not there, or on which the graphs do not compute what they should."""


class ExportError(EaseError):
    """A bundle that cannot be written, or that does not match its checkpoint."""


class MissingExtraError(EaseError):
    """A package that a command needs is not installed; the message names the extra that brings it."""


class PanicError(EaseError):
    """A library of Rust's (tokenizers, say) gave up over what it was given."""


class TrainError(EaseError):
    """Base of every error of training, importing and what they read."""


class ConfigError(TrainError):
    """A recipe, a field or a value that cannot be used."""


class DataError(TrainError):
    """A corpus that cannot be read, or that is too small."""


class CheckpointError(TrainError):
    """A checkpoint that is missing, incomplete or newer than this version of EASE."""


class ModelImportError(TrainError):
    """A model of another project's making that cannot be read, or that this decoder cannot compute."""


class DivergenceError(TrainError):
    """The loss stopped being a number; the last checkpoint on disk is still good."""


class SettingWarning(UserWarning):
    """A setting that has no effect."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Makes PanicError of the panic of a Rust library, which `except Exception` would not catch."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PanicError(f"a library gave up: {' '.join(str(error).split())[:200]}") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's, the system's, torch's or ONNX Runtime's says that memory is not there."""
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return no_memory or OUT_OF_MEMORY.search(str(error)) is not None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the nearest of `known`, or list them all when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"


def shown(value: object) -> str:
    """A value as an error's line quotes it: junk may be long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
