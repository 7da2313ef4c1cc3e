"""Names on the Hugging Face hub, and what to say when it does not answer."""

import re

REMEDY = "is it spelt right, is it gated (hf auth login), is the hub in reach?"
OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository: OWNER/NAME."""
    return OWNER_AND_NAME.fullmatch(name) is not None


def hub_failure(error: Exception, *more: str) -> str:
    """Why the hub did not give or take a repository's files, in one line, and what may help."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"{reason} ({' '.join((REMEDY, *more))})"
