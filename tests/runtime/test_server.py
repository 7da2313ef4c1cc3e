"""The server over the stand-in stack, as its clients see it."""

import asyncio
import gc
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ease_common import sandbox
from ease_common.chat import ChatTemplate
from ease_common.errors import MissingExtraError
from ease_runtime.generation import Timing
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from ease_runtime.server.app import Settings, create_app
from ease_runtime.server.shadow import Shadow
from served import Served, served, text_engine, wait_until

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason="no server: pip install 'ease-lm[serve]'")
httpx = pytest.importorskip("httpx")

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def toy() -> Iterator[Served]:
    with served(text_engine(), max_prompt_tokens=40) as running:
        yield running


def post(server: Served, path: str, body: Any, **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, timeout=30, **more)


def said(prompt: str | list[int], **options: Any) -> str:
    """What an engine says to a prompt by itself."""
    return "".join(event.text for event in text_engine(1).generate(prompt, Options(**options)))


def stream(server: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream."""
    response = post(server, path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def is_idle(server: Served) -> bool:
    """Whether nothing is left of any request."""
    worker = server.service.worker
    engine = server.service.llm.engine
    return (
        worker.num_taken == 0
        and not worker.tickets
        and not worker.engine.jobs
        and not engine.busy
        and not server.service.llm.choices
    )


# What the openai client makes of it.


@pytest.fixture
def client(toy: Served) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{toy.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_completions(client: Any) -> None:
    answer = client.completions.create(model="toy", prompt="abc", max_tokens=9, logprobs=2)
    assert answer.choices[0].text == said("abc", max_tokens=9)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        4,
        9,
        13,
    )
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == list(range(9))
    chosen = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    assert all(
        tokens[token] == logprob
        for tokens, (token, logprob) in zip(logprobs.top_logprobs, chosen, strict=True)
    )
    assert all(len(tokens) == 2 for tokens in logprobs.top_logprobs)


def test_openai_completions_streamed(client: Any) -> None:
    options = {"max_tokens": 12, "temperature": 0.9, "seed": 7, "stop": ["zz"], "n": 2}
    texts = ["", ""]
    usage = None
    for part in client.completions.create(
        model="toy", prompt="abc", stream=True, stream_options={"include_usage": True}, **options
    ):
        for choice in part.choices:
            texts[choice.index] += choice.text
        usage = part.usage or usage
    assert texts[0] == said("abc", max_tokens=12, temperature=0.9, seed=7)
    assert texts[1] != texts[0]
    assert usage.completion_tokens == 24


def test_openai_chat(client: Any) -> None:
    messages = [
        {"role": "system", "content": "de"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "a"}]},
    ]
    whole = client.chat.completions.create(
        model="toy", messages=messages, max_completion_tokens=8, logprobs=True, top_logprobs=3
    )
    ids = text_engine().tokenizer.encode("debaabc").ids
    assert whole.choices[0].message.content == said(ids, max_tokens=8)
    content = whole.choices[0].logprobs.content
    assert "".join(bytes(token.bytes).decode() for token in content) == whole.choices[0].message.content
    assert [len(token.top_logprobs) for token in content] == [3] * 8
    parts = list(client.chat.completions.create(model="toy", messages=messages, max_tokens=8, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]


def test_openai_models_and_errors(client: Any) -> None:
    import openai

    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").ease["exit_layers"] == [2, 4, 6]
    with pytest.raises(openai.NotFoundError, match="this server has 'toy'"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature -1"):
        client.completions.create(model="toy", prompt="a", temperature=-1)


def test_openai_sends_ease_and_reads_depths(client: Any) -> None:
    ease = {"policy": "entropy", "threshold": [0.2, 0.4], "catch_up": "propagate"}
    answer = client.completions.create(model="toy", prompt="abc", max_tokens=20, extra_body={"ease": ease})
    options = Options(20, "entropy", (0.2, 0.4), "propagate")
    events = list(text_engine(1).generate("abc", options))
    assert answer.choices[0].ease["tokens"] == [
        {"id": e.id, "text": e.text, "depth": e.depth, "confidence": e.confidence, "drafted": False}
        for e in events
    ]
    assert len({event.depth for event in events}) > 1
    assert answer.usage.ease["mean_depth"] == sum(event.depth for event in events) / 20


# Requests of every kind.


def test_prompts_in_every_form(toy: Served) -> None:
    one = post(toy, COMPLETIONS, {"prompt": [0, 1, 2, 3], "max_tokens": 5}).json()
    assert [choice["text"] for choice in one["choices"]] == [said("abc", max_tokens=5)]
    both = post(toy, COMPLETIONS, {"prompt": ["abc", "f"], "max_tokens": 5, "n": 2, "ease": {}}).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in both["choices"]] == [said("abc", max_tokens=5)] * 2 + [
        said("f", max_tokens=5)
    ] * 2
    assert (
        post(toy, COMPLETIONS, {"prompt": [[0, 1], [2]], "max_tokens": 1}).json()["usage"]["prompt_tokens"]
        == 3
    )


def test_a_stream_says_what_the_whole_says(toy: Served) -> None:
    body = {
        "prompt": "abc",
        "max_tokens": 15,
        "logprobs": 2,
        "ease": {"threshold": 0.3, "catch_up": "verify"},
        "stop": "ee",
    }
    whole = post(toy, COMPLETIONS, body).json()["choices"][0]
    events = stream(toy, COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    parts = [event["choices"][0] for event in events[:-1]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [token for part in parts for token in part["ease"]["tokens"]] == whole["ease"]["tokens"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for part in parts for value in part["logprobs"][name]] == whole["logprobs"][name]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert events[-1]["choices"] == []
    usage = events[-1]["usage"]["ease"]
    assert usage["drafted"] > 0
    assert usage["accepted"] == sum(token["drafted"] for token in whole["ease"]["tokens"])
    assert len({event["id"] for event in events}) == 1


def test_drafts_from_text_are_told_and_change_nothing(toy: Served) -> None:
    body = {"prompt": "abcabcabc", "max_tokens": 30, "seed": 1}
    plain = post(toy, COMPLETIONS, body).json()["choices"][0]["text"]
    answer = post(toy, COMPLETIONS, {**body, "ease": {"draft": "ngram"}}).json()
    assert answer["choices"][0]["text"] == plain
    usage = answer["usage"]["ease"]
    assert usage["drafted"] == usage["drafters"]["ngram"]["drafted"] > 0
    assert 'ease_drafted_tokens_total{drafter="ngram"}' in httpx.get(f"{toy.url}/metrics").text
    for values, message in (
        ({"draft": "corpus"}, "draft 'corpus' needs texts to draft from"),
        ({"draft": "mine:Mine"}, "only who runs the command can name code"),
        ({"draft": "ngram", "catch_up": "propagate"}, "needs full depth to judge it"),
        ({"draft": "ngram", "threshold": 0.5}, "threshold 0.5 has no effect with draft 'ngram'"),
    ):
        refused = post(toy, COMPLETIONS, {**body, "ease": values})
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


def test_without_ease_nothing_is_told(toy: Served) -> None:
    answer = post(toy, COMPLETIONS, {"prompt": "abc", "max_tokens": 2}).json()
    assert "ease" not in answer["choices"][0]
    assert "ease" not in answer["usage"]


def test_a_request_without_a_seed_draws_one(toy: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 30, "temperature": 1.5}
    texts = {post(toy, COMPLETIONS, body).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (COMPLETIONS, b"", 400, "the body is no JSON"),
        (COMPLETIONS, b"{", 400, "the body is no JSON"),
        (COMPLETIONS, b"[" * 100_000, 400, "the body is no JSON"),
        (COMPLETIONS, b'{"prompt": "\xff"}', 400, "not UTF-8: invalid start byte at byte 12"),
        (COMPLETIONS, b'{"prompt": "a\\ud800"}', 400, "no valid Unicode"),
        (COMPLETIONS, [1], 400, "must be a JSON object"),
        (COMPLETIONS, {}, 400, "prompt must be a text"),
        (COMPLETIONS, {"prompt": ""}, 400, "at least one character"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt must be a text"),
        (COMPLETIONS, {"prompt": [["a"]]}, 400, "or a list of token ids"),
        (COMPLETIONS, {"prompt": [99]}, 400, "outside the vocabulary of 23"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "outside the vocabulary of 23"),
        (COMPLETIONS, {"prompt": [2**80]}, 400, "outside the vocabulary of 23"),
        (COMPLETIONS, {"prompt": "a" * 41}, 400, "the prompt has 42 tokens; this server takes up to 40"),
        (
            COMPLETIONS,
            {"prompt": "a", "modle": "toy"},
            400,
            "unknown or unsupported field 'modle'; did you mean 'model'?",
        ),
        (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "this server has 'toy'"),
        (COMPLETIONS, {"prompt": "a", "echo": "yes"}, 400, "echo must be true or false"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream must be true or false"),
        (COMPLETIONS, {"prompt": "a", "stream_options": 1}, 400, "stream_options must be an object"),
        (COMPLETIONS, {"prompt": "a", "n": 10**9}, 400, "n 1000000000 is outside"),
        (COMPLETIONS, {"prompt": ["a"] * 60, "n": 2}, 400, "120 completions in a request"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens 1.5 is not a whole number"),
        (COMPLETIONS, {"prompt": "a", "stop": ["x" * 2**16, "y"]}, 400, "stop strings"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"99": 1}}, 400, "token id 99, outside the vocabulary"),
        (COMPLETIONS, {"prompt": "a", "ease": 1}, 400, "ease must be an object"),
        (
            COMPLETIONS,
            {"prompt": "a", "ease": {"treshold": 1}},
            400,
            "unknown field 'ease.treshold'; did you mean 'threshold'?",
        ),
        (COMPLETIONS, {"prompt": "a", "ease": {"threshold": 7}}, 400, "threshold 7.0 is outside"),
        (
            COMPLETIONS,
            {"prompt": "a", "ease": {"policy": "gate", "threshold": 0.5}},
            400,
            "policy 'gate' needs a gate",
        ),
        (COMPLETIONS, {"prompt": "a", "ease": {"depth_budget": 90}}, 400, "depth budget 90.0"),
        (CHAT, {"messages": "hi"}, 400, "messages must be a list"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "a part that is no text",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            400,
            "top_logprobs needs logprobs",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            400,
            "tools[0] {} is not like",
        ),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    toy: Served, path: str, body: Any, status: int, message: str
) -> None:
    response = post(toy, path, body)
    assert (response.status_code, set(response.json())) == (status, {"error"})
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["type"], set(error)) == ("invalid_request_error", {"message", "type", "param", "code"})
    assert len(error["message"]) < 400
    assert is_idle(toy)


def test_large_bodies_and_long_prompts_are_refused(toy: Served) -> None:
    assert post(toy, COMPLETIONS, {"prompt": "a" * (2**20)}).status_code == 413
    start = time.perf_counter()
    response = post(toy, COMPLETIONS, {"prompt": "a" * (2**20 - 100)})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "more than the 40 tokens that this server takes hold" in error["message"]
    assert time.perf_counter() - start < 10


def test_stop_strings_of_10_kb_cost_nothing_silly(toy: Served) -> None:
    start = time.perf_counter()
    text = post(
        toy, COMPLETIONS, {"prompt": "abc", "max_tokens": 40, "stop": ["a" * 10_000, "ab" * 5000]}
    ).json()["choices"][0]["text"]
    assert text == said("abc", max_tokens=40)
    assert time.perf_counter() - start < 5


def test_other_routes(toy: Served) -> None:
    assert httpx.get(f"{toy.url}/health").json() == {"status": "ok", "model": "toy", "taken": 0}
    for path, method, status in [
        ("/v1/nothing", "GET", 404),
        (COMPLETIONS, "GET", 405),
        ("/v1/models/gpt", "GET", 404),
    ]:
        response = httpx.request(method, toy.url + path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    page = httpx.get(toy.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastapi", "prometheus_client"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(MissingExtraError, match=r"pip install 'ease-lm\[serve\]'"):
                create_app(text_engine(), Settings("toy"))


# Limits, faults, and many at once.


def test_an_api_key_is_asked_for() -> None:
    with served(text_engine(), api_key="sésame") as server:
        right = {"Authorization": "Bearer sésame".encode()}
        assert post(server, COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers=right).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer sesame"},
            {"Authorization": "sésame".encode()},
            {"Authorization": b"Bearer \xff"},
        ):
            response = post(server, COMPLETIONS, {"prompt": "a"}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(server.url).status_code == 200


def test_a_full_queue_says_when_to_come_back() -> None:
    with (
        served(text_engine(2, seconds=0.005), max_queued=1) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        busy = {"prompt": "abc", "max_tokens": 50, "n": 3, "stream": True}
        with client.stream("POST", COMPLETIONS, json=busy) as response:
            assert response.status_code == 200
            refused = post(server, COMPLETIONS, {"prompt": "abc"})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == (
                "rate_limit_error",
                "queue_full",
            )
            response.read()
        assert post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 2}).status_code == 200
        assert 'outcome="refused"} 1.0' in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("streamed", [True, False])
def test_hang_ups_free_their_place(streamed: bool) -> None:
    """Whether the answer has begun or the request still waits for a slot."""
    with served(text_engine(1, seconds=0.01)) as server:
        body = json.dumps({"prompt": "abc", "max_tokens": 59, "stream": streamed}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: toy\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for client in clients:
            client.sendall(head + body)
        wait_until(lambda: server.service.worker.num_taken == 3)
        start = time.perf_counter()
        for client in clients:
            client.close()
        wait_until(lambda: is_idle(server))
        assert time.perf_counter() - start < 1.5  # one answer alone takes longer
        assert post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 3}).json()["choices"][0][
            "text"
        ] == said("abc", max_tokens=3)
        assert 'outcome="ok"} 1.0' in httpx.get(f"{server.url}/metrics").text


def test_a_body_that_never_ends_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with served(text_engine()) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(
                f'POST {COMPLETIONS} HTTP/1.1\r\nHost: toy\r\nContent-Length: 100\r\n\r\n{{"prompt":'.encode()
            )
            time.sleep(0.1)
        assert post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 1}).status_code == 200
        assert is_idle(server)
    assert "Traceback" not in caplog.text


def break_logits(llm: TextEngine, letter: int) -> None:
    """Whoever's prompt begins with this letter gets no numbers from the third token on."""
    plain = llm.stack.run_exit

    def run_exit(number: int, rows: Any) -> Any:
        output = plain(number, rows)
        for place, row in enumerate(rows.tolist()):
            for sequence in llm.engine.sequences:
                here = (
                    sequence.counters.rows[sequence.counters.done[0] - 1] == row
                    and len(sequence.produced) == 3
                )
                if here and sequence.tokens[1] == letter:
                    output.logits[place] = math.nan
                    output.top_prob[place] = math.nan
        return output

    llm.stack.run_exit = run_exit  # type: ignore[method-assign]


def test_a_row_without_numbers_fails_alone() -> None:
    llm = text_engine(4)
    break_logits(llm, 5)
    with served(llm) as server:

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                bodies = [{"prompt": prompt, "max_tokens": 12} for prompt in ("abc", "ea", "fgh", "ijk")]
                bodies.append({"prompt": "ee", "max_tokens": 12, "stream": True})
                return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))

        first, broken, second, third, streamed = asyncio.run(ask())
        assert broken.status_code == 500
        assert "no finite numbers" in broken.json()["error"]["message"]
        for response, prompt in ((first, "abc"), (second, "fgh"), (third, "ijk")):
            assert response.json()["choices"][0]["text"] == said(prompt, max_tokens=12)
        last = json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))
        assert "no finite numbers" in last["error"]["message"]
        assert is_idle(server)


