"""Calls of tools in the text of an answer, in the form that the model was trained on, found as it comes.

    form = form_of(template, special_ids)                # of a bundle's chat template
    reader = CallReader(form, frozenset({"weather"}))
    reader.feed('<tool_call>\\n{"name": "weather", "arguments": {"city"')
    [CallPiece(index=0, name="weather", id="Vx3...", arguments='{"city"')]

A call's arguments are told as they come. Knows nothing about models or requests.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ease_common.chat import ChatTemplate
from ease_runtime.text.grammar import JSON_FORM

HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
ID_LETTERS = 9  # of a call's id: what Mistral's templates want
ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls. `separator` stands between calls; '' where there is one call only."""

    name: str
    opening: str  # before a call, or before the list of them
    begin: str  # of the first call, after the opening
    separator: str
    end: str
    arguments: str  # the key of a call's arguments
    markers: tuple[str, ...]  # that stand around calls, and are no text
    filler: str  # characters that may stand around calls
    bare: bool = False  # whether an answer may begin with a call, without the opening


HERMES = CallForm(
    "Hermes",
    opening="<tool_call>",
    begin="\n",
    separator="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
    arguments="arguments",
    markers=("<tool_call>", "</tool_call>"),
    filler=" \t\r\n",
)
LLAMA = CallForm(
    "Llama 3",
    opening="<|python_tag|>",
    begin="",
    separator="",
    end="",
    arguments="parameters",
    markers=("<|python_tag|>",),
    filler=" \t\r\n;",
    bare=True,
)
MISTRAL = CallForm(
    "Mistral",
    opening="[TOOL_CALLS]",
    begin="[",
    separator=", ",
    end="]",
    arguments="arguments",
    markers=("[TOOL_CALLS]",),
    filler=" \t\r\n[,]",
)
FORMS = (HERMES, MISTRAL, LLAMA)
LLAMA_KEY = re.compile(r'\\?"parameters\\?": ')  # as its templates write a call, or ask for one
OTHER_FORMS = ("<function=", "<arg_key>", "[ARGS]")  # whose arguments are no JSON object beside the name


def form_of(template: ChatTemplate | None, special: Set[str]) -> CallForm | None:
    """The form that a chat template and the special tokens show; None where it is none of these."""
    source = "" if template is None or not template.takes_tools else template.source
    if not source or any(mark in source for mark in OTHER_FORMS):
        return None
    if found := next((form for form in FORMS if form.opening in source), None):
        return found
    if LLAMA_KEY.search(source):
        return LLAMA
    return next((form for form in FORMS if form.opening in special), None)


