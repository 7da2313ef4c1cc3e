"""Who may call a server, and what every answer carries."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ease_runtime.cli.main import main
from ease_runtime.llm import LLM
from ease_runtime.server.front import answers_to, host_name
from served import Served, served, text_engine

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason="no server: pip install 'ease-lm[serve]'")
httpx = pytest.importorskip("httpx")

COMPLETIONS = "/v1/completions"
ASKED = {"prompt": "abc", "max_tokens": 2}


@pytest.fixture(scope="module")
def local() -> Iterator[Served]:
    """As `ease-run serve` on its default address, with a key, for one other origin."""
    hosts = answers_to("127.0.0.1", ("box.example",))
    more: dict[str, Any] = {
        "api_key": "sesame",
        "cors_origins": ("https://pages.example",),
        "body_seconds": 1.0,
    }
    with served(text_engine(), hosts=hosts, **more) as running:
        yield running


def post(server: Served, headers: dict[str, str], body: Any = ASKED) -> "httpx.Response":
    headers = {"Authorization": "Bearer sesame", **headers}
    return httpx.post(server.url + COMPLETIONS, content=json.dumps(body), headers=headers, timeout=30)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("127.0.0.1:8000", "127.0.0.1"),
        ("LocalHost", "localhost"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("", ""),
        ("evil.example:80:90", "evil.example"),
    ],
)
def test_the_name_in_a_header(header: str, name: str) -> None:
    assert host_name(header) == name


def test_the_names_of_an_address() -> None:
    assert answers_to("0.0.0.0", ()) is None
    assert answers_to("192.168.0.7", ()) is None
    assert answers_to("0.0.0.0", ("Box",)) == {"box"}
    assert answers_to("127.0.0.2", ()) == {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}
    assert "[::1]" in (answers_to("::1", ()) or ())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "box.example", "[::1]:80"])
def test_it_answers_to_its_names(local: Served, host: str) -> None:
    assert post(local, {"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "169.254.0.1"])
def test_it_answers_to_no_other_name(local: Served, host: str) -> None:
    answer = post(local, {"Host": host})
    assert answer.status_code == 421
    assert "--allowed-host" in answer.json()["error"]["message"]
    assert httpx.get(local.url + "/health", headers={"Host": host}).status_code == 421


def test_requests_have_names(local: Served) -> None:
    assert post(local, {"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    others = [
        post(local, {"x-request-id": given}).headers["x-request-id"] for given in ("a b", "x" * 200, "")
    ]
    assert all(len(name) == 32 for name in others)
    assert len({*others}) == 3
    refused = post(local, {"Authorization": "Bearer wrong", "x-request-id": "r1"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (401, "r1")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("bearer sesame", 200),
        ("BEARER  sesame", 200),
        ("Basic sesame", 401),
        ("sesame", 401),
        ("Bearer sesam", 401),
        ("Bearer", 401),
        ("", 401),
    ],
)
def test_the_key_counts_whatever_the_case_of_its_scheme(local: Served, given: str, status: int) -> None:
    assert post(local, {"Authorization": given}).status_code == status


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
def test_a_body_is_json_and_says_so(local: Served, kind: str, status: int) -> None:
    answer = post(local, {"Content-Type": kind})
    assert answer.status_code == status
    if status == 415:
        assert kind in answer.json()["error"]["message"]


def test_pages_of_the_origins_that_are_named(local: Served) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = httpx.options(local.url + COMPLETIONS, headers={"Origin": "https://pages.example", **asked})
    assert allowed.headers["access-control-allow-origin"] == "https://pages.example"
    refused = httpx.options(local.url + COMPLETIONS, headers={"Origin": "https://evil.example", **asked})
    assert "access-control-allow-origin" not in refused.headers
    assert post(local, {"Origin": "https://pages.example"}).headers["access-control-allow-origin"]


def test_a_body_that_does_not_come_is_given_up(local: Served) -> None:
    port = int(local.url.rpartition(":")[2])
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(f'{head}Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{{"pro'.encode())
        began = time.monotonic()
        assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 15


def test_a_name_with_a_slash(tiny_bundle: Path) -> None:
    from ease_runtime.server.app import Settings, create_app

    starlette = pytest.importorskip("starlette.testclient")
    app = create_app(text_engine(), Settings("org/name"))
    with starlette.TestClient(app) as client:
        assert client.get("/v1/models/org/name").json()["id"] == "org/name"
        assert client.get("/v1/models/org/other").status_code == 404


def test_an_empty_key_is_refused(tiny_bundle: Path) -> None:
    for arguments, environment in ((["--api-key", ""], {}), ([], {"EASE_API_KEY": ""})):
        result = CliRunner().invoke(main, ["serve", str(tiny_bundle), *arguments], env=environment)
        assert result.exit_code == 1
        assert (
            result.stderr == "error: the API key (--api-key, EASE_API_KEY) is empty; give one, or unset it\n"
        )


def test_what_did_not_run_again_is_counted(tiny_bundle: Path) -> None:
    begin = "And the king went up to the mountain; and it was good. " * 3
    with served(LLM(tiny_bundle, num_slots=2, prefix_bytes=16 << 20)) as server:
        told = []
        for more in ("And", "The"):
            body = {"prompt": begin + more, "max_tokens": 4, "temperature": 0, "n": 2}
            answer = httpx.post(server.url + COMPLETIONS, json=body, timeout=30).json()
            told.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert told[-1] < answer["usage"]["prompt_tokens"]
        assert (told[0] < 16, told[1] > 16) == (True, True)
        metrics = httpx.get(server.url + "/metrics").text
        assert float(metrics.split("\nease_shared_prompt_tokens_total ")[1].split()[0]) >= sum(told)


def test_connections_stay_below_the_limit_of_open_files() -> None:
    resource = pytest.importorskip("resource")
    from ease_runtime.server.run import FILES_APART, MOST_FILES, most_connections

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        found = most_connections()
        now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert now == min(hard, MOST_FILES) if hard != resource.RLIM_INFINITY else MOST_FILES
        assert found == max(8, now - FILES_APART)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
