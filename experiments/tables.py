"""Tables in Markdown out of the JSON files in docs/experiments, and means over seeds with their intervals."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ease_runtime.policies.thresholds import Thresholds

FOLDER = Path("docs/experiments")
STUDENT_T = {3: 4.303, 5: 2.776}  # 97.5 % point of Student's t at n - 1 degrees of freedom, by n
Row = dict[str, Any]
FORCED_DEPTHS = {  # of bench/engine.py
    "depth": "{depth}",
    "catch-up": "{catch_up}",
    "tokens/s": "{tokens_per_second:.1f}",
    "speed-up": "{speedup:.2f}",
    "ideal": "{ideal_speedup:.2f}",
    "measured/ideal": "{measured_over_ideal:.2f}",
}


class PageError(Exception):
    """What is wrong with a page."""


def load(name: str) -> Any:
    if not (FOLDER / name).is_file():
        raise PageError(f"{FOLDER / name} is missing")
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; all columns but the first ones are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
        .replace("| --- ", "|---")
        .replace("| ---: ", "|---:")
    )


class Dash:
    """Stands for a field without a value, whatever its format."""

    def __format__(self, form: str) -> str:
        return "–"


def figures(rows: Iterable[Row], columns: dict[str, str], text_columns: int = 1) -> str:
    """A table with a line a row; `columns` are templates of its fields by their headings."""
    dashed = ({name: Dash() if value is None else value for name, value in row.items()} for row in rows)
    return table(
        list(columns),
        [[template.format(**row) for template in columns.values()] for row in dashed],
        text_columns,
    )


def named(row: Row) -> Row:
    """A row of `ease-eval`, its setting as it is asked for on the command line."""
    threshold = Thresholds.of(row["threshold"])
    asked = ",".join("off" if value is None else str(value) for value in threshold.values)
    return {**row, "named": asked, "catch_up": row["catch_up"] if threshold else "–"}


def leaves_early(row: Row) -> bool:
    """Whether a row of `ease-eval` has thresholds; those written before there was a notation have null for
    off.
    """
    return bool(Thresholds.of(row["threshold"]))


def measured(row: Row) -> Row:
    """A row of `ease-eval table`, with the change of its perplexity in percent."""
    return {**named(row), "change": 100 * (row["ppl_ratio"] - 1)}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of the mean (Student's t)."""
    values = list(values)
    return statistics.mean(values), STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def complete(values: dict[int, float], seeds: Sequence[int], what: str) -> dict[int, float]:
    """The same values. Raises PageError where a seed is missing."""
    if set(values) != set(seeds):
        raise PageError(f"{what} has the seeds {sorted(values)}, expected {list(seeds)}")
    return values


def mean_of(values: dict[int, float], digits: int = 2) -> str:
    """The mean over seeds, with half its 95 % interval."""
    mean, half = interval(values.values())
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