def test_a_pass_without_memory_ends_one_request() -> None:
    llm = text_engine(4)
    run_segment = llm.stack.run_segment

    def short(number: int, cache: Any, spans: Any, *rest: Any) -> None:
        if any(span.stop > 20 for span in spans):
            raise MemoryError
        run_segment(number, cache, spans, *rest)

    llm.stack.run_segment = short  # type: ignore[method-assign]
    with served(llm) as server:

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                bodies = [{"prompt": prompt, "max_tokens": 12} for prompt in ("abc", "d" * 30, "fgh", "ijk")]
                return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))

        first, short_of, second, third = asyncio.run(ask())
        assert short_of.status_code == 500
        assert "not enough memory" in short_of.json()["error"]["message"]
        for response, prompt in ((first, "abc"), (second, "fgh"), (third, "ijk")):
            assert response.json()["choices"][0]["text"] == said(prompt, max_tokens=12)
        assert is_idle(server)


def test_a_template_that_never_ends_is_a_bad_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_ROUNDS", 1000)
    llm = text_engine(1)
    llm.template = ChatTemplate(
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    )
    with served(llm) as server:
        response = post(server, CHAT, {"messages": [{"role": "user", "content": "abc"}]})
        assert response.status_code == 400
        assert "it goes round more than 1000 times" in response.json()["error"]["message"]
        assert post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 4}).status_code == 200


