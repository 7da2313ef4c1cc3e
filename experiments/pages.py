"""The tables of docs/experiments, and those of them that other pages show, out of the JSON files in docs/experiments.

    python experiments/pages.py            # writes every table anew
    python experiments/pages.py --check    # exit code 1 where a page says something else than its JSON

In a page a table stands behind a line `<!-- table: NAME -->`. A table of means fails when a row has fewer seeds than it should have.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

FOLDER = Path("docs/experiments")
STUDENT_T = {3: 4.303, 5: 2.776}  # 97.5 % point of Student's t at n - 1 degrees of freedom, by n
Row = dict[str, Any]
NAMED = {"threshold": "{named}", "catch-up": "{catch_up}"}
RANGE = "{speedup_range[0]:.2f}–{speedup_range[1]:.2f}"  # the slowest and the fastest round


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
        "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)).replace("| --- ", "|---").replace("| ---: ", "|---:")
    )


class Dash:
    """Stands for a field without a value, whatever its format."""

    def __format__(self, form: str) -> str:
        return "–"


def figures(rows: Iterable[Row], columns: dict[str, str], text_columns: int = 1) -> str:
    """A table with a line a row; `columns` are templates of its fields by their headings."""
    dashed = ({name: Dash() if value is None else value for name, value in row.items()} for row in rows)
    return table(list(columns), [[template.format(**row) for template in columns.values()] for row in dashed], text_columns)


def engine_tables() -> dict[str, str]:
    found = load("engine.json")
    peers = {
        "runtime": "{runtime}",
        "tokens/s": "{tokens_per_second:.1f}",
        "EASE is": "{ease_over_this:.2f}",
        "first token ms": "{first_token_ms:.0f}",
        "resident MB": "{resident_mb:.0f}",
        "texts as EASE": "{same_texts}",
    }
    depth = {
        "depth": "{depth}",
        "catch-up": "{catch_up}",
        "tokens/s": "{tokens_per_second:.1f}",
        "speed-up": "{speedup:.2f}",
        "ideal": "{ideal_speedup:.2f}",
        "measured/ideal": "{measured_over_ideal:.2f}",
    }
    verify = {
        "acceptance": "{acceptance:.1f}",
        "as it fell": "{accepted:.2f}",
        "drafts": "{draft_length}",
        "speed-up": "{speedup:.2f}",
        "cost model": "{model_speedup:.2f}",
        "measured/model": "{measured_over_model:.2f}",
        "break-even": "{break_even_acceptance:.2f}",
    }
    adapt = {
        "catch-up": "{catch_up}",
        "leaves": "{leaving:.2f}",
        "acceptance": "{acceptance:.1f}",
        "speed-up": "{speedup:.2f}",
        "slowest round": "{slowest:.2f}",
        "before it gives up": "{before_giving_up:.2f}",
        "after": "{after_giving_up:.2f}",
        "share early": "{share_early:.2f}",
    }
    batch = {
        "requests": "{requests}",
        "catch-up": "{catch_up}",
        "over full depth": "{speedup:.2f}",
        "best schedule": "{best_schedule:.2f}",
        "of best": "{of_best:.2f}",
        "involuntary": "{involuntary}",
    }
    return {
        "peers": figures(load("peers.json")["rows"], peers),
        "depth": figures(found["depth"], depth, 2),
        "verify": figures(found["verify"], verify),
        "adapt": figures(found["adapt"], adapt),
        "batch": figures(found["batch"], batch, 2),
        **server_and_memory(found),
    }


def server_and_memory(found: Any) -> dict[str, str]:
    """Those of engine.md's tables that are about many rows."""
    scaling = {"rows": "{rows}", "tokens/s": "{tokens_per_second:.1f}", "over one row": "{over_one_row:.2f}"}
    clients = {
        "clients": "{clients}",
        "tokens/s of one": "{one_tokens_per_second:.0f}",
        "of all": "{all_tokens_per_second:.0f}",
        "over one": "{over_one:.2f}",
        "mean batch": "{mean_batch:.2f}",
    }
    memory = {
        "tokens a row": "{tokens_a_row}",
        "weights MB": "{weights_mb:.0f}",
        "loaded MB": "{loaded_mb:.0f}",
        "caches MB": "{caches_mb:.0f}",
        "in use MB": "{after_mb:.0f}",
        "of files MB": "{mapped_mb:.0f}",
        "in use / (weights + caches)": "{after_over_weights_and_caches:.2f}",
        "without files": "{unmapped_over_weights_and_caches:.2f}",
        "copied / caches": "{copied_over_caches:.2f}",
    }
    return {
        "scaling": figures(found["scaling"], scaling),
        "clients": figures([load("clients.json")], clients),
        "memory": figures(found["memory"], memory),
    }


