"""What the engine costs beyond ONNX Runtime: microseconds a graph call, for each catch-up, and by number of
threads.

    python bench/overhead.py BUNDLE

Each number of threads is a process of its own (the thread pool is the process's). The time inside
`run_with_iobinding` is taken as ONNX Runtime's own; the rest of the decoding loop is the engine's.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given
from ease_runtime.ort import sessions
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy

NUM_TOKENS = 120
ROUNDS = 5
SETTINGS = (
    ("off", None, "recompute"),
    ("0.5", 0.5, "recompute"),
    ("0.5", 0.5, "propagate"),
    ("0", 0.0, "propagate"),
)


class Clock:
    """What has passed inside `run_with_iobinding` of every session, from here on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        session_type = sessions.ort.InferenceSession
        inside = session_type.run_with_iobinding

        def timed(session: Any, binding: Any) -> None:
            began = time.perf_counter()
            inside(session, binding)
            self.seconds += time.perf_counter() - began
            self.calls += 1

        session_type.run_with_iobinding = timed


def measure(bundle: Path, num_threads: int) -> list[dict[str, object]]:
    """The figures of every setting, medians over rounds."""
    stack = OrtStack(bundle, num_threads=num_threads)
    engine = Engine(stack)
    inside = Clock()
    length = min(NUM_TOKENS + 16, stack.max_positions)
    text = [(7 * i * i + 3 * i) % stack.vocab_size for i in range(length)]
    results = []
    for name, threshold, catch_up in SETTINGS:
        rounds = []
        for _ in range(ROUNDS + 1):
            policy = make_policy("max-prob", None if threshold is None else [threshold], stack.exit_layers)
            sequence = engine.start(
                text[:16], max_new_tokens=length - 16, policy=policy, catch_up=catch_up, sampler=Given(text)
            )
            tokens = engine.generate(sequence)
            next(tokens)
            inside.seconds, inside.calls, began = 0.0, 0, time.perf_counter()
            count = sum(1 for _ in tokens)
            total = time.perf_counter() - began
            rounds.append(
                (
                    (total - inside.seconds) / inside.calls,
                    inside.calls / count,
                    total / count,
                    inside.seconds / total,
                )
            )
        overhead, calls, step, share = sorted(rounds[1:])[ROUNDS // 2]
        results.append(
            {
                "threads": num_threads,
                "threshold": name,
                "catch_up": catch_up,
                "overhead_us_per_call": overhead * 1e6,
                "calls_per_token": calls,
                "token_us": step * 1e6,
                "inside_share": share,
            }
        )
    return results


def main() -> None:
    bundle = Path(sys.argv[1])
    if len(sys.argv) > 2:
        print(json.dumps(measure(bundle, int(sys.argv[2]))))
        return
    table = Table(
        "threads",
        "threshold",
        "catch-up",
        "overhead µs/call",
        "calls/token",
        "µs/token",
        "inside ONNX Runtime",
    )
    for threads in ("1", "2"):
        output = subprocess.run(
            [sys.executable, __file__, str(bundle), threads], check=True, capture_output=True, text=True
        ).stdout
        for row in json.loads(output):
            table.add_row(
                threads,
                row["threshold"],
                row["catch_up"],
                f"{row['overhead_us_per_call']:.1f}",
                f"{row['calls_per_token']:.2f}",
                f"{row['token_us']:.0f}",
                f"{row['inside_share']:.0%}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