def test_an_engine_that_fails_serves_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = text_engine(2)
    with served(llm) as server:
        with monkeypatch.context() as patch:
            patch.setattr(llm.stack, "run_segment", lambda *arguments: 1 / 0)
            response = post(server, COMPLETIONS, {"prompt": "abc"})
            assert response.status_code == 500
            assert "the engine failed: division by zero" in response.json()["error"]["message"]
        assert "the engine failed" in caplog.text
        assert post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 4}).json()["choices"][0][
            "text"
        ] == said("abc", max_tokens=4)


def some_request(rng: random.Random) -> dict[str, Any]:
    """A request whose answer depends on everything in it."""
    body: dict[str, Any] = {"prompt": "".join(rng.choices("abcdefghijklmnopqrstuv", k=rng.randint(1, 20)))}
    body |= {
        "max_tokens": rng.randint(1, 25),
        "seed": rng.randint(0, 99),
        "temperature": rng.choice([0, 0.7, 1.3]),
    }
    if rng.random() < 0.5:
        body["stop"] = rng.choices("abcdefgh", k=2)
    if rng.random() < 0.7:
        body["ease"] = {
            "threshold": rng.choice([0.1, 0.3, 0.6]),
            "catch_up": rng.choice(["recompute", "propagate", "verify"]),
        }
    return body


