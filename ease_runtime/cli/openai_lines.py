"""Lines of OpenAI's batch files: a request of its API each, and what the API answers to it.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "In the", "n": 2}}
    {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, "body": {...}}, "error": null}

Bodies are read and answered as the server does; whatever model they name, it is the batch's.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from ease_common.errors import RequestError, shown
from ease_runtime.generation import Choice, Generation, TokenEvent
from ease_runtime.llm import TextEngine
from ease_runtime.options import TO_THE_END, Options
from ease_runtime.server.answers import Answer
from ease_runtime.server.api_error import ApiError, error_object
from ease_runtime.server.requests import GenerationRequest, check_length, read_chat, read_completion
from ease_runtime.server.updates import Tally, Update

URLS = {"/v1/completions": read_completion, "/v1/chat/completions": read_chat}


def batch_id(number: int) -> str:
    """What the answer to a line is called."""
    return f"batch_req_{number}"


@dataclass
class OpenAiLine:
    """A line of OpenAI's form. `custom_id` comes back."""

    number: int  # from 1
    custom_id: Any
    generations: list[Generation] = field(default_factory=list)
    asked: Answer | None = None
    news: list[Update] = field(default_factory=list)  # of each completion, all of it
    tally: Tally = field(default_factory=Tally)
    error: ApiError | None = None

    @classmethod
    def start(cls, llm: TextEngine, number: int, values: dict[str, Any], options: Options) -> Self:
        """Queue a line's requests; one that cannot run is answered by its error."""
        line = cls(number, values["custom_id"])
        try:
            asked, is_chat = read_line(llm, values, options)
            for prompt in asked.prompts:
                generation = llm.submit(
                    prompt, asked.options, score_prompt=asked.score_prompt, patterns=asked.patterns
                )
                line.generations.append(generation)
            line.asked = Answer(asked, str(values["body"].get("model") or "ease"), is_chat, llm.token_bytes)
            line.news = [Update(index, []) for index in range(len(asked.prompts) * asked.options.n)]
        except RequestError as error:
            for generation in line.generations:
                llm.cancel(generation)
            line.generations = []
            line.error = error if isinstance(error, ApiError) else ApiError(400, str(error))
        return line

    def take(self, index: int, choice: Choice, events: list[TokenEvent]) -> None:
        update = Update.of(index, choice, events)
        self.tally.add(update)
        self.news[index] = update.after(self.news[index])
        if choice.error is not None:
            self.error = ApiError(500, choice.error, code="generation_failed")

    def answer(self) -> dict[str, Any]:
        body: dict[str, Any]
        if self.error is not None:
            status = self.error.status
            body = error_object(status, str(self.error), self.error.code)
        else:
            assert self.asked is not None, "what has no error was asked"
            status = 200
            body = self.asked.whole(self.news, self.tally)
        name = batch_id(self.number)
        response = {"status_code": status, "request_id": name, "body": body}
        return {"id": name, "custom_id": self.custom_id, "response": response, "error": None}


def read_line(llm: TextEngine, values: dict[str, Any], base: Options) -> tuple[GenerationRequest, bool]:
    """What a line asks for, and whether that is a chat. Raises RequestError."""
    for name, expected in (("custom_id", str), ("body", dict)):
        if not isinstance(values.get(name), expected):
            kind = "an object" if expected is dict else "a text"
            raise RequestError(f"{name} {shown(values.get(name))} is not {kind}")
    url = values.get("url")
    if values.get("method", "POST") != "POST" or url not in URLS:
        raise RequestError(
            f"{shown(values.get('method'))} {shown(url)} is none of POST {', POST '.join(URLS)}"
        )
    is_chat = URLS[url] is read_chat
    if is_chat and base.max_tokens == Options.max_tokens:
        base = replace(base, max_tokens=TO_THE_END)  # a chat that says nothing goes on to its end
    body = values["body"]
    asked = URLS[url](body, llm, base)
    if asked.stream:
        raise RequestError("stream: true has no place in a batch; leave it out")
    check_length(asked, context=llm.stack.max_positions, max_prompt=None, clamp=False)
    return asked, is_chat
