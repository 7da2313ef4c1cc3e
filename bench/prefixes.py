"""The time to the first token of a prompt whose beginning another one had, over that of a prompt that is new.

python bench/prefixes.py BUNDLE [--tokens 1000] [--threads N] [--json FILE]
"""

import json
import statistics
import time
from pathlib import Path

import click
import numpy as np

from ease_runtime.engine.engine import Engine
from ease_runtime.ort.stack import open_stack

ROUNDS = 5
OWN = 20  # tokens that a prompt has for itself
KEPT = 1 << 30  # bytes


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=1000, show_default=True, help="That two prompts begin with alike.")
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here.")
def main(bundle: Path, tokens: int, threads: int, json_file: Path | None) -> None:
    """Measure what a shared beginning saves."""
    engine = Engine(open_stack(bundle, num_threads=threads), prefix_bytes=KEPT)
    draws = np.random.default_rng(0)
    first: list[float] = []
    second: list[float] = []
    for _ in range(ROUNDS):
        begin = draws.integers(1, engine.stack.vocab_size, tokens).tolist()
        for seconds in (first, second):
            ids = begin + draws.integers(1, engine.stack.vocab_size, OWN).tolist()
            began = time.perf_counter()
            sequence = engine.start(ids, max_new_tokens=1, sharing="bench")
            while engine.busy:
                engine.step()
            seconds.append(time.perf_counter() - began)
        assert sequence.num_shared == tokens, "the second one shares all of the beginning"
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    found = {
        "tokens": tokens,
        "first_ms": 1e3 * statistics.median(first),
        "second_ms": 1e3 * statistics.median(second),
        "second_over_first": ratio,
    }
    click.echo("  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    if json_file:
        json_file.write_text(json.dumps({"bundle": str(bundle), **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