def alone(body: dict[str, Any]) -> str:
    ease = body.get("ease", {})
    names = {name: value for name, value in body.items() if name not in ("prompt", "ease")}
    events = text_engine(1).generate(body["prompt"], Options.from_json({**names, **ease}))
    return "".join(event.text for event in events)


def num_objects() -> int:
    """Objects of the runtime that are alive; whoever keeps a request keeps some. (Libraries keep pools and
    caches of their own.)
    """
    gc.collect()
    return sum(str(type(thing).__module__).startswith("ease_runtime") for thing in gc.get_objects())


def test_64_clients_get_what_each_would_get_alone() -> None:
    """Streams, whole answers and hang-ups mixed: nothing lost, nothing of another's, and nothing kept."""
    num_clients = 64
    rng = random.Random(0)
    bodies = [some_request(rng) for _ in range(num_clients)]
    with served(text_engine(8), max_queued=80) as server:

        async def ask(number: int) -> str | None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                if number % 8 == 7:  # leaves after the first event
                    async with client.stream(
                        "POST", COMPLETIONS, json={**bodies[number], "stream": True}
                    ) as response:
                        async for _ in response.aiter_lines():
                            return None
                if number % 2:
                    response = await client.post(COMPLETIONS, json={**bodies[number], "stream": True})
                    events = [
                        json.loads(line[6:])
                        for line in response.text.split("\n\n")
                        if line and line != "data: [DONE]"
                    ]
                    return "".join(choice["text"] for event in events for choice in event["choices"])
                response = await client.post(COMPLETIONS, json=bodies[number])
                text: str = response.json()["choices"][0]["text"]
                return text

        async def everybody() -> list[str | None]:
            return await asyncio.gather(*(ask(number) for number in range(num_clients)))

        answers = asyncio.run(everybody())
        wait_until(lambda: is_idle(server))
        before = num_objects()
        assert asyncio.run(everybody()) == answers
        wait_until(lambda: is_idle(server))
        assert num_objects() - before < num_clients / 2  # not one a request
        metrics = httpx.get(f"{server.url}/metrics").text
    assert answers == [None if number % 8 == 7 else alone(body) for number, body in enumerate(bodies)]
    figures = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(figures["ease_mean_batch"]) > 1.5
    assert float(figures["ease_verify_exact"]) == 1.0
    assert float(figures["ease_queue_length"]) == 0
    assert (
        float(figures['ease_requests_total{endpoint="completions",outcome="ok"}']) >= 2 * num_clients * 7 / 8
    )


