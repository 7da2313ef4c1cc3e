"""The tables of docs/experiments, out of the JSON files beside them.

    python experiments/pages.py            # writes every table anew
    python experiments/pages.py --check    # exit code 1 where a page says something else than its JSON

In a page a table stands behind a line `<!-- table: NAME -->`. A table of means fails when a row has fewer seeds than it should have.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

FOLDER = Path("docs/experiments")
STUDENT_T = {5: 2.776}  # 97.5 % point of Student's t at n - 1 degrees of freedom, by n
Row = dict[str, Any]


class PageError(Exception):
    """What is wrong with a page."""


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; all columns but the first ones are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)).replace("| --- ", "|---").replace("| ---: ", "|---:")
    )


def columns(found: Iterable[Row], /, **formats: str) -> list[list[str]]:
    """Some fields of each row, formatted."""
    return [["–" if row[name] is None else format(row[name], form) for name, form in formats.items()] for row in found]


def engine_tables() -> dict[str, str]:
    found, peers = load("engine.json"), load("peers.json")
    adapt = {"catch_up": "", "leaving": ".2f", "acceptance": ".1f", "speedup": ".2f", "slowest": ".2f"}
    adapt |= {"before_giving_up": ".2f", "after_giving_up": ".2f", "share_early": ".2f"}
    return {
        "peers": table(
            ["runtime", "tokens/s", "EASE is", "first token ms", "resident MB", "texts as EASE"],
            columns(
                peers["rows"],
                runtime="",
                tokens_per_second=".1f",
                ease_over_this=".2f",
                first_token_ms=".0f",
                resident_mb=".0f",
                same_texts="",
            ),
        ),
        "depth": table(
            ["depth", "catch-up", "tokens/s", "speed-up", "ideal", "measured/ideal"],
            columns(
                found["depth"],
                depth="",
                catch_up="",
                tokens_per_second=".1f",
                speedup=".2f",
                ideal_speedup=".2f",
                measured_over_ideal=".2f",
            ),
            2,
        ),
        "verify": table(
            ["acceptance", "as it fell", "drafts", "speed-up", "cost model", "measured/model", "break-even"],
            columns(
                found["verify"],
                acceptance=".1f",
                accepted=".2f",
                draft_length="",
                speedup=".2f",
                model_speedup=".2f",
                measured_over_model=".2f",
                break_even_acceptance=".2f",
            ),
        ),
        "adapt": table(
            ["catch-up", "leaves", "acceptance", "speed-up", "slowest round", "before it gives up", "after", "share early"],
            columns(found["adapt"], **adapt),
        ),
        "batch": table(
            ["requests", "catch-up", "over full depth", "best schedule", "of best", "involuntary"],
            columns(found["batch"], requests="", catch_up="", speedup=".2f", best_schedule=".2f", of_best=".2f", involuntary=""),
            2,
        ),
        "scaling": table(
            ["rows", "tokens/s", "over one row"], columns(found["scaling"], rows="", tokens_per_second=".1f", over_one_row=".2f")
        ),
        "clients": table(
            ["clients", "tokens/s of one", "of all", "over one", "mean batch"],
            columns(
                [load("clients.json")],
                clients="",
                one_tokens_per_second=".0f",
                all_tokens_per_second=".0f",
                over_one=".2f",
                mean_batch=".2f",
            ),
        ),
        "memory": table(
            [
                "tokens a row",
                "weights MB",
                "loaded MB",
                "caches MB",
                "in use MB",
                "of files MB",
                "in use / (weights + caches)",
                "without files",
                "copied / caches",
            ],
            columns(
                found["memory"],
                tokens_a_row="",
                weights_mb=".0f",
                loaded_mb=".0f",
                caches_mb=".0f",
                after_mb=".0f",
                mapped_mb=".0f",
                after_over_weights_and_caches=".2f",
                unmapped_over_weights_and_caches=".2f",
                copied_over_caches=".2f",
            ),
        ),
    }


def small_tables() -> dict[str, str]:
    header = ["threshold", "catch-up", "perplexity", "vs off", "mean depth", "tokens/s", "p50 ms", "p95 ms", "speed-up", "range", "ideal"]
    rows = []
    for row in load("small-gate.json")["rows"]:
        more = {
            "named": named_thresholds(row),
            "catch_up": "–" if row["threshold"] is None else row["catch_up"],
            "change": f"{100 * (row['ppl_ratio'] - 1):+.1f} %",
            "range": span(row),
        }
        rows.append({**row, **more})
    formats = {"named": "", "catch_up": "", "ppl": ".2f", "change": "", "mean_depth": ".2f", "tokens_per_second": ".0f"}
    formats |= {"latency_ms_p50": ".2f", "latency_ms_p95": ".2f", "speedup": ".2f", "range": "", "ideal_speedup": ".2f"}
    formats |= {"measured_over_ideal": ".2f"}
    return {"gate": table([*header, "measured/ideal"], columns(rows, **formats), 2)}


def named_thresholds(row: Row) -> str:
    """As they are asked for on the command line."""
    thresholds = row["threshold"] if isinstance(row["threshold"], list) else [row["threshold"]]
    return ",".join("off" if value is None else str(value) for value in thresholds)


def span(row: Row) -> str:
    """The slowest and the fastest round."""
    return "–".join(f"{end:.2f}" for end in row["speedup_range"])


def smollm2_tables() -> dict[str, str]:
    found = load("smollm2-speed.json")["rows"]
    rows = []
    for row in found:
        share = f"{row['accepted']} of {row['drafted']}" if row["drafted"] else "–"
        catch_up = "–" if row["threshold"] is None else row["catch_up"]
        rows.append({**row, "named": named_thresholds(row), "catch_up": catch_up, "share": share, "range": span(row)})
    header = ["threshold", "catch-up", "mean depth", "tokens/s", "speed-up", "range", "ideal", "drafts accepted"]
    formats = {"named": "", "catch_up": "", "decoded_mean_depth": ".1f", "tokens_per_second": ".0f", "speedup": ".2f", "range": ""}
    return {"speed": table(header, columns(rows, **formats, ideal_speedup=".2f", share=""), 2)}


def cost_model_tables() -> dict[str, str]:
    tables, header = {}, ["threshold", "catch-up", "mean depth", "predicted", "measured", "error %"]
    for name in ("small", "smollm2"):
        found = load(f"advise-{name}.json")["predictions"]
        rows = [{**row, "named": named_thresholds(row), "percent": 100 * row["error"]} for row in found]
        formats = {
            "named": "",
            "catch_up": "",
            "mean_depth": ".1f",
            "predicted_speedup": ".2f",
            "measured_speedup": ".2f",
            "percent": "+.1f",
        }
        tables[name] = table(header, columns(rows, **formats), 2)
    return tables


def scale_tables() -> dict[str, str]:
    header = [
        "model",
        "layers",
        "B weights",
        "head",
        "all leave",
        "half leave",
        "break-even",
        "reduced",
        "half 0.8",
        "half 0.9",
        "quarter 0.8",
        "quarter 0.9",
    ]
    formats = {"name": "", "layers": "", "billions": ".2f", "head_in_layers": ".1f", "bound_half_depth": ".2f"}
    formats |= {"recompute_half_of_them": ".2f", "break_even_full_head": ".2f", "break_even_reduced_head": ".2f"}
    formats |= {"verify_half_80": ".2f", "verify_half_90": ".2f", "verify_quarter_80": ".2f", "verify_quarter_90": ".2f"}
    return {"shapes": table(header, columns(load("scale.json")["rows"], **formats))}


def original_tables() -> dict[str, str]:
    """Means over the seeds, with 95 % intervals of the mean (Student's t)."""
    from original import COMPARED, METHODS, ORIGINAL, SEEDS  # experiments/original.py

    runs = load("original.json")["runs"]
    if {row["protocol"]["name"] for row in runs} == set():
        raise PageError("original.json has no runs")

    def cell(method: str, protocol: str, value: Callable[[Row], float], digits: int = 2) -> str:
        values = {row["seed"]: value(row) for row in runs if (row["method"], row["protocol"]["name"]) == (method, protocol)}
        if set(values) != set(SEEDS):
            raise PageError(f"{method} under '{protocol}' has the seeds {sorted(values)}, expected {list(SEEDS)}")
        half = STUDENT_T[len(values)] * statistics.stdev(values.values()) / len(values) ** 0.5
        return f"{statistics.mean(values.values()):.{digits}f} ± {half:.{digits}f}"

    at_stop: Callable[[Row], float] = lambda row: row["epochs"][-1]["ppl"]  # noqa: E731
    first = [
        [
            method,
            cell(method, ORIGINAL.name, at_stop),
            cell(method, ORIGINAL.name, lambda row: row["more_validation"]),
            cell(method, ORIGINAL.name, lambda row: row["more_validation_full_depth"]),
            cell(method, ORIGINAL.name, lambda row: len(row["epochs"]), 1),
            cell(method, ORIGINAL.name, lambda row: 100 * row["epochs"][-1]["shallow_ratio"], 1),
            cell(method, ORIGINAL.name, lambda row: 100 * row["epochs"][-1]["compute_cost"], 1),
        ]
        for method in METHODS
    ]
    names = list(dict.fromkeys(row["protocol"]["name"] for row in runs))
    changed = [[name, *(cell(method, name, lambda row: row["more_validation"]) for method in COMPARED)] for name in names]
    return {
        "original": table(["method", "perplexity", "more text", "more text, full depth", "epochs", "leave early %", "compute %"], first),
        "changed": table(["protocol", *COMPARED], changed),
    }


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "engine.md": engine_tables,
    "cost-model.md": cost_model_tables,
    "small.md": small_tables,
    "scale.md": scale_tables,
    "smollm2-exits.md": smollm2_tables,
}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n+)((?:\|.*\n)*)\n*")


def with_tables(page: str, text: str, tables: dict[str, str]) -> str:
    """The page with its tables as they should be. Raises PageError for a marker without a table, or the other way round."""
    named = [name for _, name, _ in MARKED.findall(text)]
    if sorted(named) != sorted(tables):
        raise PageError(f"{page} has the tables {sorted(named)}, its JSON gives {sorted(tables)}")
    return MARKED.sub(lambda match: f"<!-- table: {match[2]} -->\n\n{tables[match[2]]}\n\n", text).rstrip("\n") + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 where a page and its JSON differ.")
def main(check: bool) -> None:
    """Write or check the tables of docs/experiments."""
    wrong = []
    for page, tables in PAGES.items():
        path = FOLDER / page
        try:
            text = path.read_text(encoding="utf-8")
            made = with_tables(page, text, tables())
        except PageError as error:
            wrong.append(str(error))
            continue
        if not check:
            path.write_text(made, encoding="utf-8")
        elif made != text:
            wrong.append(f"{page} and its JSON differ; write its tables anew: python experiments/pages.py")
    for line in wrong:
        click.echo(f"error: {line}", err=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
