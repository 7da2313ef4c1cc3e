"""Tools: histories through templates, calls parted from text, and answers that have to call."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

import toy_text
from chat_forms import HERMES as HERMES_TEMPLATE
from chat_forms import LLAMA as LLAMA_TEMPLATE
from chat_forms import MISTRAL as MISTRAL_TEMPLATE
from chat_forms import XML
from ease_common.chat import ChatTemplate
from ease_common.errors import RequestError
from ease_runtime.cli.openai_lines import OpenAiLine
from ease_runtime.engine.mock import MockStack
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from ease_runtime.server.requests import read_chat
from ease_runtime.text.special import SpecialTokens
from ease_runtime.text.tool_calls import HERMES, LLAMA, MISTRAL, CallForm, CallReader, form_of, num_held

pytest.importorskip("llguidance")
USER = {"role": "user", "content": "Rome?"}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", city={"enum": ["Rome", "Oslo"]}, days={"$ref": "#/$defs/days"})
WEATHER["function"]["parameters"]["$defs"] = {"days": {"enum": [1, 2]}}
TIME = {"type": "function", "function": {"name": "time"}}


def engine(template: str, **special: Any) -> TextEngine:
    """A tokenizer of bytes, whose special tokens are `special` besides."""
    tokenizer = toy_text.byte_tokenizer()
    tokenizer.add_special_tokens(list(special.get("tokens", [])))
    return TextEngine(
        MockStack(vocab_size=tokenizer.get_vocab_size(), max_positions=4096),
        tokenizer,
        stop_ids=frozenset({0}),
        template=ChatTemplate(template, bos_token="", eos_token=toy_text.END),
        num_slots=2,
    )


# Templates.


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (HERMES_TEMPLATE, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        (LLAMA_TEMPLATE, '{"name": "weather", "parameters": {"city": "Rome"}}<|eot|>'),
        (MISTRAL_TEMPLATE, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]'),
    ],
)
def test_a_history_of_calls_goes_through_the_template(template: str, written: str) -> None:
    known = ChatTemplate(template, bos_token="", eos_token="")
    text = known.render(HISTORY, [WEATHER])
    assert written in text
    assert "sunny" in text
    assert json.dumps(WEATHER)[:60] in text or json.dumps(WEATHER, indent=4)[:60] in text
    assert "None" not in text
    as_object = {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert known.render([USER, {**HISTORY[1], "tool_calls": [as_object]}, HISTORY[2]], [WEATHER]) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{**USER, "content": None}], r"messages\[0\] has no text as its content"),
        ([{**USER, "tool_calls": [CALL]}], r"messages\[0\] has tool_calls; only an assistant's"),
        (
            [{"role": "assistant", "tool_calls": "x"}],
            r"messages\[0\] has tool_calls 'x', which is not a list",
        ),
        ([{"role": "assistant", "tool_calls": []}], r"messages\[0\] has no text"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
            "tool_calls has {'id': 'a'}, which is not like",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "the arguments '{' of 'f' are no JSON object",
        ),
    ],
)
def test_histories_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(HERMES_TEMPLATE).render(messages)


def test_what_a_call_mentions_is_text_however_it_is_written() -> None:
    special = SpecialTokens(toy_text.byte_tokenizer())
    arguments = '{"\\u003c|end|>": "\\u003c|end|>"}'
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    loud = {"type": "function", "function": {"name": "f", "description": toy_text.END}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    ids = special.encode_chat(ChatTemplate(HERMES_TEMPLATE), messages, [loud])
    assert 0 not in ids
    assert special.tokenizer.decode(ids).count(toy_text.END) == 3


@pytest.mark.parametrize("template", [HERMES_TEMPLATE, LLAMA_TEMPLATE])
def test_an_answer_goes_on_with_the_last_message(template: str) -> None:
    known = ChatTemplate(template, bos_token="")
    begun = [USER, {"role": "assistant", "content": "It is "}]
    text = known.render(begun, go_on=True)
    assert text.endswith("It is ")
    assert text.startswith(known.render([USER]))
    for wrong in ([USER], HISTORY[:2]):
        with pytest.raises(RequestError, match="only an assistant's message, without tool_calls"):
            known.render(wrong, go_on=True)
    with pytest.raises(RequestError, match="does not write the last message"):
        ChatTemplate("{{ messages[0].content }}").render(begun, go_on=True)


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (HERMES_TEMPLATE, set(), HERMES),
        (HERMES_TEMPLATE, {"[TOOL_CALLS]", "<|python_tag|>"}, HERMES),
        (LLAMA_TEMPLATE, set(), LLAMA),
        (MISTRAL_TEMPLATE, set(), MISTRAL),
        ("{{ tools | tojson }}", {"<|python_tag|>"}, LLAMA),
        ("{{ tools | tojson }}", {"[TOOL_CALLS]"}, MISTRAL),
        ("{{ tools | tojson }}", set(), None),
        (XML, set(), None),
        ("{{ messages }}<tool_call>", {"[TOOL_CALLS]"}, None),
        ("{% set tools = 1 %}[TOOL_CALLS]", set(), None),
    ],
)
def test_the_form_shows_in_the_template(template: str, special: set[str], expected: CallForm | None) -> None:
    assert form_of(ChatTemplate(template), special) is expected


# The text of answers.

ROME = '{"city": "Rome"}'
BOTH = [("weather", ROME), ("time", "{}")]
ANSWERS = [
    (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>', "", BOTH[:1]),
    (
        HERMES,
        f'Let me see.\n\n<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>\n<tool_call>\n'
        '{"name": "time", "arguments": {}}\n</tool_call>',
        "Let me see.",
        BOTH,
    ),
    (HERMES, '<tool_call>{"arguments": {"city": "Rome"}, "name": "weather"}</tool_call>', "", BOTH[:1]),
    (HERMES, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', "", BOTH[:1]),
    (HERMES, f'<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call> done', "done", BOTH[:1]),
    (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", BOTH[1:]),
    (HERMES, '<tool_call>{"name": "king", "arguments": {}}</tool_call>', None, []),
    (HERMES, "<tool_call>hello", None, []),
    (HERMES, "<tool_call>", None, []),
    (HERMES, "<tool_call>{broken", None, []),
    (HERMES, '{"name": "time", "arguments": {}}', None, []),
    (HERMES, "a < b  <tool, <tool_c ", None, []),
    (HERMES, "  two\n\n", None, []),
    (
        HERMES,
        '<tool_call>{"name": "time", "arguments": {"a": "}\\"{", "b": [{}, "]"]}}</tool_call>',
        "",
        [("time", '{"a": "}\\"{", "b": [{}, "]"]}')],
    ),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"a": [1,', "", [("time", '{"a": [1,')]),
    (LLAMA, f'{{"name": "weather", "parameters": {ROME}}}', "", BOTH[:1]),
    (
        LLAMA,
        f'<|python_tag|>{{"name": "weather", "parameters": {ROME}}}; {{"name": "time", "parameters": {{}}}}',
        "",
        BOTH,
    ),
    (LLAMA, '\n {"name": "time", "parameters": {}}', "", BOTH[1:]),
    (LLAMA, '{"a": 1}', None, []),
    (LLAMA, 'See {"name": "time", "parameters": {}}', None, []),
    (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}, "id": "a"}}, '
        '{"name": "time", "arguments": {}}]',
        "",
        BOTH,
    ),
    (MISTRAL, '[TOOL_CALLS][{"arguments": {}, "name": "time"}]', "", BOTH[1:]),
    (MISTRAL, "[TOOL] [1, 2]", None, []),
]


def read(reader: CallReader, parts: list[str]) -> tuple[str, list[tuple[str, str]], list[str]]:
    said, calls, ids = "", [], []
    for place, part in enumerate(parts):
        more, pieces = reader.feed(part, last=place == len(parts) - 1)
        said += more
        for piece in pieces:
            if piece.name:
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
                ids.append(piece.id)
            calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.arguments)
    return said, calls, ids


@pytest.mark.parametrize(("form", "text", "said", "calls"), ANSWERS)
def test_calls_are_parted_from_text_however_it_comes(
    form: CallForm, text: str, said: str | None, calls: list[tuple[str, str]]
) -> None:
    cuts = [[text], [text, ""], list(text), *([text[:i], text[i:]] for i in range(len(text)))]
    for parts in cuts:
        found = read(CallReader(form, frozenset({"weather", "time"})), parts)
        assert found[:2] == (text if said is None else said, calls), parts
        assert len(set(found[2])) == len(calls)
        assert all(len(name) == 9 and name.isalnum() for name in found[2])


def test_arguments_come_as_they_are_said() -> None:
    reader = CallReader(HERMES, frozenset({"time"}))
    assert reader.feed('so <tool_call>{"name": "time", ') == ("so", [])
    _, (first, second) = reader.feed('"arguments": {"a"')
    assert (first.name, first.arguments, second.arguments) == ("time", "", '{"a"')
    assert [piece.arguments for piece in reader.feed(": 1}")[1]] == [": 1}"]


def test_no_more_calls_than_asked() -> None:
    assert read(CallReader(HERMES, frozenset({"weather", "time"}), most=1), [ANSWERS[1][1]])[1] == BOTH[:1]


@pytest.mark.parametrize(("text", "expected"), [("ab", 0), ("a <to", 4), ("a \n", 2), ("<<", 1), ("", 0)])
def test_what_may_begin_a_call_is_held(text: str, expected: int) -> None:
    assert num_held(text, "<tool_call>") == expected


# Requests.

ASKED: dict[str, Any] = {"messages": [USER], "max_tokens": 400, "tools": [WEATHER, TIME], "seed": 1}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": {}}, "tools {} is not a list"),
        ({"tools": ["weather"]}, r"tools\[0\] 'weather' is not like"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] {'type': 'function'} is not like"),
        ({"tools": [tool("a b")]}, r"tools\[0\] has the name 'a b', not 1 to 64"),
        ({"tools": [TIME, TIME]}, "two functions of the name 'time'"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
            r"tools\[0\] has parameters 3, not a JSON schema",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice 'required' needs tools"),
        ({"tool_choice": "any"}, "tool_choice 'any' is none of"),
        ({"tool_choice": {"type": "function"}}, "is none of"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "king"}}},
            "tool_choice names 'king', which is none of the tools",
        ),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format leaves no room for calls",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format leaves no room for calls"),
        ({"tool_choice": "required", "regex": "a*"}, "regex leaves no room for calls"),
        ({"add_generation_prompt": False}, "needs continue_final_message: true"),
        ({"continue_final_message": True}, "only an assistant's message"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls 1 must be true or false"),
    ],
)
def test_tools_that_are_none(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_chat({**ASKED, **more}, engine(HERMES_TEMPLATE), Options())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "this bundle has no chat template that takes tools"),
        (XML, "in a form that is not known here"),
    ],
)
def test_a_template_without_tools_refuses_them(template: str, message: str) -> None:
    llm = engine(template)
    with pytest.raises(RequestError, match=message):
        read_chat(ASKED, llm, Options())
    plain = read_chat({**ASKED, "tools": []}, llm, Options())
    assert read_chat({**ASKED, "tool_choice": "none"}, llm, Options()) == plain


def test_a_template_without_calls_refuses_their_history() -> None:
    with pytest.raises(RequestError, match="takes no tool_calls in messages"):
        read_chat({"messages": HISTORY}, engine("{{ messages[0].content }}"), Options())


def test_a_prefilled_answer_is_gone_on_with() -> None:
    llm = engine(HERMES_TEMPLATE)
    begun = [USER, {"role": "assistant", "content": "It is "}]
    body = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    (ids,) = read_chat(body, llm, Options()).prompts
    text = "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\nIt is "
    assert ids == llm.special.encode_text(text)


def answer_of(llm: TextEngine, body: dict[str, Any]) -> dict[str, Any]:
    """What a batch answers: the server's own, in this thread."""
    values = {"custom_id": "a", "url": "/v1/chat/completions", "body": body}
    line = OpenAiLine.start(llm, 1, values, Options())
    while llm.busy:
        for choice, events in llm.step():
            line.take(choice.index, choice, events)
    answer: dict[str, Any] = line.answer()["response"]
    return answer


