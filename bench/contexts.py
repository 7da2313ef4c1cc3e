"""Decoding at full depth behind more and more text, one row and eight; and rows of very different lengths.

    python bench/contexts.py BUNDLE... [--threads N] [--json FILE]

The cache holds noise, whose keys and values cost what those of a text do, so that a long context takes no
long prompt. Bundles take turns. `mixed`: one row behind the longest context and seven behind the shortest;
what the seven take beside it, over what they take alone.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ease_runtime.engine.layout import Span
from ease_runtime.ort.buffers import RowCache
from ease_runtime.ort.stack import OrtStack

CONTEXTS = (128, 1024, 4096, 8192)
ROWS = (1, 8)
STEPS = 5  # of a turn
QUICK = 20  # percentile of the steps' times: what a machine with other work disturbs least
Row = dict[str, Any]


class Rows:
    """Rows of a bundle, each behind a context of its own."""

    def __init__(self, stack: OrtStack, contexts: list[int]) -> None:
        self.stack = stack
        self.contexts = contexts
        self.seconds: list[float] = []
        cache = stack.open_cache(len(contexts))
        assert isinstance(cache, RowCache), "contexts are compared on a CPU"
        self.cache = cache
        cache.written[:] = contexts
        self.step()
        noise = np.random.default_rng(0).standard_normal(1 << 16).astype(cache.dtype)
        for table in cache.tables.values():
            for layer in range(len(cache.segment_of)):
                for buffer in table.layer(layer):
                    flat = buffer.reshape(-1)
                    for start in range(0, flat.size, noise.size):
                        part = flat[start : start + noise.size]
                        part[:] = noise[: part.size]

    def step(self) -> None:
        """One token more for every row, at full depth; the next step writes it again."""
        count = len(self.contexts)
        spans = [Span(slot, length, length + 1) for slot, length in enumerate(self.contexts)]
        rows = np.ones(count, np.int64)
        for number in range(len(self.stack.layout)):
            out = self.stack.reserve_rows(2 * count, [rows] if number else [])
            self.stack.run_segment(number, self.cache, spans, rows, out)
            rows = np.arange(out, out + count)
        self.stack.run_exit(len(self.stack.exits) - 1, rows)

    def measure(self) -> None:
        """Note the time of some steps, but for the first, which finds other rows' data in the cache."""
        self.step()
        for _ in range(STEPS):
            began = time.perf_counter()
            self.step()
            self.seconds.append(time.perf_counter() - began)

    @property
    def step_seconds(self) -> float:
        return float(np.percentile(self.seconds, QUICK))


def in_turns(rows: list[Rows], rounds: int) -> list[float]:
    """Seconds of a step of each."""
    for _ in range(rounds):
        for one in rows:
            one.measure()
    return [one.step_seconds for one in rows]


def decoding(stacks: dict[str, OrtStack], contexts: tuple[int, ...], rounds: int) -> list[Row]:
    """Tokens a second of every bundle."""
    found = []
    for num_rows in ROWS:
        for context in contexts:
            rows = [Rows(stack, [context] * num_rows) for stack in stacks.values()]
            for name, one, seconds in zip(stacks, rows, in_turns(rows, rounds), strict=True):
                found.append(
                    {
                        "bundle": name,
                        "rows": num_rows,
                        "context": context,
                        "tokens_per_second": num_rows / seconds,
                        "step_ms": 1e3 * seconds,
                        "kv_mb": num_rows * context * one.cache.position_bytes / 1e6,
                    }
                )
    return found


def mixed(stacks: dict[str, OrtStack], contexts: tuple[int, ...], rounds: int) -> list[Row]:
    """Seven short rows beside a long one."""
    found = []
    short = [contexts[0]] * 7
    for name, stack in stacks.items():
        rows = [Rows(stack, lengths) for lengths in ([*short, contexts[-1]], short, [contexts[-1]])]
        together, seven, one = in_turns(rows, rounds)
        found.append({"bundle": name, "long": contexts[-1], "seven_over_alone": (together - one) / seven})
    return found


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
@click.option("--rounds", default=4, show_default=True, help="Turns of each setting.")
@click.option("--contexts", default=",".join(map(str, CONTEXTS)), show_default=True, help="In tokens.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(bundles: tuple[Path, ...], threads: int, rounds: int, contexts: str, json_file: Path | None) -> None:
    """Measure decoding behind contexts of several lengths."""
    stacks = {str(bundle): OrtStack(bundle, num_threads=threads) for bundle in bundles}
    lengths = tuple(int(length) for length in contexts.split(","))
    results = {"decoding": decoding(stacks, lengths, rounds), "mixed": mixed(stacks, lengths, rounds)}
    for row in (*results["decoding"], *results["mixed"]):
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"threads": threads, **results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
