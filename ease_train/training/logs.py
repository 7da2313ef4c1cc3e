"""The metrics of a run as a table for a spreadsheet: one row a step, one column a number."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any


def metrics_csv(metrics: Iterable[Mapping[str, Any]]) -> str:
    """CSV of the lines of metrics.jsonl: `exit_losses` and `perplexity` become a column an exit, like
    perplexity_12.

    What a line does not say stays empty; text and the reports of gates are left to metrics.jsonl.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in metrics:
        rows.setdefault(line["step"], {}).update(_flat(line))
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    return out.getvalue()


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in line.items() if isinstance(value, int | float)}
    nested = {name: value for name, value in line.items() if isinstance(value, Mapping)}
    for name, values in nested.items():
        flat |= {
            f"{name}_{layer}": value for layer, value in values.items() if isinstance(value, int | float)
        }
    return flat
