"""Many prompts from a file: a JSON object a line in, one a line out, in the same order.

    {"prompt": "In the beginning", "max_tokens": 20}
    {"line": 1, "choices": [{"text": ..., "finish_reason": ...}], "usage": ...}
    {"messages": [{"role": "user", "content": "Hello"}]}      {"line": 2, "choices": ...}
    {"prompt": 7}                                             {"line": 3, "error": {"message": ...}}

With `logprobs`, a choice has `tokens`, each with its depth and log-probabilities. Options without effect are
told in `notes`. A line may have an `id`, which comes back, and any field of Options, over those of the run.
Lines of OpenAI's batches are answered as theirs are (openai_lines.py). A run that was killed goes on where it
stopped: the lines that are out stay, and a last one that was cut off is written anew. Blank lines do not
count.
"""

import json
from codecs import BOM_UTF8 as BOM
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ease_common.errors import RequestError
from ease_runtime.cli.openai_lines import OpenAiLine, batch_id
from ease_runtime.cli.show import token_object
from ease_runtime.engine.sequence import DraftCount
from ease_runtime.generation import Choice, Generation, TokenEvent, add_drafts, drafter_shares
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from ease_runtime.server.requests import read_messages

AHEAD = 8  # answers that wait for an earlier one, in batches


class Line(Protocol):
    """A line on its way: requests that run, or what is said about it already."""

    generations: list[Generation]

    def take(self, index: int, choice: Choice, events: list[TokenEvent]) -> None:
        """News of its completion `index`."""

    def answer(self) -> dict[str, Any]:
        """The line to write, once all has come."""


@dataclass
class Item:
    """A line of this package's own form."""

    number: int  # from 1
    id: Any = None
    generations: list[Generation] = field(default_factory=list)  # at most one
    texts: list[str] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    # of each completion, where log-probabilities are asked for
    tokens: list[list[dict[str, Any]]] | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    token_text: Callable[[int], str] = str

    def take(self, index: int, choice: Choice, events: list[TokenEvent]) -> None:
        self.texts[index] += "".join(event.text for event in events)
        self.depths += [event.depth for event in events]
        if self.tokens is not None:
            self.tokens[index] += [token_object(event, self.token_text) for event in events]
        self.error = self.error or choice.error

    def answer(self) -> dict[str, Any]:
        named = {"line": self.number} if self.id is None else {"line": self.number, "id": self.id}
        if self.error is not None:
            return {**named, "error": {"message": self.error}}
        (generation,) = self.generations
        reasons = [choice.finish_reason for choice in generation.choices]
        choices: list[dict[str, Any]] = [
            {"text": text, "finish_reason": reason} for text, reason in zip(self.texts, reasons, strict=True)
        ]
        for choice, tokens in zip(choices, self.tokens or (), strict=bool(self.tokens)):
            choice["tokens"] = tokens
        usage: dict[str, Any] = {
            "prompt_tokens": len(generation.prompt),
            "completion_tokens": len(self.depths),
            "mean_depth": mean(self.depths),
        }
        drafts: dict[str, DraftCount] = {}
        for completion in generation.choices:
            add_drafts(drafts, completion.sequence.drafts.counts)
        if drafts:
            usage["drafters"] = drafter_shares(drafts, len(self.depths))
        return {**named, "choices": choices, "usage": usage, **({"notes": self.notes} if self.notes else {})}


def mean(values: list[int]) -> float | None:
    """None where there is nothing."""
    return sum(values) / len(values) if values else None


def answer_lines(
    llm: TextEngine, lines: Iterable[tuple[int, bytes]], options: Options, batch_size: int
) -> Iterator[str]:
    """Answer numbered lines, `batch_size` requests at a time; the answers come in the lines' order, each a
    line of JSON.
    """
    source = iter(lines)
    waiting = deque[Line]()
    places = dict[Choice, tuple[Line, int]]()
    more = True
    while more or waiting:
        while (
            more
            and sum(not done(item) for item in waiting) < batch_size
            and len(waiting) < AHEAD * batch_size
        ):
            line = next(source, None)
            more = line is not None
            if line is not None:
                waiting.append(start(llm, *line, options))
                choices = [choice for generation in waiting[-1].generations for choice in generation.choices]
                places |= {choice: (waiting[-1], index) for index, choice in enumerate(choices)}
        while waiting and done(waiting[0]):
            yield json.dumps(waiting.popleft().answer(), ensure_ascii=False)
        for choice, events in llm.step() if waiting else []:
            item, index = places[choice]
            item.take(index, choice, events)
            if choice.finish_reason is not None:
                del places[choice]


