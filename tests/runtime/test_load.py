"""Many clients with requests of every kind at a bundle: nothing is lost, every answer is as alone, and the
memory stays what it is.
"""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ease_runtime.llm import LLM
from served import served

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason="pip install 'ease-lm[serve,grammar]'")
httpx = pytest.importorskip("httpx")

STATM = Path("/proc/self/statm")
MOST_TOKENS = 8  # of an answer
MOST_GROWTH = 1.05
BEGINNINGS = ("And the king said unto the people, Go up to the city, and ", "In the beginning ", "")
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"regex": "[a-z]{3,9}"},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["king", "sea", 7]}}}},
)
EASES: tuple[dict[str, Any], ...] = (
    {},
    {"ease": {"threshold": 0.1}},
    {"ease": {"threshold": 0.1, "catch_up": "propagate"}},
    {"ease": {"threshold": 0.1, "catch_up": "verify"}},
)


def any_request(draw: random.Random) -> dict[str, Any]:
    """Of the tokens of a few beginnings, some sampled, some streamed."""
    prompts = [draw.choice(BEGINNINGS) + draw.choice(("the sea", "a man", "x"))]
    sampling = draw.choice(({}, {"temperature": 0.8}, {"temperature": 1.0, "n": 2}))
    asked = {
        "prompt": prompts,
        "max_tokens": draw.randint(1, MOST_TOKENS),
        "seed": draw.randrange(1000),
        **sampling,
    }
    more = {"logprobs": 1, "echo": True} if draw.random() < 0.1 else {}
    return {**asked, **draw.choice(FORMS), **draw.choice(EASES), **more, "stream": draw.random() < 0.3}


def said(client: httpx.Client, body: dict[str, Any]) -> Any:
    """The texts of an answer's choices, and how each has ended."""
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        return [(choice["text"], choice["finish_reason"]) for choice in response.json()["choices"]]
    texts: dict[int, list[Any]] = {}
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    for choice in (choice for event in events for choice in json.loads(event)["choices"]):
        known = texts.setdefault(choice["index"], ["", None])
        known[0] += choice["text"]
        known[1] = choice["finish_reason"] or known[1]
    return [tuple(texts[index]) for index in sorted(texts)]


def resident_bytes() -> int:
    """Of this process; 1 where the system does not say."""
    if not STATM.exists():
        return 1
    return int(STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def client_of() -> Iterator[Any]:
    clients: list[httpx.Client] = []

    def make(url: str, many: int) -> httpx.Client:
        limits = httpx.Limits(max_connections=many)
        clients.append(httpx.Client(base_url=url, timeout=300, limits=limits))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("num_requests", "num_clients", "num_kinds"),
    [(300, 16, 60), pytest.param(5000, 64, 150, marks=pytest.mark.slow)],
)
def test_nothing_is_lost_and_every_answer_is_as_alone(
    tiny_bundle: Path, client_of: Any, num_requests: int, num_clients: int, num_kinds: int
) -> None:
    draw = random.Random(1)
    kinds = [any_request(draw) for _ in range(num_kinds)]
    with served(LLM(tiny_bundle, num_slots=1)) as server:
        one = client_of(server.url, 1)
        alone = [said(one, kind) for kind in kinds]
    order = [draw.randrange(num_kinds) for _ in range(num_requests)]
    warm = num_requests // 3  # memory has grown to what it is by then
    llm = LLM(tiny_bundle, num_slots=16, prefix_bytes=2**20)
    with served(llm, max_queued=2 * num_clients) as server, ThreadPoolExecutor(num_clients) as pool:
        client = client_of(server.url, num_clients)
        answers = list(pool.map(lambda kind: said(client, kinds[kind]), order[:warm]))
        before = resident_bytes()
        answers += list(pool.map(lambda kind: said(client, kinds[kind]), order[warm:]))
        after = resident_bytes()
        assert [i for i, kind in enumerate(order) if answers[i] != alone[kind]] == []
        assert len(answers) == num_requests
        assert client.get("/health").json()["taken"] == 0
    assert after < MOST_GROWTH * before
