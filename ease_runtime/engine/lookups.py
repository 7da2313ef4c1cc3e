"""A request's drafts from text: what its drafters propose, and how many tokens of it pay.

How often full depth agrees is learnt for each drafter and length of match; what passes cost comes from
`PassCosts`. Where costs are not known, the longest match drafts, up to a fixed length. Runs no graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ease_runtime.drafters.protocol import Drafter, Proposal
from ease_runtime.engine.costs import LONGEST_DRAFT
from ease_runtime.engine.pass_costs import PassCosts

LOWEST = (1, 2, 3, 4, 8)  # length of match from which each bucket counts
PRIORS = (0.4, 0.6, 0.7, 0.8, 0.9)  # share of the drafts that is accepted, by bucket, before any is judged
PRIOR_WEIGHT = 4.0  # drafts that a prior stands for
DECAY = 0.95  # of what is known, a judgement
FLOOR = 0.98  # of the speed without drafts, which an answer keeps if every draft is refused
FIRST_TOKENS = 64  # whose share of that may be spent at once


def bucket_of(match: int) -> int:
    """The bucket of a length of match."""
    return max(i for i, lowest in enumerate(LOWEST) if max(match, 1) >= lowest)


@dataclass
class Acceptance:
    """Drafts judged and accepted, by bucket; what is long ago counts less."""

    drafted: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT] * len(LOWEST))
    accepted: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT * prior for prior in PRIORS])

    def rate(self, bucket: int) -> float:
        """The share that is accepted, below 1."""
        return min(self.accepted[bucket] / self.drafted[bucket], 0.999)

    def judged(self, bucket: int, drafted: int, accepted: int) -> None:
        """Note what became of some drafts, the first that was refused included."""
        self.drafted[bucket] = DECAY * self.drafted[bucket] + drafted
        self.accepted[bucket] = DECAY * self.accepted[bucket] + accepted


@dataclass(frozen=True)
class Load:
    """What a row's next pass has besides its drafts: rows and tokens of others, and the length of the cache.

    `num_produced`: tokens of the row's answer so far; `other_gain`: the speed that its other way to draft is
    expected to give, full depth being 1.
    """

    other_rows: int
    other_tokens: int
    cache_length: int
    num_produced: int = 0
    other_gain: float = 1.0


@dataclass(frozen=True)
class Choice:
    """Tokens of one drafter that shall be judged; `price` is what they cost, in tokens without drafts."""

    name: str
    bucket: int
    tokens: Sequence[int]
    price: float = 0.0


class Lookups:
    """The drafters of one request, with their states, and how they fare."""

    def __init__(self, drafters: Sequence[Drafter], pass_costs: PassCosts | None) -> None:
        self.drafters = drafters
        self.pass_costs = pass_costs
        self.states: list[Any] = []
        self.acceptance = {drafter.name: Acceptance() for drafter in drafters}
        self.asked_at = 0  # tokens that stood when the drafters were last asked
        self.pending: Choice | None = None  # drafts that have yet to be judged
        self.untried: list[Choice] = []  # proposals of before that did not draft, where exits may
        self.balance = 0.0  # tokens gained by drafts, in the time of one without
        self.restart()

    def restart(self) -> None:
        """The text is another than what the drafters have read."""
        self.states = [drafter.begin() for drafter in self.drafters]
        self.asked_at = 0
        self.pending = None
        self.untried = []

    def choose(self, tokens: Sequence[int], limit: int, load: Load) -> Choice | None:
        """The drafts that give most tokens a second; None where none do. All of `tokens` stand."""
        self._learn_of_untried(tokens)
        self.asked_at = len(tokens)
        if self.pass_costs is not None:
            limit = min(limit, LONGEST_DRAFT)
        proposals = [
            (drafter.name, drafter.propose(tokens, limit, state))
            for drafter, state in zip(self.drafters, self.states, strict=True)
        ]
        proposals = [(name, proposal) for name, proposal in proposals if len(proposal.tokens) and limit > 0]
        if not proposals:
            return None
        if self.pass_costs is None:
            name, longest = max(proposals, key=lambda named: named[1].match)
            self.pending = Choice(name, bucket_of(longest.match), longest.tokens[:limit])
        else:
            self.pending = self._best(proposals, limit, load)
        if load.other_gain > 1.0:
            self.untried = [
                Choice(name, bucket_of(proposal.match), proposal.tokens)
                for name, proposal in proposals
                if self.pending is None or name != self.pending.name
            ]
        return self.pending

    def _learn_of_untried(self, tokens: Sequence[int]) -> None:
        """Judge the proposals of before that did not draft, while exits did, by what was said in their place:
        else a drafter that exits have outdone is never known to have been right.
        """
        said = tokens[self.asked_at :]
        for choice in self.untried:
            pairs = list(zip(choice.tokens, said, strict=False))
            right = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
            if pairs:
                self.acceptance[choice.name].judged(choice.bucket, min(right + 1, len(pairs)), right)
        self.untried = []

    def _best(self, proposals: Sequence[tuple[str, Proposal]], limit: int, load: Load) -> Choice | None:
        """The drafter and the number of its tokens with the highest expected speed, of those that may fail.

        j drafts give (1 - a^(j+1)) / (1 - a) tokens at acceptance a (Leviathan et al. 2023, arXiv 2211.17192,
        equation 1), and the rows that share the pass one each.
        """
        assert self.pass_costs is not None, "only where costs are known"
        rows = load.other_rows + 1
        most = min(limit, max(len(proposal.tokens) for _, proposal in proposals))
        seconds = self.pass_costs.curve(load.other_tokens + 1, most, rows, load.cache_length)
        best = load.other_gain * rows / seconds[0]
        spare = self.spare(load.num_produced)
        found = None
        for name, proposal in proposals:
            bucket = bucket_of(proposal.match)
            rate = self.acceptance[name].rate(bucket)
            for count in range(1, min(most, len(proposal.tokens)) + 1):
                tokens = (1.0 - rate ** (count + 1)) / (1.0 - rate) + load.other_rows
                price = rows * (seconds[count] / seconds[0] - 1.0)
                if price <= spare and tokens / seconds[count] > best:
                    best = tokens / seconds[count]
                    found = Choice(name, bucket, proposal.tokens[:count], price)
        return found

    def spare(self, num_produced: int) -> float:
        """What drafts may still cost if all of them are refused, in tokens, for the answer to keep FLOOR."""
        return self.balance + (1.0 - FLOOR) * max(num_produced, FIRST_TOKENS)

    def may_spend(self, price: float, num_produced: int) -> bool:
        """Whether there is so much to spare for something else; it is then spent."""
        if price > self.spare(num_produced):
            return False
        self.balance -= price
        return True

    def judged(self, drafted: int, accepted: int) -> None:
        """Note what became of the pending drafts: `drafted` of them were judged."""
        if self.pending is None:
            return
        self.acceptance[self.pending.name].judged(self.pending.bucket, drafted, accepted)
        self.balance += accepted - self.pending.price
        self.pending = None
