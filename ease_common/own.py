"""Code of one's own: `module:name` where a name is expected, of a module that can be imported from here."""

import os
import pkgutil
import sys
from typing import Any

from ease_common.errors import EaseError, RequestError


def is_own(name: str) -> bool:
    """Whether a name is of the form module:Class."""
    return ":" in name


def load_own(name: str, what: str, error_type: type[EaseError] = RequestError) -> Any:
    """What `module:name` names; modules of the working directory are found, too.

    Code runs: only for names that the user of this process gave. Raises `error_type` where there is none.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # a module is a program: it may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        message = (
            f"{what} '{name}' cannot be loaded ({reason}); give MODULE:NAME, with MODULE.py in this directory"
        )
        raise error_type(message) from error
    return found