IN_README = ("off", "off,0.7", "off,0.76")


def small_tables() -> dict[str, str]:
    columns = {
        **NAMED,
        "perplexity": "{ppl:.2f}",
        "vs off": "{change:+.1f} %",
        "mean depth": "{mean_depth:.2f}",
        "tokens/s": "{tokens_per_second:.0f}",
        "p50 ms": "{latency_ms_p50:.2f}",
        "p95 ms": "{latency_ms_p95:.2f}",
        "speed-up": "{speedup:.2f}",
        "range": RANGE,
        "ideal": "{ideal_speedup:.2f}",
        "measured/ideal": "{measured_over_ideal:.2f}",
    }
    rows = [measured(row) for row in load("small-gate.json")["rows"]]
    return {"gate": figures(rows, columns, 2), "readme": figures([row for row in rows if row["named"] in IN_README], columns, 2)}


def named(row: Row) -> Row:
    """A row of `ease-eval`, its setting as it is asked for on the command line."""
    thresholds = row["threshold"] if isinstance(row["threshold"], list) else [row["threshold"]]
    asked = ",".join("off" if value is None else str(value) for value in thresholds)
    return {**row, "named": asked, "catch_up": "–" if row["threshold"] is None else row["catch_up"]}


def measured(row: Row) -> Row:
    """A row of `ease-eval table`, with the change of its perplexity in percent."""
    return {**named(row), "change": 100 * (row["ppl_ratio"] - 1)}


LAYERS = ("10", "15", "20")
KINDS = {
    "untouched": "untouched (final norm, shared head)",
    "exits-low-rank": "low-rank",
    "exits-mlp": "MLP",
    "exits-block-stage1": "block, 90 steps",
    "exits-block": "block",
    "exits-block-distilled": "block, then distilled",
    "layerskip": "LayerSkip (other weights)",
}


TEXTS = {"wikitext": "WikiText-2", "gsm8k": "GSM8K", "spec-bench": "Spec-Bench"}


def perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.0e}"


def agreement_table(found: dict[str, Any], kind: str, first_round: bool) -> str:
    """How often each exit says what the last layer says, in percent, with 95 % intervals over documents."""

    def percent(exits: Row, key: str, digits: int = 1) -> str:
        return ", ".join(f"{100 * values[key]:.{digits}f}" for layer, values in exits.items() if layer in LAYERS)

    rows = []
    for name, kinds in found.items():
        exits = kinds[kind]
        each = [
            f"{100 * exits[layer]['agreement']:.1f} ({100 * exits[layer]['interval'][0]:.1f}–{100 * exits[layer]['interval'][1]:.1f})"
            for layer in LAYERS
        ]
        perplexities = [] if first_round else [", ".join(perplexity(values["perplexity"]) for values in exits.values())]
        rows.append([KINDS[name], *each, percent(exits, "confident_half"), percent(exits, "confident_quarter"), *perplexities])
    header = ["exits", *(f"layer {layer}" for layer in LAYERS), "confident half", "confident quarter"]
    return table([*header, *([] if first_round else ["perplexity (10, 15, 20, 30)"])], rows)


def curve_table(runs: dict[str, Any]) -> str:
    """Agreement on validation text in the course of each run, in percent at each layer."""
    steps = sorted({line["step"] for run in runs.values() for line in run["evaluations"]})
    rows = []
    for step in steps:
        lines = [next((line["agreement"] for line in run["evaluations"] if line["step"] == step), None) for run in runs.values()]
        rows.append([str(step), *("–" if line is None else ", ".join(f"{100 * line[layer]:.1f}" for layer in LAYERS) for line in lines)])
    return table(["step", *(KINDS[name] for name in runs)], rows)


