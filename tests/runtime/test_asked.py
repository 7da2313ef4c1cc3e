"""Bodies of requests, whatever is in them: understood, or refused in one line."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_common.errors import RequestError
from ease_runtime.options import Options
from ease_runtime.policies.thresholds import OFF
from ease_runtime.server.requests import EASE, SHARED, read_chat, read_completion
from served import text_engine

LLM = text_engine()
NAMES = (
    *SHARED,
    "logprobs",
    "top_logprobs",
    "max_completion_tokens",
    "best_of",
    "echo",
    "suffix",
    "user",
    "tools",
    "response_format",
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("abc")
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "king"]), "content": st.text("abc", max_size=3)}
    )
)
EASES = st.dictionaries(
    st.sampled_from(EASE), SCALARS | st.sampled_from(["entropy", "verify", 0.5, [0.1, None]]), max_size=4
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
BODIES = st.fixed_dictionaries(
    {"prompt": st.just("abc") | VALUES, "messages": MESSAGES | VALUES},
    optional=dict.fromkeys(NAMES, VALUES) | {"ease": EASES | VALUES},
)


@pytest.mark.parametrize("field", fields(Options), ids=lambda field: field.name)
def test_every_option_can_be_said(field: Any) -> None:
    """A field of Options needs no second list: a request has it in its body or in `ease`."""
    value = {
        "threshold": 0.5,
        "min_exit": 2,
        "patience": 1,
        "decay": 1.0,
        "exit_layer": 2,
        "depth_budget": 3.0,
    }
    default = {} if field.name == "logit_bias" else field.default
    said = {field.name: value.get(field.name, default)}
    body = {"prompt": "abc", "ease": said} if field.metadata.get("leaving") else {"prompt": "abc", **said}
    if field.name == "sampler":
        with pytest.raises(RequestError, match="unknown or unsupported field 'sampler'"):
            read_completion({"prompt": "abc", "sampler": "mine:Sampler"}, LLM, Options())
        return
    found = getattr(read_completion(body, LLM, Options()).options, field.name)
    assert found == getattr(Options(**said), field.name)


def what_is_wrong(body: Any, chat: bool) -> str:
    """Read a body and queue what it asks; what is said against it, '' when nothing is."""
    try:
        asked = (read_chat if chat else read_completion)(body, LLM, Options())
        for prompt in asked.prompts:
            LLM.cancel(LLM.submit(prompt, asked.options))
    except RequestError as error:
        return str(error)
    return ""


@settings(max_examples=150, deadline=None)
@given(body=BODIES | VALUES, chat=st.booleans())
def test_any_body_is_understood_or_refused_in_a_line(body: Any, chat: bool) -> None:
    if isinstance(body, dict):
        body.pop("prompt" if chat else "messages", None)
    refusal = what_is_wrong(body, chat)
    assert "\n" not in refusal
    assert len(refusal) < 500
    assert not LLM.busy


def test_what_is_left_out_is_as_the_server_has_it() -> None:
    base = Options(max_tokens=7, threshold=(0.4,), temperature=0.5, depth_budget=3.0)
    asked = read_completion(
        {"prompt": "abc", "user": "me", "temperature": None, "ease": {"threshold": None, "min_exit": 4}},
        LLM,
        base,
    )
    assert (asked.options.max_tokens, asked.options.temperature, asked.options.depth_budget) == (7, 0.5, 3.0)
    assert (asked.options.threshold, asked.options.min_exit) == (OFF, 4)
    assert asked.show_ease
    assert not asked.stream
    assert not read_completion({"prompt": "abc"}, LLM, base).show_ease


@pytest.mark.parametrize("reader", [read_completion, read_chat])
def test_seeds_are_drawn_and_kept(reader: Any) -> None:
    body = (
        {"prompt": "abc"} if reader is read_completion else {"messages": [{"role": "user", "content": "a"}]}
    )
    assert reader({**body, "seed": 5}, LLM, Options()).options.seed == 5
    assert len({reader(body, LLM, Options()).options.seed for _ in range(5)}) == 5
