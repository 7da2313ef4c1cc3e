"""Tokens become the objects that OpenAI's clients read: whole answers, and the parts of a stream."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ease_runtime.generation import TokenEvent, drafter_shares
from ease_runtime.server.dispatcher import Ticket
from ease_runtime.server.requests import GenerationRequest


@dataclass
class Answer:
    """What is being said to one request. `chat` decides between the two shapes."""

    request: GenerationRequest
    model: str
    chat: bool
    token_text: Callable[[int], str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    depths: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)  # characters so far of each completion

    def head(self, part: bool) -> dict[str, Any]:
        """What stands in every object."""
        kind = f"chat.completion{'.chunk' if part else ''}" if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def whole(
        self, completions: list[list[TokenEvent]], reasons: list[str | None], ticket: Ticket
    ) -> dict[str, Any]:
        """A complete answer."""
        choices = []
        for index, (events, reason) in enumerate(zip(completions, reasons, strict=True)):
            text = "".join(event.text for event in events)
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.chat
                else {"text": text}
            )
            choices.append({"index": index, **said, **self.details(index, events), "finish_reason": reason})
        return {**self.head(part=False), "choices": choices, "usage": self.usage(ticket)}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """The parts that begin a stream: in a chat, who speaks."""
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(num_choices)
        ]
        return [self.part([choice]) for choice in choices] if self.chat else []

    def more(self, index: int, events: list[TokenEvent], reason: str | None) -> dict[str, Any]:
        """The part that new tokens make; the last of a completion has its finish reason."""
        text = "".join(event.text for event in events)
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"delta": {"content": text} if events else {}}
        return self.part([{"index": index, **said, **self.details(index, events), "finish_reason": reason}])

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""
        return {
            **self.head(part=True),
            "choices": choices,
            **({"usage": None} if self.request.include_usage else {}),
        }

    def closing(self, ticket: Ticket) -> dict[str, Any]:
        """The part with the usage, which has no choices."""
        return {**self.head(part=True), "choices": [], "usage": self.usage(ticket)}

    def usage(self, ticket: Ticket) -> dict[str, Any]:
        """Tokens of prompts and answers; with `ease`, what they cost in layers."""
        prompt = sum(len(prompt) for prompt in self.request.prompts)
        completion = len(self.depths)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        if self.request.show_ease:
            mean_depth = sum(self.depths) / completion if completion else None
            usage["ease"] = {
                "mean_depth": mean_depth,
                "drafted": sum(count.judged for count in ticket.drafts.values()),
                "accepted": sum(count.accepted for count in ticket.drafts.values()),
                "drafters": drafter_shares(ticket.drafts, completion),
                "notes": ticket.notes,
            }
        return usage

    def details(self, index: int, events: list[TokenEvent]) -> dict[str, Any]:
        """Log-probabilities and depths, as far as they were asked for. Counts the tokens."""
        self.depths += [event.depth for event in events]
        logprobs = None
        if self.request.show_logprobs:
            logprobs = (
                {"content": [self.chat_logprob(event) for event in events]}
                if self.chat
                else self.logprobs(index, events)
            )
        ease = (
            {"ease": {"tokens": [token_object(event) for event in events]}} if self.request.show_ease else {}
        )
        return {"logprobs": logprobs, **ease}

    def logprobs(self, index: int, events: list[TokenEvent]) -> dict[str, Any]:
        """As /v1/completions has them: lists side by side. Offsets are in characters of the completion."""
        offsets = []
        end = self.lengths.get(index, 0)
        for event in events:
            offsets.append(end)
            end += len(event.text)
        self.lengths[index] = end
        return {
            "tokens": [self.token_text(event.id) for event in events],
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [
                {self.token_text(token): logprob for token, logprob in event.top_logprobs} for event in events
            ],
            "text_offset": offsets,
        }

    def chat_logprob(self, event: TokenEvent) -> dict[str, Any]:
        """As /v1/chat/completions has them: an object a token."""
        return {
            **self._logprob(event.id, event.logprob),
            "top_logprobs": [self._logprob(*pair) for pair in event.top_logprobs],
        }

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def token_object(event: TokenEvent) -> dict[str, Any]:
    """A token's text, depth in layers and confidence, and who drafted it, if anybody."""
    return {
        "id": event.id,
        "text": event.text,
        "depth": event.depth,
        "confidence": event.confidence,
        "drafted": event.drafted,
        **({"drafter": event.drafter} if event.drafter else {}),
    }
