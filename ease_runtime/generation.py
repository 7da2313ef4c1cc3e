"""What becomes of a request: its tokens as events, its completions as they grow, and how long they took."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ease_runtime.engine.sequence import DraftCount, TokenSequence
from ease_runtime.text.streaming import Piece, TextWriter


@dataclass(frozen=True)
class TokenEvent:
    """One token.

    `text` is what became printable with it: '' while a character is incomplete, or past a stop string.

    `depth` counts layers; `drafter` ("exit", "ngram" and so on) said it before full depth, which agreed.
    `finish_reason` is set on the last event of a choice: 'stop' (the end token, whose text is '', or a stop
    string), 'length' or 'error'.
    """

    id: int
    text: str
    depth: int
    confidence: float
    logprob: float
    finish_reason: str | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafter: str = ""
    choice: int = 0  # which of the `n` completions

    @property
    def drafted(self) -> bool:
        """Whether somebody said it before full depth, which agreed."""
        return bool(self.drafter)


def add_drafts(total: dict[str, DraftCount], more: Mapping[str, DraftCount]) -> None:
    """Add the counts of some drafters to others."""
    for name, count in more.items():
        known = total.setdefault(name, DraftCount())
        known.judged += count.judged
        known.accepted += count.accepted


def drafter_shares(drafts: Mapping[str, DraftCount], num_tokens: int) -> dict[str, dict[str, float | None]]:
    """Of each drafter what it drafted, how much was accepted, and its share of the tokens: for reports."""
    return {
        name: {
            "drafted": count.judged,
            "accepted": count.accepted,
            "acceptance": count.accepted / count.judged if count.judged else None,
            "share": count.accepted / num_tokens if num_tokens else None,
        }
        for name, count in drafts.items()
    }


@dataclass
class Timing:
    """Wall-clock seconds of one generation, prefill and decoding apart, and its counts.

    The first token belongs to the prefill.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    token_seconds: list[float] = field(
        default_factory=list
    )  # of every token after the first; 0 for those that came with another
    drafts: dict[str, DraftCount] = field(default_factory=dict)  # by drafter (verify)
    notes: list[str] = field(default_factory=list)  # what the engine decided by itself

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over their time."""
        return len(self.token_seconds) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def num_drafted(self) -> int:
        """Drafts that full depth has judged."""
        return sum(count.judged for count in self.drafts.values())

    @property
    def num_accepted(self) -> int:
        """Those that it agreed with."""
        return sum(count.accepted for count in self.drafts.values())

    def add(self, seconds: float, num_tokens: int) -> None:
        """Note how long the next tokens took, one or more that came together."""
        if self.num_tokens == 0:
            self.prefill_seconds = seconds
            self.token_seconds += [0.0] * (num_tokens - 1)
        else:
            self.decode_seconds += seconds
            self.token_seconds += [seconds, *[0.0] * (num_tokens - 1)]
        self.num_tokens += num_tokens

    def note_end(self, sequence: TokenSequence) -> None:
        """Take over what a sequence that has ended tells of itself."""
        add_drafts(self.drafts, sequence.drafts.counts)
        self.notes += sequence.notes


@dataclass(frozen=True)
class Completion:
    """What was said to a prompt, with the layer at which each token left, and how fast."""

    tokens: list[TokenEvent]
    timing: Timing

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(event.text for event in self.tokens)

    @property
    def depths(self) -> list[int]:
        """Layers that each token used."""
        return [event.depth for event in self.tokens]

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, 'stop' or 'length'; None where nothing was to be said."""
        return self.tokens[-1].finish_reason if self.tokens else None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over their time."""
        return self.timing.tokens_per_second


@dataclass(eq=False)
class Choice:
    """One completion of a request, as it grows. `scorer` says its prompt until its scores are taken."""

    index: int
    sequence: TokenSequence
    writer: TextWriter
    scorer: TokenSequence | None = None
    num_read: int = 0  # tokens of the sequence that the writer has
    finish_reason: str | None = None
    error: str | None = None

    def read(self) -> list[TokenEvent]:
        """The events of the tokens whose text is certain by now.

        Sets `finish_reason` when there will be no more.
        """
        sequence = self.sequence
        pieces = []
        new = sequence.produced[self.num_read :]
        for place, token in enumerate(new):
            self.num_read += 1
            pieces += self.writer.add(
                token, last=sequence.finish_reason is not None and place == len(new) - 1
            )
            if self.writer.stopped:
                self.finish_reason = "stop"
                break
        else:
            self.finish_reason = sequence.finish_reason
            self.error = sequence.error
            if self.finish_reason is not None:
                pieces += self.writer.rest()
        return [
            self._event(piece, self.finish_reason if place == len(pieces) - 1 else None)
            for place, piece in enumerate(pieces)
        ]

    def _event(self, piece: Piece, finish_reason: str | None) -> TokenEvent:
        token = piece.token
        return TokenEvent(
            id=token.id,
            text=piece.text,
            depth=token.depth,
            confidence=token.confidence,
            logprob=token.logprob,
            finish_reason=finish_reason,
            top_logprobs=token.top_logprobs,
            drafter=token.drafter,
            choice=self.index,
        )


@dataclass(eq=False)
class Generation:
    """A request: its prompt's ids, and its completions."""

    prompt: list[int]
    choices: list[Choice]

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)
