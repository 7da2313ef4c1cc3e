"""Chat templates: a list of messages becomes the text that a chat model was trained on.

    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    template.render([{"role": "user", "content": "Hello"}])

Templates are jinja2, rendered as transformers does: the same filters, tags and variables, `tools` and
`documents` being None. A bundle may come from anywhere, so they run in a sandbox, with an end to their work
(sandbox.py).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from io import StringIO
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ease_common.errors import RequestError
from ease_common.sandbox import BoundedSandbox, bounded, started

LONGEST_REASON = 300  # characters
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same; templates read the first two
ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, Any]


def _raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse messages."""
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own `tojson` escapes for HTML; models have seen plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class AssistantMark(Extension):
    """The tag `generation`, by which training knows what the assistant says; to its text it does nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        said = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], said).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A bundle's template, with the texts of the model's special tokens by their names (SPECIAL_TOKENS).

    `problem`: why it cannot be read, a line; None where it can. Everything but chat goes without it.
    """

    def __init__(self, source: str | bytes, **special_tokens: str) -> None:
        environment = BoundedSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[AssistantMark, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.special_tokens = special_tokens
        self.problem: str | None = None
        try:
            self.template = environment.read(source if isinstance(source, str) else source.decode())
        except Exception as error:  # what jinja2, Python's own compiler and UTF-8 do not take
            self.problem = (
                f"the chat template cannot be read ({_reason(error)}); chat is refused, all else works"
            )

    def render(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant's answer begins.

        Raises RequestError for messages that are none, or not to its liking, and for a template that cannot
        be read.
        """
        check_messages(messages)
        if self.problem is not None:
            raise RequestError(self.problem)
        try:
            pieces = self.template.generate(
                started(),
                messages=[_as_templates_know_it(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            )
            return _joined(pieces)
        except Exception as error:  # a template is a program: it may fail in any way
            raise RequestError(f"the chat template cannot take these messages: {_reason(error)}") from None


def _joined(pieces: Iterable[str]) -> str:
    """What a template writes, while that is of a length that a text can have. Raises TemplateError."""
    written = StringIO()
    for piece in pieces:
        written.write(piece)
        bounded(range(written.tell()))
    return written.getvalue()


def _reason(error: Exception) -> str:
    line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    said = " ".join(str(error).split())[:LONGEST_REASON]
    return (said or type(error).__name__) + line


def _as_templates_know_it(message: Message) -> Message:
    """A message without what is None, which templates take for something, and its reasoning under
    both names.
    """
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


class PlainTemplate:
    """For a base model, which knows no turns: the texts one after the other, a line each, for the model to go
    on.
    """

    def render(self, messages: Sequence[Message]) -> str:
        """The text to continue. Raises RequestError for messages that are none."""
        check_messages(messages)
        return "\n".join(str(message["content"]) for message in messages) + "\n"


def check_messages(messages: Any) -> None:
    """Raises RequestError for anything but a list of messages, each with a role and a text."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError('messages must be a list like [{"role": "user", "content": "Hello"}], not empty')
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise RequestError(f"messages[{place}] has no text as its content")
        if message.get("role") not in ROLES:
            raise RequestError(
                f"messages[{place}] has the role {repr(message.get('role'))[:80]}; use one of: "
                f"{', '.join(ROLES)}"
            )
