"""Quality tasks from local files, an item a JSON line. What the line has says what kind it is:

    multiple choice; the answer is a number from 0, a letter, or the choice itself:
    {"question": "Is the sky blue?", "choices": ["yes", "no"], "answer": 0}
    exact match, by lm_eval's filters (grading):
    {"question": "How much is 6 x 7?", "answer": "6 x 7 = 42\\n#### 42"}
    the last word:
    {"text": "And God said, Let there be light"}

"context" (or "prompt") in place of "question" is taken as it stands; a question becomes "Question:
...\\nAnswer:". Files may end in .gz.
"""

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ease_common.errors import RequestError
from ease_eval.tasks.grading import MARK, filter_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class MultipleChoice:
    """Which of some continuations is right (`answer`, from 0)?"""

    line: int
    context: str
    choices: tuple[str, ...]
    answer: int
    kind = "multiple choice"

    @property
    def solved(self) -> str:
        """The item with its answer, as an example for another."""
        return f"{self.context} {self.choices[self.answer]}"


@dataclass(frozen=True)
class ExactMatch:
    """What is the answer? Text is generated, and its answer must be this one."""

    line: int
    context: str
    answer: str  # with the way to it, where it is told
    kind = "exact match"

    @property
    def filter(self) -> str:
        """What finds the answer in a generated text."""
        return filter_of(self.answer)

    @property
    def solved(self) -> str:
        """The item with its answer, as an example for another."""
        return f"{self.context} {self.answer}"


@dataclass(frozen=True)
class LastWord:
    """Which word ends a passage?"""

    line: int
    context: str
    word: str
    kind = "last word"

    @property
    def solved(self) -> str:
        """The whole passage."""
        return f"{self.context} {self.word}"


Item = MultipleChoice | ExactMatch | LastWord


@dataclass(frozen=True)
class TaskFile:
    """A file's items, all of one kind, and what is wrong with the lines that are none."""

    path: Path
    items: tuple[Item, ...]
    faults: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What is asked."""
        return self.items[0].kind


def read_tasks(path: Path, limit: int) -> TaskFile:
    """The first `limit` good lines. Raises RequestError for a file that cannot be read, or that has none."""
    try:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"cannot read tasks from {path}: {error}") from None
    items: list[Item] = []
    faults = []
    for number, line in enumerate(lines, 1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            item = parse(line, number)
            if items and item.kind != items[0].kind:
                raise ValueError(f"this is {item.kind}, the lines before are {items[0].kind}")
            items.append(item)
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    if not items:
        raise RequestError(f"{faults[0]}; no other line is good either" if faults else f"{path} has no tasks")
    return TaskFile(path, tuple(items), tuple(faults))


def parse(line: bytes, number: int) -> Item:
    """One line's item. Raises ValueError that says what is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    if "choices" in row:
        return MultipleChoice(number, _context(row), *_choices(row))
    if "answer" in row:
        answer = row["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError('"answer" must be a text')
        if MARK.strip() in answer and MARK not in answer:
            raise ValueError(f'"answer" has "####" without a space behind it; expected "{MARK}42"')
        return ExactMatch(number, _context(row), answer)
    parts = row["text"].rsplit(maxsplit=1) if isinstance(row.get("text"), str) else []
    if len(parts) != 2:
        raise ValueError('expected "choices", "answer", or a "text" of two words or more')
    return LastWord(number, *parts)


def _context(row: dict[str, Any]) -> str:
    for key in ("question", "context", "prompt"):
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return f"Question: {value}\nAnswer:" if key == "question" else value
    raise ValueError('expected a text under "question", "context" or "prompt"')


def _choices(row: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    choices = row["choices"]
    answer = row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise ValueError('"choices" must be two texts or more')
    texts = tuple(choices)
    if type(answer) is int and 0 <= answer < len(texts):
        return texts, answer
    if isinstance(answer, str) and answer in texts:
        return texts, texts.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in LETTERS[: len(texts)]:
        return texts, LETTERS.index(answer.upper())
    raise ValueError(
        f'"answer" {str(answer)[:40]!r} is none of the {len(texts)} choices, by number from 0, letter or text'
    )


def examples(items: tuple[Item, ...], shots: int) -> tuple[str, tuple[Item, ...]]:
    """The first `shots` items solved, as the text before each of the others; and those.

    Raises RequestError where none is left.
    """
    if not 0 <= shots < len(items):
        raise RequestError(
            f"shots {shots} is outside 0..{len(items) - 1}: of {len(items)} items one at least must be asked"
        )
    return "".join(f"{item.solved}\n\n" for item in items[:shots]), items[shots:]
