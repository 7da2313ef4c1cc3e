"""The errors of running a bundle. All are kinds of ValueError: the input was wrong, not the code.

EaseError
├── BundleError       a bundle that is missing, incomplete, altered, newer, or points outside its directory
├── RequestError      a prompt, an option or a policy that cannot be used
└── DeviceError       a device that is not there, or on which the bundle's graphs do not compute what they should
"""

import difflib
from collections.abc import Iterable


class EaseError(ValueError):
    """Base of every error that the runtime raises for bad input."""


class BundleError(EaseError):
    """A bundle that is missing, incomplete, altered, newer than this version, or points outside its directory."""


class RequestError(EaseError):
    """A prompt, an option or a policy that cannot be used."""


class DeviceError(EaseError):
    """A device that is not there, or on which the graphs do not compute what they should."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the nearest of `known`, or list them all when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
