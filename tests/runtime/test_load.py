"""64 clients and 5,000 requests of every kind at a bundle: nothing is lost, every answer is as alone, and the
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
pytestmark = pytest.mark.slow

CLIENTS = 64
REQUESTS = 5000
KINDS = 150  # different requests
WARM = 1500  # requests after which memory has grown to what it is
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
    asked = {"prompt": prompts, "max_tokens": draw.randint(1, 20), "seed": draw.randrange(1000), **sampling}
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
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
def test_nothing_is_lost_and_every_answer_is_as_alone(tiny_bundle: Path, client_of: Any) -> None:
    draw = random.Random(1)
    kinds = [any_request(draw) for _ in range(KINDS)]
    with served(LLM(tiny_bundle, num_slots=1)) as server:
        alone = [said(client_of(server.url, 1), kind) for kind in kinds]
    order = [draw.randrange(KINDS) for _ in range(REQUESTS)]
    llm = LLM(tiny_bundle, num_slots=8, prefix_bytes=2**20)
    with served(llm, max_queued=2 * CLIENTS) as server, ThreadPoolExecutor(CLIENTS) as pool:
        client = client_of(server.url, CLIENTS)
        answers = list(pool.map(lambda kind: said(client, kinds[kind]), order[:WARM]))
        before = resident_bytes()
        answers += list(pool.map(lambda kind: said(client, kinds[kind]), order[WARM:]))
        after = resident_bytes()
        assert [i for i, kind in enumerate(order) if answers[i] != alone[kind]] == []
        assert len(answers) == REQUESTS
        assert client.get("/health").json()["taken"] == 0
    print(f"resident: {before / 2**20:.0f} MB after {WARM}, {after / 2**20:.0f} MB after {REQUESTS}")
    assert after < MOST_GROWTH * before
