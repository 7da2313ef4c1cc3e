"""Serve a bundle and ask it with OpenAI's client: python examples/serve_and_call.py BUNDLE PROMPT"""

import subprocess
import sys
import time

import httpx
from openai import OpenAI

PORT = 8123


def main(bundle: str, prompt: str, port: int = PORT) -> None:
    command = [sys.executable, "-m", "ease_runtime.cli.main", "serve", bundle, "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any")
        asked = {"threshold": 0.5, "catch_up": "recompute"}
        answer = client.completions.create(
            model=client.models.list().data[0].id, prompt=prompt, max_tokens=20, extra_body={"ease": asked}
        )
        print(answer.choices[0].text)
        print("depths", [token["depth"] for token in answer.choices[0].ease["tokens"]])  # type: ignore[attr-defined]
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