def test_a_server_that_ends_cuts_what_does_not_end_in_time() -> None:
    with (
        served(text_engine(1, seconds=0.02)) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        with client.stream(
            "POST", COMPLETIONS, json={"prompt": "abc", "max_tokens": 59, "stream": True}
        ) as response:
            lines = response.iter_lines()
            assert "choices" in next(lines)
            server.service.worker.drain(0.1)
            refused = post(server, COMPLETIONS, {"prompt": "abc"})
            assert (refused.status_code, httpx.get(f"{server.url}/health").status_code) == (503, 503)
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_the_command_serves_until_it_is_told_to_end(tiny_bundle: Path) -> None:
    """On SIGTERM what runs is finished, and the exit code is 0."""
    command = [
        sys.executable,
        "-m",
        "ease_runtime.cli.main",
        "serve",
        str(tiny_bundle),
        "--port",
        "0",
        "--threads",
        "1",
        "--max-tokens",
        "250",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://[0-9.:]+", line)))
        with httpx.Client(base_url=address, timeout=30) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [tiny_bundle.name]
            with client.stream(
                "POST",
                COMPLETIONS,
                json={"prompt": "And the king", "stream": True, "logit_bias": {"0": -100}},
            ) as response:
                lines = response.iter_lines()
                assert "choices" in next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 200
        process.stderr.read()
    assert process.returncode == 0


def test_a_port_that_is_taken_is_said(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [
            sys.executable,
            "-m",
            "ease_runtime.cli.main",
            "serve",
            str(tiny_bundle),
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "is the port taken? choose another: --port" in done.stderr.splitlines()[-1]


# A share of the answers runs again at full depth.


def early(threshold: float) -> dict[str, Any]:
    return {"threshold": threshold, "catch_up": "recompute"}


def disagreements(prompt: str, threshold: float, count: int) -> list[bool]:
    """Token by token, whether full depth would have said something else after what the early exits
    have said.
    """
    llm = text_engine(1)
    said = [event.id for event in llm.generate(prompt, Options(max_tokens=count, threshold=(threshold,)))]
    ids = llm.encode(prompt)
    found = []
    for token in said:
        (full,) = llm.generate(list(ids), Options(max_tokens=1))
        found.append(full.id != token)
        ids.append(token)
    return found


def test_shadowed_answers_are_compared_with_full_depth() -> None:
    prompts = ["abc", "hello", "back", "dab"]
    with served(text_engine(), shadow=1.0) as server:
        for number, prompt in enumerate(prompts, 1):
            post(server, COMPLETIONS, {"prompt": prompt, "max_tokens": 20, "ease": early(0.1)})
            wait_until(lambda number=number: len(server.service.shadow.risks) == number)
        post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 5})  # at full depth
        post(
            server,
            COMPLETIONS,
            {"prompt": "abc", "max_tokens": 5, "ease": {"threshold": 0.1, "catch_up": "verify"}},
        )
        post(
            server,
            COMPLETIONS,
            {"prompt": "abc", "max_tokens": 5, "temperature": 1, "seed": 1, "ease": early(0.1)},
        )
        wait_until(lambda: is_idle(server))
        found = httpx.get(server.url + "/health").json()["shadow"]
        metrics = httpx.get(server.url + "/metrics").text
    each = [disagreements(prompt, 0.1, 20) for prompt in prompts]
    risk = sum(sum(one) / len(one) for one in each) / len(each)
    assert 0.0 < risk < 1.0, "exits and full depth must differ somewhere, or the test shows nothing"
    assert found == {
        "share": 1.0,
        "answers": 4,
        "tokens": 80,
        "kind": "disagreement",
        "risk": pytest.approx(risk),
        "promised": None,
        "drift": None,
    }
    assert "ease_shadowed_answers_total 4.0" in metrics
    assert float(re.search(r"^ease_shadow_risk (\S+)$", metrics, re.M)[1]) == pytest.approx(risk)  # type: ignore[index]


@pytest.mark.parametrize(("delta", "drift"), [(0.001, True), (0.9, False)])
def test_drift_from_the_certificate(delta: float, drift: bool) -> None:
    """Only answers as the certificate has them count; drift is a risk above its promise beyond chance."""
    certificate = {
        "policy": "max-prob",
        "thresholds": [0.1, 0.1],
        "catch_up": "recompute",
        "risk": "disagreement",
        "delta": delta,
    }
    with served(text_engine(), shadow=1.0, certificate=certificate) as server:
        post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 5, "ease": early(0.2)})
        for number in range(1, 21):
            post(
                server,
                COMPLETIONS,
                {"prompt": "hello"[: 1 + number % 5], "max_tokens": 8, "ease": early(0.1)},
            )
            wait_until(lambda number=number: len(server.service.shadow.risks) == number)
        found = httpx.get(server.url + "/health").json()["shadow"]
        metrics = httpx.get(server.url + "/metrics").text
    assert (found["answers"], found["promised"], found["drift"]) == (20, delta, drift)
    assert f"ease_shadow_drift {float(drift)}" in metrics


