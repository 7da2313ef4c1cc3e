"""Chat templates: a list of messages becomes the text that a chat model was trained on.

    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    template.render([{"role": "user", "content": "Hello"}])

Templates are jinja2, as transformers writes them. A bundle may come from anywhere, so they run in jinja2's immutable sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ease_runtime.errors import BundleError, RequestError

LONGEST_REASON = 300  # characters
ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, Any]


def _raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse messages."""
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """jinja2's own `tojson` escapes for HTML; models have seen plain JSON."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """A bundle's template. Raises BundleError when it is no jinja2."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"the bundle's chat template is no jinja2: {error}; export the bundle again") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant's answer begins. Raises RequestError for messages that are none, or not to its liking."""
        check_messages(messages)
        try:
            return self.template.render(messages=list(messages), add_generation_prompt=True, **self.tokens)
        except Exception as error:  # a template is a program: it may fail in any way
            reason = " ".join(str(error).split())[:LONGEST_REASON]
            raise RequestError(f"the chat template cannot take these messages: {reason}") from None


class PlainTemplate:
    """For a base model, which knows no turns: the texts one after the other, a line each, for the model to go on."""

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
            raise RequestError(f"messages[{place}] has the role {repr(message.get('role'))[:80]}; use one of: {', '.join(ROLES)}")
