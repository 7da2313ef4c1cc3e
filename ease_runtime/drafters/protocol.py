"""What a drafter is: it says which tokens may come next, and how much of the text speaks for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next, the next one first; `match` is how many of the last tokens speak for them.

    How often drafts are accepted is learnt by the length of the match: 1, 2, 3, 4 to 7, or more.
    """

    tokens: Sequence[int] = ()
    match: int = 1


class Drafter(Protocol):
    """Proposes tokens from text. A drafter is shared by requests: what it must remember of one is in the
    request's state.
    """

    name: str  # as reports call it

    def begin(self) -> Any:
        """The state of a request, which `propose` gets back; by default there is nothing to remember."""
        return None

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        """At most `limit` tokens (more are cut) that may come after `tokens`, the prompt and the answer so
        far.

        All of them stand: with one state, each call's tokens begin with those of the call before.
        """
        ...