FORMS = [
    (HERMES_TEMPLATE, ()),
    (LLAMA_TEMPLATE, ()),
    (LLAMA_TEMPLATE, ("<|python_tag|>",)),
    (MISTRAL_TEMPLATE, ()),
    (MISTRAL_TEMPLATE, ("[TOOL_CALLS]",)),
    (HERMES_TEMPLATE, ("<tool_call>", "</tool_call>")),
]


@pytest.mark.parametrize(("template", "tokens"), FORMS)
@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"tool_choice": NAMED}, {"weather"}),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"weather", "time"}),
    ],
)
def test_an_answer_that_has_to_call_calls(
    template: str, tokens: tuple[str, ...], more: dict[str, Any], names: set[str]
) -> None:
    llm = engine(template, tokens=tokens)
    answer = answer_of(llm, {**ASKED, **more, "n": 3, "temperature": 1.0})
    assert answer["status_code"] == 200, answer
    for choice in answer["body"]["choices"]:
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert call["type"] == "function"
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            assert arguments["city"] in ("Rome", "Oslo")
            assert arguments["days"] in (1, 2)
        else:
            assert arguments == {}


def test_required_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from ease_common.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = engine(HERMES_TEMPLATE)
    asked = read_chat({**ASKED, "tool_choice": "required"}, llm, Options())
    with pytest.raises(MissingExtraError, match="grammar"):
        llm.submit(asked.prompts[0], asked.options)


