"""Drafters: who says, cheaply, what full depth may say next. `verify` judges all of them alike.

    drafter = NgramLookup()
    state = drafter.begin()
    proposal = drafter.propose([5, 17, 3, 5, 17], limit=8, state=state)

An early exit drafts token by token, as its policy and thresholds say; it is no class here. The others draft
from text: what followed when the prompt or the answer (`ngram`), or a corpus of the user's (`corpus`), had
the words that stand last. One of the user's own is `module:Class` where a name is expected, or an object in
Python (docs/drafts.md).
"""

from typing import Any

from ease_common.errors import RequestError, did_you_mean
from ease_common.own import is_own, load_own
from ease_runtime.drafters.corpus import CorpusLookup, read_corpus
from ease_runtime.drafters.ngram import NgramLookup
from ease_runtime.drafters.protocol import Drafter, Proposal

__all__ = [
    "DRAFTS",
    "CorpusLookup",
    "Drafter",
    "NgramLookup",
    "Proposal",
    "check_draft",
    "own_drafter",
    "read_corpus",
]

DRAFTS = ("exit", "ngram", "corpus", "auto", "off")  # what --draft may say, but for module:Class


def check_draft(name: str) -> None:
    """Raises RequestError for a name that is none of DRAFTS, nor `module:Class` of a drafter."""
    if is_own(name):
        own_drafter(name)
    elif name not in DRAFTS:
        raise RequestError(f"unknown draft '{name}'; {did_you_mean(name, DRAFTS)}")


def own_drafter(name: str) -> Drafter:
    """An object of the class that `module:Class` names. Raises RequestError where that is no drafter."""
    found: Any = load_own(name, "draft")
    if not (
        isinstance(found, type) and callable(getattr(found, "propose", None)) and hasattr(found, "begin")
    ):
        raise RequestError(f"draft '{name}' is no class with the methods of ease_runtime.drafters.Drafter")
    made: Drafter = found()
    made.name = getattr(found, "name", name)
    return made