def distilled_table() -> str:
    """Block exits before and after distillation, on the text of the speed tables: agreement in percent, perplexity."""
    rows = []
    for kind, text in TEXTS.items():
        for exits, name in (("block", "block"), ("distilled", "then distilled")):
            each = load(f"smollm2-speed-{exits}-{kind}.json")["exits"]
            agreements = (f"{100 * one['agreement']:.1f}" for one in each[:-1])
            rows.append([text, name, *agreements, ", ".join(perplexity(one["ppl"]) for one in each)])
    return table(["text", "exits", *(f"layer {layer}" for layer in LAYERS), "perplexity (10, 15, 20, 30)"], rows, 2)


def smollm2_tables() -> dict[str, str]:
    columns = {
        **NAMED,
        "perplexity": "{change:+.1f} %",
        "mean depth": "{decoded_mean_depth:.1f}",
        "tokens/s": "{tokens_per_second:.0f}",
        "speed-up": "{speedup:.2f}",
        "range": RANGE,
        "ideal": "{ideal_speedup:.2f}",
        "drafts accepted": "{share}",
    }
    found, first = load("smollm2-exits.json"), load("smollm2-first-round.json")
    speeds = {}
    for name in (*(f"{exits}-{kind}" for exits in ("distilled", "block") for kind in TEXTS), "low-rank"):
        rows = [measured(row) for row in load(f"smollm2-speed-{name}.json")["rows"]]
        shares = [{"share": f"{row['accepted']} of {row['drafted']}" if row["drafted"] else None} for row in rows]
        speeds[f"speed-{name}"] = figures(({**row, **share} for row, share in zip(rows, shares, strict=True)), columns, 2)
    peers = {
        "runtime": "{runtime}",
        "weights": "{precision}",
        "tokens/s": "{tokens_per_second:.1f}",
        "EASE at full depth is": "{ease_over_this:.2f}",
        "first token ms": "{first_token_ms:.0f}",
        "resident MB": "{resident_mb:.0f}",
    }
    speeds |= {f"peers-{name}": figures(load(f"smollm2-peers-{name}.json")["rows"], peers, 2) for name in ("int8", "int4")}
    return {
        "answers": agreement_table(found["agreement"], "answer", first_round=False),
        "wikitext": agreement_table(found["agreement"], "wikitext-2", first_round=False),
        "curve": curve_table(found["runs"]),
        "distilled": distilled_table(),
        "first-answers": agreement_table(first["agreement"], "answer", first_round=True),
        "first-wikitext": agreement_table(first["agreement"], "wikitext-2", first_round=True),
        **speeds,
    }


def cost_model_tables() -> dict[str, str]:
    columns = {
        **NAMED,
        "mean depth": "{mean_depth:.1f}",
        "predicted": "{predicted_speedup:.2f}",
        "measured": "{measured_speedup:.2f}",
        "error %": "{percent:+.1f}",
    }
    tables = {}
    for name in ("small", "smollm2"):
        rows = [{**row, "percent": 100 * row["error"]} for row in load(f"advise-{name}.json")["predictions"]]
        tables[name] = figures(map(named, rows), columns, 2)
    return tables


def scale_tables() -> dict[str, str]:
    columns = {
        "model": "{name}",
        "layers": "{layers}",
        "B weights": "{billions:.2f}",
        "head": "{head_in_layers:.1f}",
        "all leave": "{bound_half_depth:.2f}",
        "half leave": "{recompute_half_of_them:.2f}",
        "break-even": "{break_even_full_head:.2f}",
        "reduced": "{break_even_reduced_head:.2f}",
        "half 0.8": "{verify_half_80:.2f}",
        "half 0.9": "{verify_half_90:.2f}",
        "quarter 0.8": "{verify_quarter_80:.2f}",
        "quarter 0.9": "{verify_quarter_90:.2f}",
    }
    return {"shapes": figures(load("scale.json")["rows"], columns)}


