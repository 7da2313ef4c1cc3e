"""Chat templates: a list of messages becomes the text that a chat model was trained on.

    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    template.render([{"role": "user", "content": "Hello"}])

Templates are jinja2, rendered as transformers does: the same filters, tags and variables, `documents` being
None. A bundle may come from anywhere, so they run in a sandbox, with an end to their work (sandbox.py).
"""

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from io import StringIO
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ease_common.errors import RequestError, shown
from ease_common.sandbox import BoundedSandbox, bounded, started

LONGEST_REASON = 300  # characters
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same; templates read the first two
ROLES = ("system", "developer", "user", "assistant", "tool")
DIGITS = 30  # of a random number that no text holds by chance
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # as OpenAI has them: {"type": "function", "function": {"name": ...}}


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
    `takes_tools`: whether it reads the tools that it is given.
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
        self.source = ""
        self.takes_tools = False
        try:
            self.source = source if isinstance(source, str) else source.decode()
            self.template = environment.read(self.source)
            names = environment.parse(self.source).find_all(nodes.Name)
            self.takes_tools = any(name.name == "tools" and name.ctx == "load" for name in names)
        except Exception as error:  # what jinja2, Python's own compiler and UTF-8 do not take
            self.problem = (
                f"the chat template cannot be read ({_reason(error)}); chat is refused, all else works"
            )

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, go_on: bool = False
    ) -> str:
        """The text up to where the assistant's answer begins; with `go_on` up to the end of the last message,
        an assistant's, which the answer goes on with.

        Raises RequestError for messages that are none, or not to its liking, for tools that it does not take,
        and for a template that cannot be read.
        """
        check_messages(messages)
        if self.problem is not None:
            raise RequestError(self.problem)
        known = [as_templates_know_it(message) for message in messages]
        self._check_tools(known, tools)
        end = f"{secrets.randbelow(10**DIGITS):0{DIGITS}}" if go_on else ""
        if go_on:
            last = known[-1]
            if last["role"] != "assistant" or last.get("tool_calls"):
                raise RequestError("only an assistant's message, without tool_calls, can be gone on with")
            known[-1] = {**last, "content": last["content"] + end}
        try:
            pieces = self.template.generate(
                started(),
                messages=known,
                tools=tools,
                documents=None,
                add_generation_prompt=not go_on,
                **self.special_tokens,
            )
            text = _joined(pieces)
        except Exception as error:  # a template is a program: it may fail in any way
            raise RequestError(f"the chat template cannot take these messages: {_reason(error)}") from None
        if go_on and end not in text:
            raise RequestError(
                "the chat template does not write the last message, which is to be gone on with"
            )
        return text[: text.rindex(end)] if go_on else text

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
        """Raises RequestError for what the template would leave out in silence."""
        if tools and not self.takes_tools:
            raise RequestError("this bundle's chat template takes no tools; leave `tools` out")
        if "tool_calls" not in self.source and any(message.get("tool_calls") for message in messages):
            raise RequestError("this bundle's chat template takes no tool_calls in messages; leave them out")


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


def as_templates_know_it(message: Message) -> Message:
    """A message without what is None, which templates take for something; with a text where it has only calls
    of tools, the arguments of these as objects, and its reasoning under both names. Raises RequestError for
    calls that are none.
    """
    given = {name: value for name, value in message.items() if value is not None}
    if not given.get("tool_calls"):
        given.pop("tool_calls", None)  # an empty list: templates ask whether there is one
    else:
        given = {"content": "", **given, "tool_calls": [_call(call) for call in given["tool_calls"]]}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _call(call: Any) -> Mapping[str, Any]:
    """A call of a tool, its arguments as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f'tool_calls has {shown(call)}, which is not like {{"type": "function", "function": '
            '{"name": "...", "arguments": "{}"}}'
        )
    arguments = function.get("arguments") or {}
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, Mapping):
        raise RequestError(
            f"the arguments {shown(arguments)} of {shown(function['name'])} are no JSON object"
        )
    return {"type": "function", **call, "function": {**function, "arguments": read}}


class PlainTemplate:
    """For a base model, which knows no turns: the texts one after the other, a line each, for the model to go
    on.
    """

    def render(self, messages: Sequence[Message]) -> str:
        """The text to continue. Raises RequestError for messages that are none."""
        check_messages(messages)
        return "\n".join(str(message.get("content") or "") for message in messages) + "\n"


def check_messages(messages: Any) -> None:
    """Raises RequestError for anything but a list of messages, each with a role and a text; an assistant's
    may have calls of tools instead.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError('messages must be a list like [{"role": "user", "content": "Hello"}], not empty')
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{place}] has no text as its content")
        if message.get("role") not in ROLES:
            raise RequestError(
                f"messages[{place}] has the role {repr(message.get('role'))[:80]}; use one of: "
                f"{', '.join(ROLES)}"
            )
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list | tuple):
            raise RequestError(f"messages[{place}] has tool_calls {shown(calls)}, which is not a list")
        if calls and message["role"] != "assistant":
            raise RequestError(f"messages[{place}] has tool_calls; only an assistant's message may")
        if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
            raise RequestError(f"messages[{place}] has no text as its content")
