"""Requests as other servers' clients send them: what they are answered, or refused with."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

import toy_text
from ease_common.errors import RequestError
from ease_runtime.engine.mock import MockStack
from ease_runtime.engine.sampling import Given
from ease_runtime.llm import TextEngine
from ease_runtime.options import TO_THE_END, Options
from ease_runtime.server.no_effect import IGNORED, NO_EFFECT
from ease_runtime.server.requests import read_chat, read_completion
from ease_runtime.text.token_bytes import TokenBytes, token_name
from served import LETTERS, Served, served, text_engine

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason="no server: pip install 'ease-lm[serve]'")
httpx = pytest.importorskip("httpx")

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ASKED = {"prompt": "abc", "max_tokens": 3}
SAID = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3}
LLM = text_engine()


@pytest.fixture(scope="module")
def toy() -> Iterator[Served]:
    with served(text_engine(), max_prompt_tokens=40) as running:
        yield running


def post(server: Served, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, content=json.dumps(body).encode(), timeout=30)


def first_choice(server: Served, **body: Any) -> dict[str, Any]:
    response = post(server, COMPLETIONS, body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def tokens_of(prompt: str, **options: Any) -> list[int]:
    return [event.id for event in text_engine(1).generate(prompt, Options(**options))]


# Fields without effect.


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NO_EFFECT.items() for value in values]
)
def test_a_value_without_effect_is_accepted_on_both_routes(name: str, value: Any) -> None:
    for read, body in ((read_completion, ASKED), (read_chat, SAID)):
        with_it = read({**body, "seed": 1, name: value}, LLM, Options())
        assert with_it == read({**body, "seed": 1}, LLM, Options())


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_changes_no_answer_is_ignored(name: str) -> None:
    assert read_chat({**SAID, name: {"a": "thing"}}, LLM, Options()).prompts == [[1, 2, 3, 2, 3]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"response_format": {"type": "json"}}, "response_format {'type': 'json'} is none of"),
        ({"tools": [{"type": "function"}]}, r"tools is supported as \[\] only|tools\[0\] .* is not like"),
        ({"tool_choice": "required"}, 'tool_choice is supported as "none" or "auto" only|needs tools'),
        ({"best_of": 3}, "best_of must be n"),
        ({"suffix": "x"}, 'suffix is supported as "" only'),
        ({"n_predict": 4}, "unknown or unsupported field 'n_predict'"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls (is supported as true only|1 must be)"),
    ],
)
def test_what_would_change_the_answer_is_refused(more: dict[str, Any], message: str) -> None:
    for read, body in ((read_completion, ASKED), (read_chat, SAID)):
        with pytest.raises(RequestError, match=message):
            read({**body, **more}, LLM, Options())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"max_tokens": -1}, {"max_tokens": TO_THE_END}),
        ({"max_tokens": None}, {"max_tokens": 128}),
        ({"top_k": -1, "temperature": 1}, {"top_k": 0}),
        ({"top_k": 7.0, "n": 2.0, "best_of": 2}, {"top_k": 7, "n": 2}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"stop_token_ids": [3, 4.0], "ignore_eos": True, "min_tokens": 2}, {"stop_token_ids": (3, 4)}),
    ],
)
def test_numbers_as_others_write_them(more: dict[str, Any], expected: dict[str, Any]) -> None:
    options = read_completion({**ASKED, **more}, LLM, Options()).options
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_tokens": -2}, "max_tokens -2 is below 0"),
        ({"max_tokens": 2.5}, "max_tokens 2.5 is not a whole number"),
        ({"max_tokens": 1e400}, "max_tokens inf is not a whole number"),
        ({"top_k": -2}, "top_k -2 is below 0"),
        ({"seed": -(2**63) - 1}, "is outside"),
        ({"min_tokens": 4}, r"min_tokens 4 is outside 0..max_tokens \(3\)"),
        ({"stop_token_ids": 3}, "stop_token_ids 3 is not a list of token ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids 'a' is not a whole number"),
        ({"stop_token_ids": [1] * 257}, "257 stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos 1 is not true or false"),
    ],
)
def test_numbers_that_mean_nothing(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_completion({**ASKED, **more}, LLM, Options())


# Where an answer ends.


def ending_engine(end: int) -> TextEngine:
    """As `text_engine`, but this token ends an answer."""
    return TextEngine(
        MockStack(vocab_size=23, max_positions=64),
        toy_text.letter_tokenizer(LETTERS),
        start_id=0,
        stop_ids=frozenset([end]),
    )


@pytest.mark.parametrize("leaving", [{}, {"threshold": 0.3, "catch_up": "verify"}, {"threshold": 0.3}])
def test_end_tokens_can_be_ignored_added_and_put_off(leaving: dict[str, Any]) -> None:
    said = tokens_of("abc", max_tokens=20, **leaving)
    end = said[4]
    first = said.index(end)
    llm = ending_engine(end)

    def ids(**options: Any) -> list[int]:
        return [e.id for e in llm.generate("abc", Options(max_tokens=20, **leaving, **options))]

    assert ids() == said[: first + 1]
    assert ids(ignore_eos=True) == said
    other = next(token for token in said if token != end)
    assert ids(ignore_eos=True, stop_token_ids=(other,)) == said[: said.index(other) + 1]
    late = ids(min_tokens=first + 3)
    assert late[:first] == said[:first]
    assert end not in late[: first + 3]
    assert len(late) >= first + 3
    assert len(ids(min_tokens=20)) == 20


def test_no_stop_string_is_looked_for_before_min_tokens() -> None:
    text = "".join(e.text for e in text_engine(1).generate("abc", Options(max_tokens=20)))
    stop = text[2]
    for first in (0, 3, 7):
        events = text_engine(1).generate("abc", Options(max_tokens=20, stop=(stop,), min_tokens=first))
        end = text.find(stop, first)
        assert "".join(e.text for e in events) == (text if end < 0 else text[:end])


def test_a_vocabulary_of_end_tokens_is_said_all_the_same() -> None:
    """Where nothing else is left the best end token is said."""
    for more in ({}, {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1, "top_k": 3}):
        options = Options(max_tokens=4, min_tokens=4, stop_token_ids=tuple(range(23)), **more)  # type: ignore[arg-type]
        (event,) = text_engine(1).generate("abc", options)
        assert event.finish_reason == "stop"


def test_a_stop_token_outside_the_vocabulary_is_refused(toy: Served) -> None:
    response = post(toy, COMPLETIONS, {**ASKED, "stop_token_ids": [23]})
    assert "stop_token_ids has the token id 23, outside" in response.json()["error"]["message"]


def test_a_chat_goes_on_to_the_end_unless_told_otherwise() -> None:
    """Of the text, which this model never ends, so of the context of 64."""
    body = {"messages": SAID["messages"]}
    with served(text_engine(), options=Options(max_tokens=5)) as server:
        usage = post(server, CHAT, body).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 59)
        assert post(server, CHAT, {**body, "max_tokens": -1}).json()["usage"]["completion_tokens"] == 59
        assert post(server, CHAT, SAID).json()["usage"]["completion_tokens"] == 3
        assert post(server, COMPLETIONS, {"prompt": "abc"}).json()["usage"]["completion_tokens"] == 5
    with served(text_engine(), max_chat_tokens=7) as server:
        assert post(server, CHAT, body).json()["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            COMPLETIONS,
            {"prompt": "a" * 64, "max_tokens": 1},
            "context length is 64 tokens: the prompt has 65",
        ),
        (COMPLETIONS, {"prompt": "a" * 63}, "leaves no room for an answer"),
        (COMPLETIONS, {"prompt": ["a", "a" * 70], "stream": True}, "the prompt has 71"),
        (COMPLETIONS, {"prompt": "abc", "max_tokens": 61}, "max_tokens 61 is more than the 60 that are left"),
        (CHAT, {**SAID, "max_tokens": 10**9}, "is more than the 59"),
        (CHAT, {"messages": SAID["messages"], "max_completion_tokens": 60}, "is more than the 59"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 70}]}, "the prompt has 72"),
    ],
)
def test_every_overflow_has_the_code_that_clients_go_by(path: str, body: Any, message: str) -> None:
    with served(text_engine()) as server:
        response = post(server, path, body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert message in error["message"]
        assert error["code"] == "context_length_exceeded"


def test_what_is_past_the_context_may_be_cut_off() -> None:
    with served(text_engine(), clamp_max_tokens=True) as server:
        answer = post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 10**6}).json()
        assert answer["usage"]["completion_tokens"] == 60
        assert post(server, COMPLETIONS, {"prompt": "a" * 64}).status_code == 400


# Prompts that come back.


def given_scores(ids: list[int], count: int, **leaving: Any) -> list[Any]:
    """What full depth, or a policy, says of the tokens of a text after its first, one after the other."""
    options = Options(max_tokens=len(ids) - 1, logprobs=count, **leaving)
    return list(text_engine(1).generate(ids[:1], options, sampler=Given(ids)))


def test_an_echo_has_the_prompts_scores(toy: Served) -> None:
    """At full depth, or under the answer's policy; of a text that the server puts a start token before."""
    early = {"threshold": 0.2}
    for leaving in ({}, early, {**early, "catch_up": "propagate"}, {**early, "catch_up": "verify"}):
        plain = first_choice(toy, prompt="abcab", max_tokens=4, logprobs=2, ease=leaving)
        echoed = first_choice(toy, prompt="abcab", max_tokens=4, logprobs=2, ease=leaving, echo=True)
        assert echoed["text"] == "abcab" + plain["text"]
        logprobs = echoed["logprobs"]
        assert logprobs["tokens"] == ["<|end|>", *"abcab", *plain["logprobs"]["tokens"]]
        scores = given_scores([0, 1, 2, 3, 1, 2], 2, **({} if "verify" in leaving.values() else leaving))
        assert logprobs["token_logprobs"] == [
            None,
            *(score.logprob for score in scores),
            *plain["logprobs"]["token_logprobs"],
        ]
        after = (5 + offset for offset in plain["logprobs"]["text_offset"])
        assert logprobs["text_offset"] == [0, *range(5), *after]
        assert logprobs["top_logprobs"][0] is None
        for name, best, value in list(
            zip(logprobs["tokens"], logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
        )[1:]:
            assert best[name] == value
            assert len(best) in (2, 3)


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_prompts_scored_under_a_policy_beside_others(num_slots: int, max_tokens: int) -> None:
    """Whether the answer or the prompt's scores are there first."""
    leaving = {"threshold": 0.2, "catch_up": "propagate"}
    prompts = [[1, 2, 3, 4, 5, 6, 7], [4, 5], [9]]
    body = {"prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "n": 2, "ease": leaving}
    with served(text_engine(num_slots)) as server:
        plain = post(server, COMPLETIONS, body).json()["choices"]
        echoed = post(server, COMPLETIONS, {**body, "echo": True}).json()["choices"]
        assert httpx.get(f"{server.url}/health").json()["taken"] == 0
    for place, (alone, one) in enumerate(zip(plain, echoed, strict=True)):
        scores = given_scores(prompts[place // 2], 1, **leaving) if len(prompts[place // 2]) > 1 else []
        after = alone["logprobs"]["token_logprobs"]
        assert one["logprobs"]["token_logprobs"] == [None, *(score.logprob for score in scores), *after]
        assert one["finish_reason"] == alone["finish_reason"]
    full = given_scores(prompts[0], 1)
    assert [s.logprob for s in full] != [s.logprob for s in given_scores(prompts[0], 1, **leaving)]


def test_a_prompt_that_cannot_be_scored_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = text_engine(2)
    run_exit = llm.stack.run_exit
    calls = [0]

    def short(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        return run_exit(*arguments)

    monkeypatch.setattr(llm.stack, "run_exit", short)
    generation = llm.submit([1, 2, 3, 4, 5], Options(max_tokens=0, threshold=0.2), score_prompt=True)
    while llm.busy:
        llm.step()
    (choice,) = generation.choices
    assert choice.finish_reason == "error"
    assert "not enough memory" in str(choice.error)
    assert not llm.choices


def test_max_tokens_0_scores_a_prompt_and_says_nothing(toy: Served) -> None:
    body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 0, "echo": True, "logprobs": 0, "n": 2}
    response = post(toy, COMPLETIONS, body).json()
    assert [choice["text"] for choice in response["choices"]] == ["abc", "abc", "de", "de"]
    assert {choice["finish_reason"] for choice in response["choices"]} == {"length"}
    usage = {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    assert response["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    logprobs = response["choices"][3]["logprobs"]
    (score,) = given_scores([4, 5], 0)
    assert logprobs["token_logprobs"] == [None, score.logprob]
    assert logprobs["top_logprobs"] == [None, {"e": score.logprob}]
    silent = first_choice(toy, prompt="abc", max_tokens=0)
    assert (silent["text"], silent["finish_reason"]) == ("", "length")
    assert first_choice(toy, prompt="a" * 39, max_tokens=0, echo=True)["text"] == "a" * 39


def test_a_prompt_that_fills_the_context_can_be_scored() -> None:
    with served(text_engine()) as server:
        body = {"prompt": [[1] * 64], "max_tokens": 0, "echo": True, "logprobs": 1}
        assert len(post(server, COMPLETIONS, body).json()["choices"][0]["logprobs"]["tokens"]) == 64


def test_a_long_prompt_is_scored_in_chunks() -> None:
    llm = text_engine(1)
    llm.engine.chunk = 7
    ids = [0, *(1 + i % 20 for i in range(40))]
    generation = llm.submit(ids, Options(max_tokens=1, logprobs=1), score_prompt=True)
    while llm.busy:
        llm.step()
    found = generation.choices[0].sequence.prompt_scores
    assert [(t.id, t.logprob, t.top_logprobs) for t in found] == [
        (e.id, e.logprob, e.top_logprobs) for e in given_scores(ids, 1)
    ]


def test_a_streamed_echo_says_what_the_whole_says(toy: Served) -> None:
    body = {"prompt": ["abc", "fg"], "max_tokens": 6, "echo": True, "logprobs": 1, "n": 2, "seed": 5}
    whole = post(toy, COMPLETIONS, body).json()["choices"]
    lines = post(toy, COMPLETIONS, {**body, "stream": True}).text.split("\n\n")
    parts = [
        choice
        for line in lines
        if line.startswith("data: {")
        for choice in json.loads(line.removeprefix("data: "))["choices"]
    ]
    for choice in whole:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in mine for value in part["logprobs"][name]] == values


# Tokens that are no text.


def byte_engine(prompt: str, answer: str) -> tuple[TextEngine, list[int]]:
    """A tokenizer of bytes."""
    tokenizer = toy_text.byte_tokenizer()
    llm = TextEngine(MockStack(vocab_size=tokenizer.get_vocab_size(), max_positions=64), tokenizer)
    return llm, [*llm.encode(prompt), *llm.encode(answer)]


def test_parts_of_a_character_are_given_as_their_bytes() -> None:
    """A client can put the text together again, and no two tokens are one."""
    llm, ids = byte_engine("a", "👍é")
    with served(llm) as server:
        bias = {str(token): 100 for token in llm.encode("👍é")}
        body = {
            "messages": [{"role": "user", "content": "a"}],
            "logprobs": True,
            "top_logprobs": 3,
            "logit_bias": bias,
            "max_tokens": 20,
        }
        llm.template = text_engine().template
        content = post(server, CHAT, body).json()["choices"][0]["logprobs"]["content"]
        assert {bytes(token["bytes"]) for token in content} <= {bytes([byte]) for byte in "👍é".encode()}
        assert all(token["token"] == token_name(bytes(token["bytes"])) for token in content)
        echoed = first_choice(server, prompt=[ids], max_tokens=0, echo=True, logprobs=20)
        logprobs = echoed["logprobs"]
        assert echoed["text"] == "a👍é"
        assert logprobs["tokens"] == ["a", *(f"bytes:\\x{byte:02x}" for byte in "👍é".encode())]
        for best in logprobs["top_logprobs"][1:]:
            assert len(best) in (20, 21)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (toy_text.byte_tokenizer(), " the euro € 👍\n"),
        (toy_text.piece_tokenizer(), "the a 👍ing"),
        (toy_text.letter_tokenizer(LETTERS), "abc"),
    ],
)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Any, text: str) -> None:
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(token_bytes, ids)).decode().strip() == text.strip()
    assert token_bytes(tokenizer.get_vocab_size()) == b""


def test_tokens_with_equal_texts_are_told_apart(toy: Served) -> None:
    from ease_runtime.engine.sequence import Token
    from ease_runtime.server.answers import Answer

    asked = read_completion({**ASKED, "logprobs": 3}, LLM, Options())
    answer = Answer(asked, "toy", chat=False, token_bytes=lambda token: b"a" if token < 3 else b"b")
    score = Token(5, 6, 0.5, -3.0, ((1, -1.0), (2, -2.0), (7, -2.5)))
    assert answer.by_name(score) == {"a": -1.0, "token_id:2": -2.0, "b": -2.5, "token_id:5": -3.0}
    assert math.isclose(sum(answer.by_name(score).values()), -8.5)


# What one request may cost the others.


def test_a_text_that_cannot_fit_is_never_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TextEngine, "encode", lambda *_: pytest.fail("it was encoded"))
    longest = len(toy_text.END)
    for limit, allowed in ((None, 64), (10, 10), (1000, 64)):
        with pytest.raises(RequestError, match=f"more than the {allowed} tokens"):
            read_completion({"prompt": ["a", "a" * (allowed * longest + 1)]}, LLM, Options(), limit)
    monkeypatch.undo()
    assert len(read_completion({"prompt": "a" * 64 * longest}, LLM, Options()).prompts[0]) == 64 * longest + 1


def test_stop_strings_are_prepared_once_a_request(monkeypatch: pytest.MonkeyPatch, toy: Served) -> None:
    """Not once a prompt, nor in the engine's thread."""
    import threading

    plain = TextEngine.stop_patterns
    threads = []

    def noted(llm: TextEngine, options: Options) -> Any:
        threads.append(threading.current_thread().name)
        return plain(llm, options)

    monkeypatch.setattr(TextEngine, "stop_patterns", noted)
    stop = first_choice(toy, prompt="abc", max_tokens=20)["text"][3]
    threads.clear()
    answer = post(toy, COMPLETIONS, {"prompt": ["abc"] * 20, "max_tokens": 20, "stop": [stop]}).json()
    assert all(stop not in choice["text"] for choice in answer["choices"])
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 20
    assert len(threads) == 1
    assert threads[0] != "ease-engine"


def test_long_texts_are_encoded_like_short_ones() -> None:
    from ease_runtime.text.special import LONG_TEXT, encode_ids

    tokenizer = toy_text.byte_tokenizer()
    text = "the a € " * LONG_TEXT
    assert encode_ids(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False).ids