def precision_tables() -> dict[str, str]:
    rows = load("precisions.json")["rows"]
    full = {row["model"]: row["ppl"] for row in rows if row["precision"] == "fp32"}
    columns = {
        "model": "{model}",
        "weights": "{precision}",
        "text": "{data}",
        "tokens": "{tokens}",
        "perplexity": "{ppl:.3f}",
        "vs fp32": "{change:+.2f} %",
        "MB": "{bundle_mb:.1f}",
        "loaded MB": "{loaded_mb:.0f}",
        "export, CPU s": "{export_cpu_seconds:.0f}",
        "export, largest MB": "{export_peak_mb:.0f}",
    }
    tried = {"layers": "{layers}", "embedding and head": "{embedding_and_head}", "perplexity": "{ppl:.2f}"}
    return {
        "precisions": figures(({**row, "change": 100 * (row["ppl"] / full[row["model"]] - 1)} for row in rows), columns, 3),
        "tried": figures(load("precisions-tried.json")["rows"], tried, 2),
    }


RECORDED = {  # by the original: perplexity, share that leaves early and compute in percent
    "discriminative": (18.52, None, None),
    "reverse discriminative": (21.14, None, None),
    "asymmetric 0.7": (22.95, 52.4, 65.0),
    "auxiliary loss": (23.98, 52.3, 65.2),
    "asymmetric 0.3": (24.88, 72.0, 52.0),
    "deep supervision, routed": (28.13, None, 46.6),
    "deep supervision": (30.54, 0.0, 100.0),
    "asymmetric with layer 2": (32.07, 86.3, 42.5),
    "standard": (34.86, 0.0, 100.0),
}


def mean_of(values: dict[int, float], seeds: Sequence[int], what: str, digits: int = 2) -> str:
    """The mean over seeds, with half its 95 % interval. Raises PageError where a seed is missing."""
    if set(values) != set(seeds):
        raise PageError(f"{what} has the seeds {sorted(values)}, expected {list(seeds)}")
    half = STUDENT_T[len(values)] * statistics.stdev(values.values()) / len(values) ** 0.5
    return f"{statistics.mean(values.values()):.{digits}f} ± {half:.{digits}f}"


Column = tuple[Callable[[Row], float | None], int]  # of a run, and digits; None where a run has no such figure


def study_means(runs: Sequence[Row], columns: dict[str, Column], methods: Iterable[str]) -> list[list[str]]:
    """A line a method: means over the seeds of each column, a dash where a method has no such figure. Raises PageError."""
    from methods import SEEDS  # experiments/methods.py

    lines = []
    for method in methods:
        mine, line = [run for run in runs if run["method"] == method], [method]
        for value, digits in columns.values():
            known = {run["seed"]: found for run in mine if (found := value(run)) is not None}
            line.append("–" if mine and not known else mean_of(known, SEEDS, method, digits))
        lines.append(line)
    return lines