# OpenAI's client.


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    for extra in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(extra, reason="no server: pip install 'ease-lm[serve]'")
    openai = pytest.importorskip("openai")
    from served import served

    with (
        served(engine(HERMES_TEMPLATE)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": NAMED},
        {"tool_choice": "required", "parallel_tool_calls": False, "n": 2, "temperature": 1.0},
        {
            "extra_body": {
                "regex": r'So\.\n<tool_call>\n\{"name": "time", "arguments": \{"a": "[a-z]{3}"\}\}\n'
                r'</tool_call>\n<tool_call>\n\{"name": "weather", "arguments": \{\}\}\n</tool_call>'
            }
        },
        {"extra_body": {"regex": "Rome is [a-z]{2,5}"}},
    ],
)
def test_a_stream_calls_what_the_whole_answer_calls(client: Any, more: dict[str, Any]) -> None:
    whole = client.chat.completions.create(model="toy", **ASKED, **more)
    with client.chat.completions.stream(model="toy", **ASKED, **more) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        assert (one.message.content or "") == (other.message.content or "")
        mine, theirs = (c.message.tool_calls or [] for c in (one, other))
        assert [c.function.name for c in mine] == [c.function.name for c in theirs]
        assert [c.function.arguments for c in mine] == [c.function.arguments for c in theirs]
        assert bool(mine) == (one.finish_reason == "tool_calls")
        history = [USER, json.loads(one.message.model_dump_json(exclude_none=False))]
        history += [{"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in mine]
        again = client.chat.completions.create(
            model="toy", messages=history, tools=ASKED["tools"], max_tokens=2
        )
        assert again.usage.completion_tokens <= 2


def test_a_stream_says_nothing_while_text_is_held_back(client: Any) -> None:
    """A delta has text or a call in it, but for who speaks and how it has ended."""
    asked = {"model": "toy", **ASKED, "tool_choice": NAMED, "stream": True}
    parts = [part.choices[0] for part in client.chat.completions.create(**asked) if part.choices]
    first, *between, last = parts
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert last.finish_reason == "tool_calls"
    assert between
    assert all(part.delta.content or part.delta.tool_calls for part in between)
    asked["extra_body"] = {"ease": {}}  # of which each token is told
    told = [part.choices[0] for part in client.chat.completions.create(**asked) if part.choices]
    assert len(told) > len(parts)
    assert sum(len(part.ease["tokens"]) for part in told[1:]) > len(between)
