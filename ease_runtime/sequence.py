"""One sequence's state: its tokens, and one counter a segment.

`done[k]` tokens have keys and values in segment k; the counters never increase with k. The tokens pending at boundary k,
between segments k and k+1, are [done[k+1], done[k]): they left there (or wait there) and owe K/V to the deeper layers.
Under `verify` the last tokens may be drafts, which full depth has yet to accept. Knows nothing about graphs or text.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_runtime.costs import Pace
from ease_runtime.policies import ExitPolicy
from ease_runtime.sampling import Sampler


@dataclass(frozen=True)
class Token:
    """What became of one position.

    `logprob` is the chosen token's, in nats, under the head that it left by (under verify: full depth), from raw logits;
    `top_logprobs` those of the most probable ids, where they were asked for.
    """

    id: int
    depth: int  # layers used
    confidence: float
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafted: bool = False  # said by an early exit, and accepted by full depth


@dataclass(frozen=True)
class Leaving:
    """A token whose gate (or similarity) has opened after a segment; its head has yet to be asked."""

    segment: int
    confidence: float
    rows: NDArray[np.int64]  # where its state is after the exit's block (1); empty where the exit has none


@dataclass(eq=False)
class Sequence:
    """The state of one request. The newest token (the last of `tokens`) is on its way to `level`, the next segment."""

    tokens: list[int]
    num_prompt: int
    max_length: int  # tokens in all, the prompt included
    policy: ExitPolicy
    catch_up: str
    sampler: Sampler
    stop_ids: frozenset[int]
    num_logprobs: int
    done: list[int]
    rows: NDArray[np.int64]  # where in the pool a position's hidden state is, while it is pending
    inside: NDArray[np.bool_]  # (segments, positions): who went into a routed segment
    asked: frozenset[int] = frozenset()  # early exits that it may be asked at; those with a block run it over all its tokens
    block_done: list[int] = field(default_factory=list)  # tokens with K/V in each exit's block
    block_rows: NDArray[np.int64] | None = None  # pool rows of the last pass's tokens after the block, until the next pass
    keep: bool = False  # its slot stays its own when it has finished, for a request that goes on from there
    slot: int | None = None  # of the cache; None while it waits for one
    waited: int = 0  # passes of others since its own last
    level: int = 0
    entered: NDArray[np.int64] | None = None  # pool rows of the last pass's tokens before it, until the next pass
    leaving: Leaving | None = None
    decided: Token | None = None  # the prediction of the newest token, once an exit has made it
    policy_state: Any = None
    pace: Pace | None = None  # whether leaving early pays, where the engine adapts
    drafts: list[Token] = field(default_factory=list)  # of the last tokens, until they are verified
    draft_length: int = 0  # drafts before full depth is asked; 0: none
    drafted: int = 0  # drafts that full depth has judged
    accepted: int = 0
    finish_reason: str | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    produced: list[Token] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        """Whether the prompt still has to pass through some segment."""
        return self.done[-1] < self.num_prompt

    @property
    def num_final(self) -> int:
        """How many tokens stand, drafts not counted."""
        return len(self.tokens) - len(self.drafts)

    @property
    def progress(self) -> float:
        """The share of the tokens asked for that is there, for thresholds that decay."""
        return (len(self.tokens) - self.num_prompt) / max(1, self.max_length - self.num_prompt)

    @property
    def may_draft(self) -> bool:
        """Whether the newest token may leave early: under verify, not in the prompt, and not once the drafts must be judged."""
        if self.catch_up != "verify":
            return True
        if self.prefilling or len(self.drafts) >= self.draft_length:
            return False
        return not self.drafts or not self.ends_with(self.tokens[-1])

    def ends_with(self, token: int) -> bool:
        """Whether a token that is now the last ends the sequence."""
        return token in self.stop_ids or len(self.tokens) >= self.max_length

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
        self.block_done = [min(done, length) for done in self.block_done]
        self.drafts = []
        self.set_out()

    def set_out(self) -> None:
        """The newest token is about to enter the first segment."""
        self.level, self.leaving, self.decided = 0, None, None