def curve(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """The best perplexity for a time a token: times as shares of full depth's, ascending, and perplexities."""
    points = sorted((1 / row["speedup"], row["ppl"]) for row in rows)
    best = [min(ppl for _, ppl in points[: i + 1]) for i in range(len(points))]
    return [time for time, _ in points], best


def area(rows: Sequence[Row], fastest: float) -> float:
    """Mean perplexity of the curve from `fastest` to full depth's time: the area under it over its width."""
    times = np.linspace(fastest, 1.0, 501)
    return float(np.interp(times, *curve(rows)).mean())


def exits_early(run: Row) -> bool:
    return len(run["rows"]) > 1


def least_depth(run: Row, tolerance: float, criterion: str | None = None) -> float | None:
    """The least mean depth whose perplexity is at most so much above full depth's (0.05: 5 %), by one criterion or the best of them."""
    if not exits_early(run):
        return None
    points = [point for point in run["criteria"] if criterion in (None, point["criterion"])]
    full = {"ppl_ratio": 1.0, "mean_depth": run["rows"][0]["mean_depth"]}
    return min(point["mean_depth"] for point in [full, *points] if point["ppl_ratio"] <= 1 + tolerance)


def best_speed(run: Row, tolerance: float, rows: str = "rows") -> float | None:
    """The largest measured speed-up at a perplexity that is at most so much above full depth's; `gate_rows` are those of the gate."""
    return max(row["speedup"] for row in run[rows] if row["ppl_ratio"] <= 1 + tolerance) if exits_early(run) else None


SPEEDS: dict[str, Column] = {
    "max-prob, 1 %": (partial(best_speed, tolerance=0.01), 2),
    "max-prob, 5 %": (partial(best_speed, tolerance=0.05), 2),
    "gate, 1 %": (partial(best_speed, tolerance=0.01, rows="gate_rows"), 2),
    "gate, 5 %": (partial(best_speed, tolerance=0.05, rows="gate_rows"), 2),
}


def trials_table(runs: Sequence[Row], names: Iterable[str]) -> str:
    """Validation perplexity at full depth of the runs that chose the learning rates."""
    tried = {run["method"]: run["trials"] for run in runs}
    return table(["", *runs[0]["trials"]], [[name, *(f"{ppl:.1f}" for ppl in tried[name].values())] for name in names])


def methods_tables() -> dict[str, str]:
    """Means over three seeds."""
    from methods import CRITERIA, METHODS  # experiments/methods.py

    runs, names = load("methods.json")["runs"], list(METHODS.methods)
    early = [name for name, method in METHODS.methods.items() if method.early]
    fastest = max(curve(run["rows"])[0][0] for run in runs if exits_early(run))
    columns: dict[str, Column] = {
        "perplexity": (lambda run: run["rows"][0]["ppl"], 2),
        f"mean of the curve from {fastest:.2f}": (lambda run: area(run["rows"], fastest) if exits_early(run) else None, 2),
        "depth at 1 %": (lambda run: least_depth(run, 0.01), 2),
        "depth at 5 %": (lambda run: least_depth(run, 0.05), 2),
        **SPEEDS,
    }
    layers: dict[str, Column] = {
        f"layer {layer}": (partial(lambda run, layer: run["validation"].get(layer), layer=str(layer)), 2) for layer in (3, 6, 9)
    }
    by_criterion: dict[str, Column] = {name: (partial(least_depth, tolerance=0.05, criterion=name), 2) for name in CRITERIA}
    rates = {run["method"]: f"{run['learning_rate']:g}" for run in runs}
    minutes: Column = (lambda run: run["minutes"], 1)
    exits = study_means(runs, {**layers, "minutes": minutes}, names)
    return {
        "methods": table(["method", *columns], study_means(runs, columns, names)),
        "exits": table(["method", "learning rate", *layers, "minutes"], [[name, rates[name], *line] for name, *line in exits]),
        "criteria": table(["method", *by_criterion], study_means(runs, by_criterion, early)),
        "routed": routed_table(runs, early),
        "trials": trials_table(runs, names),
    }


ROUTED = "Mixture-of-Depths"


def routed_table(runs: Sequence[Row], early: Sequence[str]) -> str:
    """Mixture-of-Depths beside early exits that leave as deep as it runs layers, or take as long."""
    routed = {run["seed"]: run["rows"][0] for run in runs if run["method"] == ROUTED}

    def at_its_depth(run: Row) -> float | None:
        limit = routed[run["seed"]]["layers_run"]
        return float(run["rows"][0]["ppl"] * min(point["ppl_ratio"] for point in run["criteria"] if point["mean_depth"] <= limit))

    def at_its_time(run: Row) -> float | None:
        speed = routed[run["seed"]]["tokens_per_second"]
        return min((float(row["ppl"]) for row in run["rows"] if row["tokens_per_second"] >= speed), default=None)

    columns: dict[str, Column] = {
        "perplexity": (lambda run: run["rows"][0]["ppl"], 2),
        "layers run": (lambda run: run["rows"][0]["layers_run"], 2),
        "tokens/s": (lambda run: run["rows"][0]["tokens_per_second"], 0),
        "at its depth": (lambda run: at_its_depth(run) if exits_early(run) else None, 2),
        "at its time": (lambda run: at_its_time(run) if exits_early(run) else None, 2),
    }
    return table(["method", *columns], study_means(runs, columns, ["standard", ROUTED, *early]))


def depth_tables() -> dict[str, str]:
    """Means over three seeds; the first early exit is at a third of the layers, the second at two thirds."""
    from methods import DEPTH  # experiments/methods.py

    runs, names = load("depth.json")["runs"], list(DEPTH.methods)

    def exit_at(run: Row, third: int) -> float:
        return float(run["exits"][third - 1]["ppl"] / run["exits"][-1]["ppl"] - 1) * 100

    def share(run: Row, tolerance: float) -> float | None:
        depth = least_depth(run, tolerance)
        return depth and 100 * depth / run["rows"][0]["mean_depth"]

    columns: dict[str, Column] = {
        "perplexity": (lambda run: run["rows"][0]["ppl"], 2),
        "at a third, % more": (partial(exit_at, third=1), 1),
        "at two thirds": (partial(exit_at, third=2), 1),
        "depth at 1 %, % of the layers": (partial(share, tolerance=0.01), 1),
        "depth at 5 %": (partial(share, tolerance=0.05), 1),
        **SPEEDS,
        "bound at a third": (lambda run: next(row["speedup"] for row in run["rows"] if row["threshold"] == 0.0), 2),
    }
    return {"depth": table(["layers", *columns], study_means(runs, columns, names)), "trials": trials_table(runs, names)}


def along_the_sequence(rows: Sequence[Row]) -> str:
    """Perplexity over full depth's in each stretch of the sequences, and mean depth."""
    rows = [named(row) for row in rows]
    stretches = dict.fromkeys(f"{row['from']}–{row['to']}" for row in rows)
    full = {row["to"]: row["ppl"] for row in rows if row["threshold"] is None}
    lines = []
    for setting in dict.fromkeys((row["named"], row["catch_up"]) for row in rows if row["threshold"] is not None):
        mine = [row for row in rows if (row["named"], row["catch_up"]) == setting]
        lines.append([*setting, *(f"{100 * (row['ppl'] / full[row['to']] - 1):+.1f} % at {row['mean_depth']:.1f}" for row in mine)])
    return table(["threshold", "catch-up", *stretches], lines, 2)


def catch_up_tables() -> dict[str, str]:
    """Perplexity over full depth's by position, and times by length."""
    found = load("catch-up.json")
    speed, times = [named(row) for row in found["speed"]["rows"]], []
    lengths = list(dict.fromkeys(row["length"] for row in speed))
    for setting in dict.fromkeys((row["named"], row["catch_up"]) for row in speed if row["threshold"] is not None):
        mine = [row for row in speed if (row["named"], row["catch_up"]) == setting]
        times.append([*setting, *(f"{row['speedup']:.2f} ({row['speedup_range'][0]:.2f}–{row['speedup_range'][1]:.2f})" for row in mine)])
    off = [row for row in speed if row["threshold"] is None]
    times.insert(0, ["off, tokens/s", "", *(f"{row['tokens_per_second']:.0f}" for row in off)])
    verified = [row for row in speed if row["catch_up"] == "verify"]
    drafts = [
        [name, *(f"{row['accepted']} of {row['drafted']}" for row in verified if row["named"] == name)]
        for name in dict.fromkeys(row["named"] for row in verified)
    ]
    return {
        "quality": along_the_sequence(found["quality"]["rows"]),
        "unprepared": along_the_sequence(found["unprepared"]["rows"]),
        "speed": table(["threshold", "catch-up", *map(str, lengths)], times, 2),
        "drafts": table(["threshold", *map(str, lengths)], drafts),
    }


def original_tables() -> dict[str, str]:
    """Means over the seeds, with 95 % intervals of the mean (Student's t)."""
    from original import COMPARED, EXTREMES, FEW_SEEDS, METHODS, ORIGINAL, OVERFITTED, SEEDS  # experiments/original.py

    runs = load("original.json")["runs"]

    def mean(method: str, protocol: str, value: Callable[[Row], float], digits: int = 2) -> str:
        values = {row["seed"]: value(row) for row in runs if (row["method"], row["protocol"]["name"]) == (method, protocol)}
        return mean_of(values, FEW_SEEDS if protocol == OVERFITTED.name else SEEDS, f"{method} under '{protocol}'", digits)

    at_stop = {(row["method"], row["seed"]): row["epochs"][-1]["ppl"] for row in runs if row["protocol"]["name"] == ORIGINAL.name}

    def above_standard(row: Row) -> float:
        return float(row["epochs"][-1]["ppl"] - at_stop["standard", row["seed"]])

    def first_at_record(row: Row) -> tuple[int, Row]:
        return next((number, epoch) for number, epoch in enumerate(row["epochs"], 1) if epoch["ppl"] <= RECORDED[row["method"]][0])

    def last(figure: str, factor: float = 1.0) -> Callable[[Row], float]:
        return lambda row: factor * row["epochs"][-1][figure]

    first = [
        [
            method,
            f"{RECORDED[method][0]:.2f}",
            mean(method, ORIGINAL.name, last("ppl")),
            "–" if method == "standard" else mean(method, ORIGINAL.name, above_standard),
            mean(method, ORIGINAL.name, lambda row: row["more_validation"]),
            mean(method, ORIGINAL.name, lambda row: row["more_validation_full_depth"]),
            mean(method, ORIGINAL.name, lambda row: len(row["epochs"]), 1),
            mean(method, ORIGINAL.name, last("compute_cost", 100), 1),
        ]
        for method in METHODS
    ]
    header = ["method", "recorded", "at the stop", "above standard", "more text", "at full depth", "epochs", "compute %"]
    levels = [
        [
            method,
            f"{RECORDED[method][0]:.2f}",
            f"{Dash() if RECORDED[method][1] is None else RECORDED[method][1]:.1f}",
            mean(method, ORIGINAL.name, lambda row: first_at_record(row)[0], 1),
            mean(method, ORIGINAL.name, lambda row: 100 * first_at_record(row)[1]["shallow_ratio"], 1),
            mean(method, ORIGINAL.name, last("shallow_ratio", 100), 1),
        ]
        for method in METHODS
    ]
    level_header = ["method", "recorded", "early %, recorded", "epoch of that perplexity here", "early % at it", "early % at the stop"]
    tables = {"original": table(header, first), "levels": table(level_header, levels)}
    names = list(dict.fromkeys(row["protocol"]["name"] for row in runs))
    if (changed := [name for name in names if name != OVERFITTED.name]) != [ORIGINAL.name]:
        rows = [[name, *(mean(method, name, lambda row: row["more_validation"]) for method in COMPARED)] for name in changed]
        tables["changed"] = table(["protocol", *COMPARED], rows)
    if OVERFITTED.name in names:
        columns: dict[str, tuple[Callable[[Row], float], int]] = {
            "best": (lambda row: min(epoch["ppl"] for epoch in row["epochs"]), 2),
            "its epoch": (lambda row: 1 + min(range(len(row["epochs"])), key=lambda epoch: row["epochs"][epoch]["ppl"]), 0),
            "last": (last("ppl"), 2),
            "early %, last": (last("shallow_ratio", 100), 1),
        }
        rows = [[method, *(mean(method, OVERFITTED.name, value, digits) for value, digits in columns.values())] for method in EXTREMES]
        tables["overfitted"] = table(["method", *columns], rows)
    return tables


def only(tables: dict[str, str], name: str) -> dict[str, str]:
    return {name: tables[name]}


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "engine.md": engine_tables,
    "cost-model.md": cost_model_tables,
    "small.md": lambda: only(small_tables(), "gate"),
    "../../README.md": lambda: only(small_tables(), "readme"),
    "../pretrained.md": lambda: only(smollm2_tables(), "answers"),
    "scale.md": scale_tables,
    "precisions.md": precision_tables,
    "original.md": original_tables,
    "smollm2-exits.md": smollm2_tables,
    "methods.md": methods_tables,
    "depth.md": depth_tables,
    "catch-up.md": catch_up_tables,
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
    """Write or check the tables of docs/experiments, and those of them that other pages show."""
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
