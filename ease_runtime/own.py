"""Policies and samplers of one's own: `module:Class` in place of a name, a class of a module that can be imported from here."""

import os
import pkgutil
import sys
from typing import Any

from ease_runtime.errors import RequestError


def is_own(name: str) -> bool:
    """Whether a name is of the form module:Class."""
    return ":" in name


def load_own(name: str, what: str) -> Any:
    """The class that `module:Class` names; modules of the working directory are found, too.

    Code runs: only for names that the user of this process gave. Raises RequestError where there is none.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # a module is a program: it may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"{what} '{name}' cannot be loaded ({reason}); give MODULE:CLASS, with MODULE.py in this directory") from error
    return found
