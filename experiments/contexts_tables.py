"""Tables of docs/experiments/contexts.md: EASE beside other runtimes behind longer and longer texts.

Out of the JSON of `ease-eval compare`, a file a run; a cell is the tokens a second, or the time to the first
token, and over it what EASE's first row has.
"""

from typing import Any

from tables import FORCED_DEPTHS, Row, figures, load, table

LENGTHS = {"128": 128, "1k": 1024, "2k": 2048, "8k": 8000}
SPEED = ("tokens_per_second", "ease_over_this", ".1f")
FIRST = ("first_token_ms", "first_token_over_this", ".0f")
WHAT = {"one thread": (1, *SPEED), "two threads": (2, *SPEED), "first token ms, one thread": (1, *FIRST)}
NAMES = {"ease": "EASE, GPTQ", "ease b-merged": "EASE, the file's numbers"}


def tables() -> dict[str, str]:
    """By name."""
    rows = [row for name in ("128", "1k", "2k", "8k") for row in load(f"contexts-int4-{name}.json")["rows"]]
    scored = {
        (row["runtime"], row["precision"]): row["perplexity"] for row in load("contexts-ppl.json")["rows"]
    }
    runtimes = list(dict.fromkeys((row["runtime"], row["precision"]) for row in rows))
    workloads = [*((length, 1) for length in LENGTHS.values()), (1024, 8)]
    heads = [*(f"{length:,}" for length in LENGTHS.values()), "8 rows, 1,024"]
    speeds = []
    first = []
    memory = []
    for runtime, precision in runtimes:
        mine = [find(rows, runtime, precision, *workload) for workload in workloads]
        named = [NAMES.get(runtime, runtime), precision]
        perplexity = scored.get((runtime, precision))
        shown = "–" if perplexity is None else f"{perplexity:.2f}"
        speeds.append([*named, shown, *(cell(row, *SPEED) for row in mine)])
        first.append([*named, *(cell(row, *FIRST) for row in mine[:-1])])
        memory.append(
            [
                *named,
                load_time(mine[0]),
                *("–" if row is None else f"{row['resident_mb']:.0f}" for row in mine),
            ]
        )
    large = {threads: load(f"contexts-1b-{threads}.json")["rows"] for threads in (1, 2)}
    return {
        "contexts-int4": table(["runtime", "weights", "perplexity", *heads], speeds, 2),
        "contexts-first": table(["runtime", "weights", *heads[:-1]], first, 2),
        "contexts-memory": table(["runtime", "weights", "load, s", *heads], memory, 2),
        "contexts-1b": by_length(
            {what: (large[threads], *figure) for what, (threads, *figure) in WHAT.items()}
        ),
        "contexts-int8": two_lengths(load("contexts-int8.json")["rows"]),
        "contexts-fp32": two_lengths(load("contexts-fp32.json")["rows"]),
        "contexts-depth": figures(load("contexts-depth.json")["depth"], FORCED_DEPTHS, 2),
    }


def two_lengths(rows: list[Row]) -> str:
    """Speeds and first tokens."""
    return by_length({"tokens/s": (rows, *SPEED), "first token ms": (rows, *FIRST)})


def by_length(parts: dict[str, tuple[Any, ...]]) -> str:
    """Figures behind 128 and 1,024 tokens, by heading: the rows that they are from, and what `cell` takes."""
    lengths = (128, 1024)
    runtimes = dict.fromkeys((row["runtime"], row["precision"]) for row in next(iter(parts.values()))[0])
    return table(
        ["runtime", *(f"{what}, {length:,}" for what in parts for length in lengths)],
        [
            [
                runtime[0],
                *(
                    cell(find(rows, *runtime, length, 1), *figure)
                    for rows, *figure in parts.values()
                    for length in lengths
                ),
            ]
            for runtime in runtimes
        ],
    )


def find(rows: list[Row], runtime: str, precision: str, prompt_tokens: int, batch_size: int) -> Row | None:
    """A runtime's row of a workload."""
    wanted = (runtime, precision, prompt_tokens, batch_size)
    keys = ("runtime", "precision", "prompt_tokens", "batch_size")
    return next((row for row in rows if tuple(row[key] for key in keys) == wanted), None)


def cell(row: Row | None, name: str, over: str, form: str) -> str:
    """A figure, and EASE's over it."""
    if row is None or row[name] is None:
        return "–"
    ratio: Any = row[over]
    return f"{row[name]:{form}} ({ratio:.2f})"


def load_time(row: Row | None) -> str:
    """Seconds that loading takes."""
    return "–" if row is None else f"{row['load_seconds']:.2f}"
