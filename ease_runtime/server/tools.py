"""OpenAI's `tools` and `tool_choice`: which calls an answer may have, must have, and how they are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ease_common.errors import RequestError, shown
from ease_runtime.llm import TextEngine
from ease_runtime.text.tool_calls import CallForm, CallReader, grammar_of

Body = Mapping[str, Any]
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request. `marks`: the texts of the special tokens that stand around calls."""

    tools: Sequence[Body]
    form: CallForm
    marks: Mapping[int, str]
    most: int | None = None  # calls of an answer
    grammar: str | None = None  # of an answer that has to call one

    def reader(self) -> CallReader:
        """What parts a completion's text into what is said and what is called."""
        return CallReader(self.form, frozenset(tool["function"]["name"] for tool in self.tools), self.most)


def read_tools(body: Body, llm: TextEngine) -> ToolUse | None:
    """The tools of a body, if it has some. Raises RequestError."""
    tools = body.get("tools")
    choice = body.get("tool_choice")
    parallel = body.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise RequestError(f"parallel_tool_calls {shown(parallel)} must be true or false")
    if tools is None:
        if choice is not None:
            raise RequestError(f"tool_choice {shown(choice)} needs tools")
        return None
    functions = read_functions(tools)
    if llm.template is None or not llm.template.takes_tools:
        raise RequestError("this bundle has no chat template that takes tools; leave `tools` out")
    form = llm.call_form
    if form is None:
        raise RequestError(
            "this bundle's chat template writes calls of tools in a form that is not known here (known: "
            "Hermes's, Llama 3's, Mistral's); leave `tools` out"
        )
    special = llm.special.ids
    marks = {special[mark]: mark for mark in form.markers if mark in special}
    called = read_choice(choice, functions)
    grammar = None
    if called is not None:
        one = not parallel or choice != "required"
        grammar = grammar_of(form, called, special, one=one)
    return ToolUse(tools, form, marks, None if parallel else 1, grammar)


def read_functions(tools: Any) -> list[Body]:
    """The functions of OpenAI's tools. Raises RequestError."""
    expected = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
    if not isinstance(tools, list):
        raise RequestError(f"tools {shown(tools)} is not a list of objects like {expected}")
    functions = []
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise RequestError(f"tools[{place}] {shown(tool)} is not like {expected}")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RequestError(f"tools[{place}] has the name {shown(name)}, not 1 to 64 of A-Z a-z 0-9 _ . -")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"tools[{place}] has parameters {shown(parameters)}, not a JSON schema")
        functions.append(function)
    names = [function["name"] for function in functions]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"tools has two functions of the name {again!r}")
    return functions


def read_choice(choice: Any, functions: Sequence[Body]) -> Sequence[Body] | None:
    """The functions of which one has to be called; None where the model may choose. Raises RequestError."""
    if choice is None:
        return None
    if choice == "required":
        return functions
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(function, Mapping) or choice.get("type") != "function":
        raise RequestError(
            f'tool_choice {shown(choice)} is none of "none", "auto", "required" and '
            '{"type": "function", "function": {"name": "..."}}'
        )
    named = [one for one in functions if one["name"] == function.get("name")]
    if not named:
        raise RequestError(f"tool_choice names {shown(function.get('name'))}, which is none of the tools")
    return named
