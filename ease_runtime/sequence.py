"""One sequence's state: its tokens, and one counter a segment.

`done[k]` tokens have keys and values in segment k; the counters never increase with k. The tokens pending at boundary k,
between segments k and k+1, are [done[k+1], done[k]): they left there (or wait there) and owe K/V to the deeper layers.
Knows nothing about graphs, policies or text.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ease_runtime.policy import ExitPolicy
from ease_runtime.sampling import Sampler
from ease_runtime.stack import Cache


@dataclass(frozen=True)
class Token:
    """What became of one position. `logprob` is the chosen token's, in nats, under the head it left by (raw logits)."""

    id: int
    depth: int  # layers used
    confidence: float
    logprob: float


@dataclass(frozen=True)
class Leaving:
    """A token whose gate has opened after a segment; its head has yet to be asked."""

    segment: int
    confidence: float


@dataclass
class Sequence:
    """The state of one request. The newest token (the last of `tokens`) is on its way to `level`, the next segment."""

    tokens: list[int]
    num_prompt: int
    max_length: int  # tokens in all, the prompt included
    policy: ExitPolicy
    catch_up: str
    sampler: Sampler
    stop_ids: frozenset[int]
    cache: Cache
    done: list[int]
    rows: NDArray[np.int64]  # where in the pool a position's hidden state is, while it is pending
    inside: NDArray[np.bool_]  # (segments, positions): who went into a routed segment
    level: int = 0
    leaving: Leaving | None = None
    decided: Token | None = None  # the prediction of the newest token, once an exit has made it
    finish_reason: str | None = None
    produced: list[Token] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        """Whether the prompt still has to pass through some segment."""
        return self.done[-1] < self.num_prompt

    def live_rows(self) -> NDArray[np.int64]:
        """The pool rows of the tokens that wait for deeper layers (a view: who moves the states rewrites it)."""
        return self.rows[self.done[-1] : self.done[0]]

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on; what the caches hold past it is overwritten later.

        The token that takes the place of the first of them is appended to `tokens` before the next step. The prompt must have run.
        """
        del self.tokens[length:]
        del self.produced[max(0, length - self.num_prompt) :]
        self.num_prompt = min(self.num_prompt, length)
        self.done = [min(done, length) for done in self.done]
        self.level, self.leaving, self.decided = 0, None, None
