"""News of completions, and what has become of those of a request: what answers are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from ease_runtime.engine.sequence import DraftCount, Token
from ease_runtime.generation import Choice, TokenEvent, add_drafts


@dataclass(frozen=True)
class Update:
    """News of one completion: its new tokens, and once it has ended how, and what became of its drafts."""

    index: int
    events: list[TokenEvent]
    finish_reason: str | None = None
    error: str | None = None
    drafts: Mapping[str, DraftCount] = field(default_factory=dict)  # by drafter
    notes: tuple[str, ...] = ()
    prompt_scores: Sequence[Token] = ()  # where they were asked for; with the first news
    num_shared: int = 0  # tokens of its prompt whose K/V were there, once it has ended

    @classmethod
    def of(cls, index: int, choice: Choice, events: list[TokenEvent]) -> Self:
        """The news of a completion, which is the `index`-th of its request. Takes its prompt's scores."""
        sequence = choice.sequence
        scores = sequence.prompt_scores
        sequence.prompt_scores = []
        if choice.finish_reason is None:
            return cls(index, events, prompt_scores=scores)
        return cls(
            index,
            events,
            choice.finish_reason,
            choice.error,
            drafts=sequence.drafts.counts,
            notes=tuple(sequence.notes),
            prompt_scores=scores,
            num_shared=sequence.num_shared if choice.index == 0 else 0,  # of a prompt once
        )

    def after(self, before: "Update") -> "Update":
        """All that both say of one completion."""
        scores = before.prompt_scores or self.prompt_scores
        return replace(self, events=before.events + self.events, prompt_scores=scores)


@dataclass
class Tally:
    """What has become of a request's completions."""

    num_ended: int = 0
    drafts: dict[str, DraftCount] = field(default_factory=dict)  # by drafter
    notes: list[str] = field(default_factory=list)
    num_shared: int = 0  # tokens of its prompts whose K/V were there

    def add(self, update: Update) -> None:
        """Count what an update says."""
        self.num_ended += update.finish_reason is not None
        add_drafts(self.drafts, update.drafts)
        self.notes += update.notes
        self.num_shared += update.num_shared