@dataclass(frozen=True)
class CallPiece:
    """News of a call: with the first its id and name, with each more of its arguments."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


@dataclass
class ObjectEnd:
    """Where a JSON object that comes in pieces ends."""

    depth: int = 0
    in_text: bool = False
    escaped: bool = False

    def find(self, text: str) -> int | None:
        """How many characters of one more piece belong to it, if it ends there."""
        for place, character in enumerate(text, 1):
            if self.escaped:
                self.escaped = False
            elif self.in_text:
                self.escaped = character == "\\"
                self.in_text = character != '"'
            elif character == '"':
                self.in_text = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return place
        return None


@dataclass
class CallReader:
    """Parts the text of an answer into what is said and what is called, of `names` only: whatever else looks
    like a call is text. No more than `most` calls are told, where that is given.
    """

    form: CallForm
    names: frozenset[str]
    most: int | None = None
    num_calls: int = 0
    text: str = ""  # not understood yet
    opened: str = ""  # what was taken for the beginning of a call, should it be none
    state: str = "text"
    begun: bool = False  # whether anything has been said or called
    end: ObjectEnd = field(default_factory=ObjectEnd)
    num_seen: int = 0  # characters of the object that `end` has looked at

    def feed(self, text: str, last: bool = False) -> tuple[str, list[CallPiece]]:
        """The text that is certain to be said after one more piece, and the news of calls; all of both after
        the last.
        """
        self.text += text
        said = ""
        pieces: list[CallPiece] = []
        steps = {"text": self._text, "between": self._between, "head": self._head}
        steps |= {"arguments": self._arguments, "tail": self._tail}
        while True:
            more, news, going = steps[self.state](last)
            said += more
            pieces += news
            if not going:
                break
        self.begun = self.begun or bool(said.strip() or pieces)
        return said, [piece for piece in pieces if self.most is None or piece.index < self.most]

    # Each step: what is said, what is called, and whether there is more to do with the text that is here.

    def _text(self, last: bool) -> tuple[str, list[CallPiece], bool]:
        text = self.text
        start = text.find(self.form.opening)
        if self.form.bare and not self.begun and text.lstrip().startswith("{"):
            start = text.index("{")
        if start >= 0:
            said = text[:start].rstrip()
            self.opened = text[len(said) : start]
            self.text = text[start:]
            self.state = "between"
            self.begun = self.begun or bool(said)
            return said, [], True
        held = 0 if last else num_held(text, self.form.opening)
        self.text = text[len(text) - held :]
        return text[: len(text) - held], [], False

    def _between(self, last: bool) -> tuple[str, list[CallPiece], bool]:
        """Around calls."""
        text = self.text
        while text:
            known = next((mark for mark in self.form.markers if text.startswith(mark)), text[0])
            if known not in self.form.markers and known not in self.form.filler:
                break
            self.opened += known
            text = text[len(known) :]
        self.text = text
        if text.startswith("{"):
            self.state = "head"
            self.end, self.num_seen = ObjectEnd(), 0
            return "", [], True
        if not last and any(mark.startswith(text) for mark in self.form.markers):
            return "", [], False
        return self._no_call(text[:1]) if self._unanswered() else self._back_to_text()

    def _unanswered(self) -> bool:
        return self.form.opening in self.opened

    def _back_to_text(self) -> tuple[str, list[CallPiece], bool]:
        self.state = "text"
        self.opened = ""
        return "", [], bool(self.text)

    def _head(self, last: bool) -> tuple[str, list[CallPiece], bool]:
        """Of an object that may be a call."""
        found = HEAD.match(self.text)
        if found and (name := read_json(found[1])) in self.names:
            self.text = self.text[found.end() :]
            self.state, self.end = "arguments", ObjectEnd()
            return "", [self._begin(str(name), "")], True
        count = self.end.find(self.text[self.num_seen :])
        if count is None and not last:
            self.num_seen = len(self.text)
            return "", [], False
        whole = self.text if count is None else self.text[: self.num_seen + count]
        call = read_call(read_json(whole))
        if call is None or call[0] not in self.names:
            return self._no_call(whole)
        self.text = self.text[len(whole) :]
        return self._after_call(self._begin(*call))

    def _begin(self, name: str, arguments: str) -> CallPiece:
        self.num_calls += 1
        self.begun = True
        return CallPiece(self.num_calls - 1, arguments, secrets.token_hex(ID_LETTERS)[:ID_LETTERS], name)

    def _no_call(self, text: str) -> tuple[str, list[CallPiece], bool]:
        """It was text, like what came before it."""
        said = self.opened + text
        self.text = self.text[len(text) :]
        self.begun = True
        return said, [], self._back_to_text()[2]

    def _arguments(self, last: bool) -> tuple[str, list[CallPiece], bool]:
        count = self.end.find(self.text)
        piece = self.text if count is None else self.text[:count]
        self.text = self.text[len(piece) :]
        news = [CallPiece(self.num_calls - 1, piece)] if piece else []
        if count is None:
            return "", news, False
        self.state, self.end = "tail", ObjectEnd(depth=1)
        return "", news, True

    def _tail(self, last: bool) -> tuple[str, list[CallPiece], bool]:
        """What an object has after its arguments; nobody asks for it."""
        count = self.end.find(self.text)
        self.text = "" if count is None else self.text[count:]
        return ("", [], False) if count is None else self._after_call()

    def _after_call(self, *news: CallPiece) -> tuple[str, list[CallPiece], bool]:
        self.state = "between"
        self.opened = ""
        return "", list(news), True


def num_held(text: str, opening: str) -> int:
    """How many characters at a text's end may be the beginning of a call: of its mark, and the white space
    before that.
    """
    longest = min(len(text), len(opening) - 1)
    part = next((n for n in range(longest, 0, -1) if opening.startswith(text[-n:])), 0)
    before = text[: len(text) - part]
    return part + len(before) - len(before.rstrip())


def read_json(text: str) -> Any:
    """A JSON value; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_call(value: Any) -> tuple[str, str] | None:
    """The name and the arguments, as JSON, of an object that is a call."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    return (value["name"], json.dumps(arguments)) if isinstance(arguments, Mapping) else None


def grammar_of(
    form: CallForm, functions: Sequence[Mapping[str, Any]], special: Mapping[str, int], *, one: bool
) -> str:
    """The grammar, in Lark's notation, of an answer that calls these functions: one of them once, or any of
    them once or more. `special` has the ids of special tokens by their texts.
    """
    opening = f"<[{special[form.opening]}]>" if form.opening in special else json.dumps(form.opening)
    many = bool(form.separator) and not one
    first = f'" "? {json.dumps(form.begin)}' if form.begin else ""
    again = f"({_literal(form.separator, special)} call)*" if many else ""
    start = f"{'' if form.bare else opening} {first} call {again} {_literal(form.end, special)}"
    lines = [f"start: {start}", f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
    for place, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": ')
        lines += [f'call{place}: {head} arguments{place} "}}"']
        lines += [f"arguments{place}: %json {json.dumps(arguments_schema(function))}"]
    return "\n".join(lines)


def arguments_schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments, written as in a schema of their own (grammar.py)."""
    given = function.get("parameters")
    schema = {**ANY_ARGUMENTS, "additionalProperties": False} if given is None else {**ANY_ARGUMENTS, **given}
    return {"x-guidance": JSON_FORM, **schema}


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text in Lark's notation, its special tokens by their ids."""
    marks = [mark for mark in ("<tool_call>", "</tool_call>") if mark in special]
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    return " ".join(f"<[{special[part]}]>" if part in marks else json.dumps(part) for part in parts if part)