def test_a_share_of_the_answers_is_compared() -> None:
    with served(text_engine(), shadow=0.25) as server:
        for _ in range(8):
            post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 4, "ease": early(0.1)})
            wait_until(lambda: is_idle(server))
        assert httpx.get(server.url + "/health").json()["shadow"]["answers"] == 2
    with served(text_engine()) as server:
        assert "shadow" not in httpx.get(server.url + "/health").json()


def test_a_comparison_that_is_cut_does_not_count() -> None:
    """A server that ends in the middle of one ends all the same."""
    with served(text_engine(seconds=0.02), shadow=1.0) as server:
        post(server, COMPLETIONS, {"prompt": "abc", "max_tokens": 30, "ease": early(0.0)})
        wait_until(lambda: server.service.shadow.again is not None)
        shadow = server.service.shadow
    assert shadow.risks == []


def test_the_loss_of_an_answer() -> None:
    """Nats that each token lost against full depth, none below 0 or above 1; sampled answers count, too."""
    certificate = {
        "policy": "max-prob",
        "thresholds": [0.1, 0.1],
        "catch_up": "recompute",
        "risk": "loss",
        "delta": 0.5,
    }
    llm = text_engine(1)
    shadow = Shadow(llm.engine, 1.0, certificate)
    generation = llm.submit("hello", Options(max_tokens=12, threshold=(0.1,), temperature=1.0, seed=3))
    early = list(llm.follow(generation, Timing()))
    shadow.consider(generation.choices[0].sequence)
    while not shadow.look():
        llm.step()
    ids = llm.encode("hello")
    losses = []
    for event in early:
        (full,) = llm.generate(
            list(ids), Options(max_tokens=1, logit_bias={event.id: 1000.0})
        )  # says the same token at full depth
        assert full.id == event.id
        losses.append(min(max(full.logprob - event.logprob, 0.0), 1.0))
        ids.append(event.id)
    assert shadow.risk == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert 0.0 < sum(losses) < 12
    assert shadow.drift is False
