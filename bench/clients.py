"""Clients of a server: what eight together get against one, and the mean batch that the server's metrics show
meanwhile.

    python bench/clients.py BUNDLE [--json FILE]

One and eight clients take turns, a round each; a client sends one completion after the other, greedy, at full
depth.
"""

import json
import re
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import httpx

CLIENTS = 8
REQUESTS = 3
TOKENS = 96
ROUNDS = 5
PROMPT = "In the beginning"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise click.ClickException("the server did not start")


def ask(client: httpx.Client, number: int) -> int:
    """Some completions, one after the other. Returns their tokens."""
    tokens = 0
    for i in range(REQUESTS):
        answer = client.post(
            "/v1/completions", json={"model": "it", "prompt": f"{PROMPT} {number} {i}", "max_tokens": TOKENS}
        )
        tokens += answer.raise_for_status().json()["usage"]["completion_tokens"]
    return tokens


def tokens_a_second(client: httpx.Client, num_clients: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        tokens = sum(pool.map(lambda number: ask(client, number), range(num_clients)))
    return tokens / (time.perf_counter() - began)


def passes(client: httpx.Client) -> tuple[float, float]:
    """Passes so far, and completions in all of them."""
    text = client.get("/metrics").text
    first, second = (
        re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        for name in ("ease_passes_total", "ease_pass_rows_total")
    )
    assert first is not None, "the server counts its passes"
    assert second is not None, "and their rows"
    return float(first[1]), float(second[1])


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here.")
def main(bundle: Path, json_file: Path | None) -> None:
    """Measure a server with one client and with eight."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "ease_runtime.cli.main",
        "serve",
        str(bundle),
        "--port",
        str(port),
        "--threshold",
        "off",
    ]
    process = subprocess.Popen(
        [*command, "--model-name", "it"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            wait_for(client, process)
            tokens_a_second(client, CLIENTS)  # to warm up
            ones = []
            eights = []
            batches = []
            for _ in range(ROUNDS):
                ones.append(tokens_a_second(client, 1))
                before = passes(client)
                eights.append(tokens_a_second(client, CLIENTS))
                after = passes(client)
                batches.append((after[1] - before[1]) / (after[0] - before[0]))
    finally:
        process.terminate()
        process.wait()
    found = {
        "bundle": str(bundle),
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "one_tokens_per_second": statistics.median(ones),
        "all_tokens_per_second": statistics.median(eights),
        "over_one": statistics.median(b / a for a, b in zip(ones, eights, strict=True)),
        "mean_batch": statistics.median(batches),
    }
    print(json.dumps(found, indent=2))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
