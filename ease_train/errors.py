"""The errors of ease_train. All are kinds of ValueError: the input was wrong, not the code.

TrainError
├── ConfigError       a recipe, a field or a value that cannot be used
├── DataError         a corpus that cannot be read or is too small
├── CheckpointError   a checkpoint that is missing, incomplete or newer than this version
├── ForeignError      a model of another project's making that cannot be read, or is of no form known here
└── DivergenceError   the loss stopped being a number
"""

import difflib
from collections.abc import Iterable


class TrainError(ValueError):
    """Base of every error that ease_train raises for bad input."""


class ConfigError(TrainError):
    """A recipe, a field or a value that cannot be used."""


class DataError(TrainError):
    """A corpus that cannot be read, or that is too small."""


class CheckpointError(TrainError):
    """A checkpoint that is missing, incomplete or newer than this version of EASE."""


class ForeignError(TrainError):
    """A model of another project's making that cannot be read, or that this decoder cannot compute."""


class DivergenceError(TrainError):
    """The loss stopped being a number; the last checkpoint on disk is still good."""


class SettingWarning(UserWarning):
    """A setting that has no effect, or a part of a foreign model that cannot be used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the nearest of `known`, or list them all when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