def done(line: Line) -> bool:
    """Whether there is nothing more to come."""
    return all(generation.finished for generation in line.generations)


def start(llm: TextEngine, number: int, line: bytes, options: Options) -> Line:
    """Queue a line's request; a line that is none is answered by its error."""
    item = Item(number, token_text=llm.token_text)
    try:
        values = read_object(line)
        if "custom_id" in values:
            return OpenAiLine.start(llm, number, values, options)
        item.id = read_id(values)
        prompt = read_prompt(llm, values)
        asked = Options.from_json(values, options)
        item.generations = [llm.submit(prompt, asked)]
        item.texts, item.notes = [""] * asked.n, llm.remarks(asked, prompt)
        item.tokens = [[] for _ in item.texts] if asked.logprobs else None
    except RequestError as error:
        item.error = str(error)
    return item


def read_object(line: bytes) -> dict[str, Any]:
    """A line's JSON object. Raises RequestError."""
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"the line is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f'the line is no JSON object like {{"prompt": "..."}}: {error}') from None
    if not isinstance(values, dict):
        raise RequestError('the line is no JSON object like {"prompt": "..."}')
    return values


def read_id(values: dict[str, Any]) -> str | int | None:
    """Take the id out of an object. Raises RequestError."""
    name = values.pop("id", None)
    if isinstance(name, str):
        return name.encode(errors="replace").decode()  # half of a surrogate pair cannot be written
    if name is None or type(name) is int:
        return name
    raise RequestError(f"id is of the type {type(name).__name__}; give a text or a whole number")


def read_prompt(llm: TextEngine, values: dict[str, Any]) -> list[int]:
    """Take the prompt or the messages out of an object, as ids. Raises RequestError."""
    if ("prompt" in values) == ("messages" in values):
        raise RequestError('the line needs either a "prompt" or "messages"')
    if "messages" in values:
        return llm.encode_chat(read_messages(values.pop("messages")))
    prompt = values.pop("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt is no text with at least one character")
    return llm.encode(prompt)


def count_answers(out: Path) -> int:
    """How many lines an earlier run has answered; cuts off a last line that is not whole.

    Raises RequestError for another file.
    """
    if not out.exists():
        return 0
    if not out.is_file():
        raise RequestError(f"{out} is no file that a stopped run could go on in; give the name of one")
    number = 0
    end = 0
    with out.open("rb+") as file:
        for line in file:
            begun = (f'{{"line": {number + 1}'.encode(), f'{{"id": "{batch_id(number + 1)}"'.encode())
            if not line.endswith(b"\n") and any(line[: len(head)] == head[: len(line)] for head in begun):
                break
            if not _is_answer(line, number + 1):
                raise RequestError(
                    f"{out} has something else at line {number + 1} than answer {number + 1} of a batch; "
                    "give another file"
                )
            number = number + 1
            end = end + len(line)
        file.truncate(end)
    return number


def _is_answer(line: bytes, number: int) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and (values.get("line") == number or values.get("id") == batch_id(number))


def count_failed(out: Path) -> int:
    """How many of a file's answers are errors."""
    with out.open("rb") as file:
        return sum(is_failure(line) for line in file)


def is_failure(line: str | bytes) -> bool:
    """Whether an answer's line says that there is none."""
    answer = json.loads(line)
    response = answer.get("response")
    return bool(answer.get("error")) or (isinstance(response, dict) and response.get("status_code") != 200)


def numbered_lines(path: Path, first: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from number `first` (from 1) on; blank ones do not count."""
    with path.open("rb") as file:
        for number, line in enumerate(told_lines(file), 1):
            if number >= first:
                yield number, line


def told_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that say something, without the byte order mark that some editors begin a file with."""
    for place, line in enumerate(file):
        line = line.removeprefix(BOM) if place == 0 else line
        if line.strip():
            yield line


def count_lines(path: Path) -> int:
    """How many say something.

    Raises RequestError for what can be read once only.
    """
    if not path.is_file():
        raise RequestError(f"{path} is no regular file, and a batch reads it twice; write it to one first")
    with path.open("rb") as file:
        return sum(1 for _ in told_lines(file))


def write_answers(out: Path, answers: Iterable[str]) -> Iterator[int]:
    """Append answers to a file as they come; yields how many there are by now."""
    with out.open("a", encoding="utf-8") as file:
        for number, answer in enumerate(answers, 1):
            file.write(answer + "\n")
            file.flush()
            yield number
