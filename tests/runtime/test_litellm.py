"""litellm against the server: what it asks for is answered, and a prompt that is too long is what it falls
back by.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from chat_forms import HERMES
from ease_common.chat import ChatTemplate
from served import served, text_engine

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason="no server: pip install 'ease-lm[serve]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
USER = {"role": "user", "content": "abc"}


@pytest.fixture(scope="module")
def litellm() -> Any:
    return pytest.importorskip("litellm", reason="no litellm: pip install litellm")


@pytest.fixture(scope="module")
def asked() -> Iterator[dict[str, Any]]:
    with served(text_engine(max_positions=2048)) as server:
        yield {"model": "openai/toy", "api_base": f"{server.url}/v1", "api_key": "any"}


def test_chats_streams_and_completions(litellm: Any, asked: dict[str, Any]) -> None:
    body = {**asked, "messages": [USER], "max_tokens": 5, "response_format": {"type": "text"}}
    whole = litellm.completion(**body)
    assert whole.usage.completion_tokens == 5
    parts = list(litellm.completion(**body, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    plain = {**asked, "model": "text-completion-openai/toy"}
    assert len(litellm.text_completion(**plain, prompt="abc", max_tokens=4).choices[0].text) == 4


def test_an_overflow_is_the_error_that_fallbacks_go_by(litellm: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked, messages=[{**USER, "content": "a" * 3000}], num_retries=0)


def test_a_tool_is_called(litellm: Any) -> None:
    pytest.importorskip("llguidance")
    import toy_text
    from ease_runtime.engine.mock import MockStack
    from ease_runtime.llm import TextEngine

    tokenizer = toy_text.byte_tokenizer()
    stack = MockStack(vocab_size=tokenizer.get_vocab_size(), max_positions=2048)
    llm = TextEngine(stack, tokenizer, stop_ids=frozenset({0}), template=ChatTemplate(HERMES))
    named = {"type": "function", "function": {"name": "time"}}
    with served(llm) as server:
        answer = litellm.completion(
            model="openai/toy",
            api_base=f"{server.url}/v1",
            api_key="any",
            messages=[USER],
            tools=[named],
            tool_choice=named,
            max_tokens=200,
        )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("time", "{}")
    assert answer.choices[0].finish_reason == "tool_calls"
