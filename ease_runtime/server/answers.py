"""Tokens become the objects that OpenAI's clients read: whole answers, and the parts of a stream."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ease_runtime.engine.sequence import Token
from ease_runtime.generation import TokenEvent, drafter_shares
from ease_runtime.server.requests import Echo, GenerationRequest
from ease_runtime.server.updates import Tally, Update
from ease_runtime.text.token_bytes import token_name
from ease_runtime.text.tool_calls import CallPiece, CallReader


@dataclass
class Answer:
    """What is being said to one request. `chat` decides between the two shapes."""

    request: GenerationRequest
    model: str
    chat: bool
    token_bytes: Callable[[int], bytes]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    depths: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(
        default_factory=dict
    )  # characters so far of each completion that has begun
    readers: dict[int, CallReader] = field(default_factory=dict)  # of each that may call tools

    def head(self, part: bool) -> dict[str, Any]:
        """What stands in every object."""
        kind = f"chat.completion{'.chunk' if part else ''}" if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def whole(self, completions: Sequence[Update], tally: Tally) -> dict[str, Any]:
        """A complete answer, of all the news of each completion."""
        choices = []
        for index, all_of_it in enumerate(completions):
            details = self.details(all_of_it)
            text = details.pop("text")
            said = {"text": text}
            if self.chat:
                content, calls = self.read_calls(all_of_it, text, whole=True)
                message = {
                    "role": "assistant",
                    "content": content or (None if calls else ""),
                    "refusal": None,
                }
                said = {"message": {**message, **({"tool_calls": calls} if calls else {})}}
            choices.append({"index": index, **said, **details, "finish_reason": self.reason(all_of_it)})
        return {**self.head(part=False), "choices": choices, "usage": self.usage(tally)}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """The parts that begin a stream: in a chat, who speaks."""
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(num_choices)
        ]
        return [self.part([choice]) for choice in choices] if self.chat else []

    def more(self, news: Update) -> dict[str, Any] | None:
        """The part that new tokens make; the last of a completion has its finish reason. None in a chat where
        nothing is to be told yet.
        """
        details = self.details(news)
        text = details.pop("text")
        said: dict[str, Any] = {"text": text}
        if self.chat:
            content, calls = self.read_calls(news, text)
            delta = {"content": content} if content else {}
            said = {"delta": {**delta, **({"tool_calls": calls} if calls else {})}}
            told = self.request.show_logprobs or self.request.show_ease
            if not (content or calls or told or news.finish_reason):
                return None
        return self.part([{"index": news.index, **said, **details, "finish_reason": self.reason(news)}])

    def read_calls(self, news: Update, text: str, whole: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """What new text says, and what it calls: whole calls, or OpenAI's deltas of them."""
        if self.request.tools is None:
            return text, []
        reader = self.readers.setdefault(news.index, self.request.tools.reader())
        content, pieces = reader.feed(text, last=news.finish_reason is not None)
        return content, call_objects(pieces, whole)

    def reason(self, news: Update) -> str | None:
        """Why a completion has ended, once it has."""
        reader = self.readers.get(news.index)
        called = reader is not None and reader.num_calls > 0
        return "tool_calls" if called and news.finish_reason == "stop" else news.finish_reason

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""
        return {
            **self.head(part=True),
            "choices": choices,
            **({"usage": None} if self.request.include_usage else {}),
        }

    def closing(self, tally: Tally) -> dict[str, Any]:
        """The part with the usage, which has no choices."""
        return {**self.head(part=True), "choices": [], "usage": self.usage(tally)}

    def usage(self, tally: Tally) -> dict[str, Any]:
        """Tokens of prompts and answers; with `ease`, what they cost in layers."""
        prompt = sum(len(prompt) for prompt in self.request.prompts)
        completion = len(self.depths)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": tally.num_shared},
        }
        if self.request.show_ease:
            mean_depth = sum(self.depths) / completion if completion else None
            usage["ease"] = {
                "mean_depth": mean_depth,
                "drafted": sum(count.judged for count in tally.drafts.values()),
                "accepted": sum(count.accepted for count in tally.drafts.values()),
                "drafters": drafter_shares(tally.drafts, completion),
                "notes": tally.notes,
            }
        return usage

    def details(self, news: Update) -> dict[str, Any]:
        """The text with log-probabilities and depths, as far as they were asked for. Counts the tokens."""
        events = news.events
        self.depths += [event.depth for event in events]
        marks = self.request.tools.marks if self.request.tools else {}
        text = "".join(marks.get(event.id, event.text) for event in events)
        echo = None
        if self.request.echoes and news.index not in self.lengths:
            echo = self.request.echoes[news.index // self.request.options.n]
            text = echo.text + text
        logprobs = None
        if self.request.show_logprobs and self.chat:
            logprobs = {"content": [self.chat_logprob(event) for event in events]}
        elif self.request.show_logprobs:
            logprobs = self.logprobs(news, echo)
        self.lengths[news.index] = self.lengths.get(news.index, 0) + len(text)
        ease = (
            {"ease": {"tokens": [token_object(event) for event in events]}} if self.request.show_ease else {}
        )
        return {"text": text, "logprobs": logprobs, **ease}

    def logprobs(self, news: Update, echo: Echo | None) -> dict[str, Any]:
        """As /v1/completions has them: lists side by side, a prompt that is repeated first. Offsets are in
        characters of the completion.
        """
        ids = [event.id for event in news.events]
        scores: list[Token | TokenEvent | None] = list(news.events)
        offsets = offsets_of([event.text for event in news.events], self.lengths.get(news.index, 0))
        if echo is not None:
            ids = [*self.request.prompts[news.index // self.request.options.n], *ids]
            scores = [None, *news.prompt_scores, *scores]  # nothing comes before the first
            offsets = [*offsets_of(echo.pieces, 0), *(len(echo.text) + offset for offset in offsets)]
        return {
            "tokens": [self.name(token) for token in ids],
            "token_logprobs": [score and score.logprob for score in scores],
            "top_logprobs": [score and self.by_name(score) for score in scores],
            "text_offset": offsets,
        }

    def name(self, token: int) -> str:
        """What a token is called: its text, or its bytes where they are no whole characters."""
        return token_name(self.token_bytes(token))

    def by_name(self, score: Token | TokenEvent) -> dict[str, float]:
        """The most probable tokens, and the one that was said; those that are called alike by their ids."""
        named: dict[str, float] = {}
        for token, logprob in with_chosen(score):
            name = self.name(token)
            named[f"token_id:{token}" if name in named else name] = logprob
        return named

    def chat_logprob(self, event: TokenEvent) -> dict[str, Any]:
        """As /v1/chat/completions has them: an object a token."""
        best = with_chosen(event) if event.top_logprobs else ()
        return {
            **self._logprob(event.id, event.logprob),
            "top_logprobs": [self._logprob(*pair) for pair in best],
        }

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": logprob, "bytes": list(self.token_bytes(token))}


def call_objects(pieces: Sequence[CallPiece], whole: bool) -> list[dict[str, Any]]:
    """News of calls as OpenAI has them, an object a call: whole ones, or deltas with their `index`."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        call = calls.setdefault(piece.index, {} if whole else {"index": piece.index})
        function = call.setdefault("function", {"arguments": ""})
        if piece.name:
            call |= {"id": piece.id, "type": "function"}
            function |= {"name": piece.name}
        function["arguments"] += piece.arguments
    return list(calls.values())


def with_chosen(score: Token | TokenEvent) -> list[tuple[int, float]]:
    """The most probable tokens with their log-probabilities, and the one that was said where it is none of
    them.
    """
    best = list(score.top_logprobs)
    return best if any(token == score.id for token, _ in best) else [*best, (score.id, score.logprob)]


def offsets_of(pieces: Sequence[str], start: int) -> list[int]:
    """Where each of some texts in a row begins."""
    return [start + offset for offset in accumulate(map(len, pieces), initial=0)][: len(pieces)]


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
