"""jinja2's sandbox with an end to its work: how often a template goes round, for how long, and how large what
it makes may be.

    template = BoundedSandbox(trim_blocks=True).read(source)
    text = template.render(started() | {"messages": messages})

What a filter makes is looked at when it is done: the memory of a single one has no limit.
"""

import re
import time
from collections.abc import Sized
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_ROUNDS = 1_000_000  # of all loops and macros together
MOST_SECONDS = 10.0
LONGEST = 1 << 24  # a text in characters, a list in items; the largest number that a call or filter is given
MOST_BITS = 4096  # of a whole number
WIDE = re.compile(r"\d{6}")  # in a format: how many places something takes
BUDGET = "the budget"  # a variable that no template can name


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.rounds = 0
        self.deadline = time.monotonic() + MOST_SECONDS

    def spend(self) -> None:
        """Go round once. Raises TemplateError past the end."""
        self.rounds += 1
        if self.rounds > MOST_ROUNDS:
            raise TemplateError(f"it goes round more than {MOST_ROUNDS} times")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"it takes more than {MOST_SECONDS:g} s")


def started() -> dict[str, Any]:
    """The variable that each rendering needs anew."""
    return {BUDGET: Budget()}


def bounded(value: Any) -> Any:
    """The value itself. Raises TemplateError for one that is too large."""
    if isinstance(value, Sized):
        _check_length(len(value))
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise TemplateError(f"it computes a number of more than {MOST_BITS} bits")
    return value


def allowed(value: Any) -> Any:
    """The value itself. Raises TemplateError for a number that nothing should be told to do so often."""
    if isinstance(value, int) and value > LONGEST:
        raise TemplateError(f"it calls something with a number above {LONGEST}")
    return value


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise TemplateError(f"it makes a text or a list longer than {LONGEST}")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and WIDE.search(text):
        raise TemplateError("it has a format of 100000 places or more")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Where a template does too much, rendering raises TemplateError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # or constants are computed before anybody looks
        del self.globals["lipsum"]

    def read(self, source: str) -> Template:
        """A template that counts its rounds. Raises TemplateSyntaxError."""
        return self.from_string(Counting().visit(self.parse(source)))

    def spend(self, context: Context) -> None:
        """What every round begins with."""
        context.parent[BUDGET].spend()

    def bounded(self, _: Context, value: Any) -> Any:
        """What comes out of a filter."""
        return bounded(value)

    def allowed(self, _: Context, value: Any) -> Any:
        """What a filter is told."""
        return allowed(value)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__self__", None) is self:
            return function(context, *args)
        for value in (*args, *kwargs.values()):
            allowed(value)
        _check_format(getattr(getattr(function, "__wrapped__", None), "__self__", None))  # str.format
        return bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, Sized) and isinstance(times, int):
                    _check_length(len(sized) * times)
        if operator == "**" and isinstance(right, int) and abs(right) > MOST_BITS:
            raise TemplateError(f"it computes a number of more than {MOST_BITS} bits")
        if operator == "%":
            _check_format(left)
        return bounded(super().call_binop(context, operator, left, right))


def _ask(name: str, *values: nodes.Expr) -> nodes.Call:
    """A call of a method of the sandbox."""
    return nodes.Call(nodes.EnvironmentAttribute(name), [*values], [], None, None)


class Counting(NodeTransformer):
    """Has loops and macros of a parsed template spend a round, and looks at what filters and joined texts
    are given and come to.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 finds these by their names
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_ask("spend")))
        return node

    visit_Macro = visit_CallBlock = visit_For  # noqa: N815

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.args = [_ask("allowed", value) for value in node.args]
        for named in node.kwargs:
            named.value = _ask("allowed", named.value)
        return _ask("bounded", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ask("bounded", node)

    def visit_FilterBlock(self, node: nodes.FilterBlock | nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        """The filter of a block has to stay one."""
        node.body = [self.visit(part) for part in node.body]
        return node

    visit_AssignBlock = visit_FilterBlock  # noqa: N815
