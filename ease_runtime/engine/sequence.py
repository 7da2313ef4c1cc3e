"""One sequence's state, by who owns it: what was asked for, what has run, the decision in flight, the drafts.

Counters: `done[k]` tokens have keys and values in segment k; they never increase with k. The tokens pending
at boundary k, between segments k and k+1, are [done[k+1], done[k]): they left there (or wait there) and owe
K/V to the deeper layers. Under `verify` the last tokens may be drafts, which full depth has yet to accept.
Knows nothing about graphs or text.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_runtime.engine.costs import RequestCost
from ease_runtime.engine.lookups import Lookups
from ease_runtime.engine.sampling import Sampler
from ease_runtime.policies import ExitPolicy

Int64s = NDArray[np.int64]
NO_ROWS: Int64s = np.zeros(0, np.int64)
EXIT = "exit"  # an early exit, as a drafter


@dataclass(frozen=True)
class Token:
    """What became of one position.

    `logprob` is the chosen token's, in nats, under the head that it left by (under verify: full depth), from
    raw logits; `top_logprobs` those of the most probable ids, where they were asked for.
    """

    id: int
    depth: int  # layers used
    confidence: float
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafter: str = ""  # who said it before full depth did: EXIT, or a drafter from text; "" nobody

    @property
    def drafted(self) -> bool:
        """Whether somebody said it before full depth, which accepted it."""
        return bool(self.drafter)


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    max_length: int  # tokens in all, the prompt included
    catch_up: str
    sampler: Sampler
    stop_ids: frozenset[int] = frozenset()
    num_logprobs: int = 0
    keep: bool = False  # its slot stays its own when it has finished, for a request that goes on from there
    score_prompt: bool = False  # also say how likely full depth makes each token of the prompt
    sharing: str | None = None  # who may share the K/V of its beginning; None: nobody


@dataclass
class Counters:
    """What has run, and where the states are: the runner's."""

    done: list[int]
    rows: Int64s  # where in the pool a position's hidden state is, while it is pending
    inside: NDArray[np.bool_]  # (segments, positions): who went into a routed segment
    block_done: list[int]  # tokens with K/V in each exit's block
    asked: frozenset[
        int
    ]  # early exits that it may be asked at; those with a block run it over all its tokens
    first: int = 0  # position of the last pass's first token
    entered: Int64s = field(
        default_factory=NO_ROWS.copy
    )  # pool rows of the last pass's tokens before it, until the next pass
    block_row: int = 0  # pool row of the last pass's first token after the exit's block, until the next pass
    held: Int64s = field(
        default_factory=NO_ROWS.copy
    )  # that row of the newest token (1), while its head has yet to be asked

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.done = [min(done, length) for done in self.done]
        self.block_done = [min(done, length) for done in self.block_done]
        self.held = NO_ROWS

    def live_rows(self) -> list[Int64s]:
        """The pool rows of the tokens that wait for deeper layers or a head (views: who moves the states
        rewrites them).
        """
        return [self.rows[self.done[-1] : self.done[0]], self.held]


@dataclass(frozen=True)
class Leaving:
    """A token whose gate (or similarity) has opened after a segment; its head has yet to be asked."""

    segment: int
    confidence: float


@dataclass
class Decision:
    """Where the newest token leaves. It is on its way to `level`, the next segment."""

    policy: ExitPolicy
    state: Any  # the policy's
    level: int = 0
    leaving: Leaving | None = None
    token: Token | None = None  # the prediction of the newest token, once an exit has made it
    request_cost: RequestCost | None = None  # whether leaving early pays, where the engine adapts

    def set_out(self) -> None:
        """The newest token is about to enter the first segment."""
        self.level = 0
        self.leaving = None
        self.token = None


@dataclass
class DraftCount:
    """Drafts of one drafter that full depth has judged, and those that it agreed with."""

    judged: int = 0
    accepted: int = 0


@dataclass
class Drafts:
    """The last tokens, until full depth has judged them (verify), and what became of those before.

    Those from text come first, before what exits say.
    """

    length: int = 0  # drafts before exits are asked no more; 0: none
    trial: int = 0  # what `length` shall be once there is time to spare for a trial of the exits
    tokens: list[Token] = field(default_factory=list)
    counts: dict[str, DraftCount] = field(default_factory=dict)  # by drafter
    lookups: Lookups | None = None  # who drafts from text

    @property
    def judged(self) -> int:
        """Drafts of all drafters that full depth has judged."""
        return sum(count.judged for count in self.counts.values())

    @property
    def accepted(self) -> int:
        """Those that it agreed with."""
        return sum(count.accepted for count in self.counts.values())

    def count(self, drafter: str) -> DraftCount:
        """A drafter's."""
        return self.counts.setdefault(drafter, DraftCount())


@dataclass(eq=False)
class TokenSequence:
    """One request's tokens and state. `slot` is its place in the cache; None while it waits for one."""

    request: Request
    tokens: list[int]
    num_prompt: int
    counters: Counters
    decision: Decision
    drafts: Drafts
    slot: int | None = None
    waited: int = 0  # passes of others since its own last
    num_shared: int = 0  # tokens of the prompt whose K/V were there
    prompt_scores: list[Token] = field(default_factory=list)  # of the prompt's tokens from the second on
    produced: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        """Whether the prompt still has to pass through some segment."""
        return self.counters.done[-1] < self.num_prompt

    @property
    def num_final(self) -> int:
        """How many tokens stand, drafts not counted."""
        return len(self.tokens) - len(self.drafts.tokens)

    @property
    def progress(self) -> float:
        """The share of the tokens asked for that is there, for thresholds that decay."""
        return (len(self.tokens) - self.num_prompt) / max(1, self.request.max_length - self.num_prompt)

    @property
    def may_draft(self) -> bool:
        """Whether the newest token may leave early: under verify, not in the prompt, and not once the drafts
        must be judged.
        """
        if self.request.catch_up != "verify":
            return True
        drafts = self.drafts.tokens
        if self.prefilling or len(drafts) >= self.drafts.length:
            return False
        return not drafts or not self.ends_with(self.tokens[-1])

    def ends_with(self, token: int) -> bool:
        """Whether a token that is now the last ends the sequence."""
        return token in self.request.stop_ids or len(self.tokens) >= self.request.max_length

    def crop(self, length: int) -> None:
        """Forget every token from position `length` on; what the caches hold past it is overwritten later.

        The token that takes the place of the first of them is appended to `tokens` before the next step. The
        prompt must have run.
        """
        if self.drafts.lookups and length < self.num_final:
            self.drafts.lookups.restart()
        del self.tokens[length:]
        del self.produced[max(0, length - self.num_prompt) :]
        self.num_prompt = min(self.num_prompt, length)
        self.counters.crop(length)
        self.drafts.tokens = []
        self.decision.set_out()
