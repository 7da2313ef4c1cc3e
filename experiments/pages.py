"""The tables of docs/experiments, and those of them that other pages show, out of the JSON files in
docs/experiments.

    python experiments/pages.py            # writes every table anew
    python experiments/pages.py --check    # exit code 1 where a page says something else than its JSON

In a page a table stands behind a line `<!-- table: NAME -->`. A table of means fails when a row has fewer
seeds than it should have.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import contexts_tables
from tables import FOLDER, FORCED_DEPTHS, PageError, Row, figures, leaves_early, load, measured, named, table
from training_tables import depth_tables, methods_tables, original_tables

NAMED = {"threshold": "{named}", "catch-up": "{catch_up}"}
EXITS_BESIDE = "exits"  # in the names of verify.json whose bundles have them
RANGE = "{speedup_range[0]:.2f}–{speedup_range[1]:.2f}"  # the slowest and the fastest round


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
        "depth": figures(found["depth"], FORCED_DEPTHS, 2),
        "verify": figures(found["verify"], verify),
        "adapt": figures(found["adapt"], adapt),
        "batch": figures(found["batch"], batch, 2),
        **server_and_memory(found),
    }


def server_and_memory(found: Any) -> dict[str, str]:
    """Those of engine.md's tables that are about many rows."""
    scaling = {
        "leave after": "{layer}",
        "rows": "{rows}",
        "tokens/s": "{tokens_per_second:.1f}",
        "over one row": "{over_one_row:.2f}",
    }
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
    return {"gate": figures(rows, columns, 2)}


def code_tables() -> dict[str, str]:
    """The gates of the model of code, with plain models beside them in the same rounds."""
    columns = {
        **NAMED,
        "perplexity": "{ppl:.2f}",
        "vs off": "{change:+.1f} %",
        "95 %": "{ppl_ratio_interval[0]:.3f}–{ppl_ratio_interval[1]:.3f}",
        "mean depth": "{mean_depth:.2f}",
        "tokens/s": "{tokens_per_second:.0f}",
        "speed-up": "{speedup:.2f}",
        "range": RANGE,
    }
    found = load("code.json")
    two = load("code-two-segments.json")
    rows = [measured(row) for row in found["rows"]]
    plain = [beside_row(row) for row in found["beside"]]
    rows_of_two = [*map(measured, two["rows"]), *map(beside_row, two["beside"])]
    exits = {"layer": "{layer}", "perplexity": "{ppl:.2f}", "says what full depth says": "{agreement:.3f}"}
    shipped = load("code-shipped.json")
    completions = {
        "model": "{bundle}",
        "threshold": "{threshold}",
        "mean depth": "{mean_depth:.2f}",
        "rest of a line as in the file": "{same_lines:.3f}",
        "functions that end": "{ended:.2f}",
        "of those, valid": "{valid:.2f}",
    }
    drafts = {
        "drafts": "{mode}",
        "speed-up": "{speedup:.2f}",
        "95 %": "{interval[0]:.2f}–{interval[1]:.2f}",
        "before a loop": "{speedup_before:.2f}",
        "slowest prompt": "{lowest:.2f}",
        "accepted": "{acceptance:.2f}",
        "share of the tokens": "{share:.2f}",
        "of them the exit's": "{share_of_exits:.2f}",
    }
    packages = {
        "package": "{package}",
        "files": "{num_documents}",
        "ease:code, off": "{off:.2f}",
        "threshold 0.5": "{early:.2f}",
        "mean depth": "{depth:.2f}",
        **{f"plain, {layers}": f"{{plain{layers}:.2f}}" for layers in (6, 8, 12)},
    }
    return {
        "code": figures([*rows, *plain], columns, 2),
        "code-two": figures(rows_of_two, columns, 2),
        "code-exits": figures(found["exits"], exits),
        "code-shipped": figures(
            [*map(measured, shipped["rows"]), *map(beside_row, shipped["beside"])], columns, 2
        ),
        "code-shipped-exits": figures(shipped["exits"], exits),
        "code-completions": figures(load("code-completions.json"), completions, 2),
        "code-drafts": figures(load("code-drafts.json"), drafts),
        "code-packages": figures(load("code-packages.json"), packages),
    }


def chosen_rows(found: Row) -> str:
    """README's table: of the measured settings the fastest lossless one, the fastest within 1 and within 5 %,
    and the plain smaller model whose speed is next to the last one's. A setting has a column.
    """
    rows = [measured(row) for row in found["rows"]]
    lossy = [row for row in rows if row["catch_up"] in ("propagate", "recompute")]
    lossless = max((row for row in rows if row["catch_up"] == "verify"), key=speed)
    within = [max((row for row in lossy if row["change"] <= limit), key=speed) for limit in (1, 5)]
    smaller = (beside_row(row) for row in found["beside"] if row["num_layers"] < found["exits"][-1]["layer"])
    plain = min(smaller, key=lambda row: abs(math.log(speed(row) / speed(within[-1]))))
    asked = "{named}, {catch_up}"
    columns = {
        "off": {**rows[0], "asked": "–"},
        "lossless": {**lossless, "asked": asked.format(**lossless)},
        "≤ 1 %": {**within[0], "asked": asked.format(**within[0])},
        "≤ 5 %": {**within[1], "asked": asked.format(**within[1])},
        plain["named"]: {**plain, "asked": "–"},
    }
    lines = {
        "threshold, catch-up": "{asked}",
        "perplexity": "{ppl:.2f}",
        "over off": "{change:+.1f} %",
        "tokens/s": "{tokens_per_second:.0f}",
        "speed-up": "{speedup:.2f}",
        "range": RANGE,
    }
    cells = [[name, *(form.format(**row) for row in columns.values())] for name, form in lines.items()]
    return table(["", *columns], cells)


def speed(row: Row) -> float:
    """Tokens a second."""
    return float(row["tokens_per_second"])


def beside_row(row: Row) -> Row:
    """A plain model's row like those of the model it stands beside."""
    layers = row["num_layers"]
    named = {"named": f"plain, {layers} layers", "catch_up": "–", "mean_depth": layers}
    return {**row, **named, "change": 100 * (row["ppl_ratio"] - 1)}


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
        return ", ".join(
            f"{100 * values[key]:.{digits}f}" for layer, values in exits.items() if layer in LAYERS
        )

    rows = []
    for name, kinds in found.items():
        exits = kinds[kind]
        each = [
            f"{100 * exits[layer]['agreement']:.1f} "
            f"({100 * exits[layer]['interval'][0]:.1f}–{100 * exits[layer]['interval'][1]:.1f})"
            for layer in LAYERS
        ]
        perplexities = (
            [] if first_round else [", ".join(perplexity(values["perplexity"]) for values in exits.values())]
        )
        rows.append(
            [
                KINDS[name],
                *each,
                percent(exits, "confident_half"),
                percent(exits, "confident_quarter"),
                *perplexities,
            ]
        )
    header = ["exits", *(f"layer {layer}" for layer in LAYERS), "confident half", "confident quarter"]
    return table([*header, *([] if first_round else ["perplexity (10, 15, 20, 30)"])], rows)


def curve_table(runs: dict[str, Any]) -> str:
    """Agreement on validation text in the course of each run, in percent at each layer."""
    steps = sorted({line["step"] for run in runs.values() for line in run["evaluations"]})
    rows = []
    for step in steps:
        lines = [
            next((line["agreement"] for line in run["evaluations"] if line["step"] == step), None)
            for run in runs.values()
        ]
        rows.append(
            [
                str(step),
                *(
                    "–" if line is None else ", ".join(f"{100 * line[layer]:.1f}" for layer in LAYERS)
                    for line in lines
                ),
            ]
        )
    return table(["step", *(KINDS[name] for name in runs)], rows)


def distilled_table() -> str:
    """Block exits before and after distillation, on the text of the speed tables: agreement in percent,
    perplexity.
    """
    rows = []
    for kind, text in TEXTS.items():
        for exits, name in (("block", "block"), ("distilled", "then distilled")):
            each = load(f"smollm2-speed-{exits}-{kind}.json")["exits"]
            agreements = (f"{100 * one['agreement']:.1f}" for one in each[:-1])
            rows.append([text, name, *agreements, ", ".join(perplexity(one["ppl"]) for one in each)])
    return table(
        ["text", "exits", *(f"layer {layer}" for layer in LAYERS), "perplexity (10, 15, 20, 30)"], rows, 2
    )


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
    found = load("smollm2-exits.json")
    first = load("smollm2-first-round.json")
    speeds = {}
    for name in (*(f"{exits}-{kind}" for exits in ("distilled", "block") for kind in TEXTS), "low-rank"):
        rows = [measured(row) for row in load(f"smollm2-speed-{name}.json")["rows"]]
        shares = [
            {"share": f"{row['accepted']} of {row['drafted']}" if row["drafted"] else None} for row in rows
        ]
        speeds[f"speed-{name}"] = figures(
            ({**row, **share} for row, share in zip(rows, shares, strict=True)), columns, 2
        )
    peers = {
        "runtime": "{runtime}",
        "weights": "{precision}",
        "tokens/s": "{tokens_per_second:.1f}",
        "EASE at full depth is": "{ease_over_this:.2f}",
        "first token ms": "{first_token_ms:.0f}",
        "resident MB": "{resident_mb:.0f}",
    }
    speeds |= {
        f"peers-{name}": figures(load(f"smollm2-peers-{name}.json")["rows"], peers, 2)
        for name in ("int8", "int4")
    }
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
        "precisions": figures(
            ({**row, "change": 100 * (row["ppl"] / full[row["model"]] - 1)} for row in rows), columns, 3
        ),
        "tried": figures(load("precisions-tried.json")["rows"], tried, 2),
        **weight_tables(),
    }


def drafts_tables() -> dict[str, str]:
    found = load("verify.json")
    speeds = {
        "speed-up": "{speedup:.2f}",
        "95 %": "{interval[0]:.2f}–{interval[1]:.2f}",
        "slowest": "{lowest:.2f}",
        "accepted": "{acceptance:.2f}",
        "share of the tokens": "{share:.2f}",
        "ceiling": "{ceiling:.2f}",
        "of it": "{of_ceiling:.2f}",
    }
    columns = {
        "weights": "{name}",
        "prompts": "{kind}",
        "number": "{prompts}",
        "same texts": "{same}",
        "tokens": "{tokens}",
        "before a loop": "{before}",
        "speed-up before": "{speedup_before:.2f}",
        "95 % of that": "{interval_before[0]:.2f}–{interval_before[1]:.2f}",
        **speeds,
        "off, tokens/s": "{off_tokens_per_second:.1f}",
    }
    exits = {
        "bundle": "{name}",
        "prompts": "{kind}",
        "--draft": "{mode}",
        "number": "{prompts}",
        "same texts": "{same}",
        "speed-up before": "{speedup_before:.2f}",
        **speeds,
        "of exits": "{share_of_exits:.3f}",
    }
    edits = {"weights": "{name}", "edit": "{kind}", "number": "{prompts}", **speeds}
    plain = [row for row in found["rows"] if EXITS_BESIDE not in row["name"]]
    beside = [row for row in found["rows"] if EXITS_BESIDE in row["name"]]
    priced = {name: prices for name, prices in found["all_accepted"].items() if EXITS_BESIDE not in name}
    counts = list(next(iter(priced.values())))
    return {
        "drafts": figures(plain, columns, 2),
        "edits": figures(found["edits"], edits, 2),
        "prices": table(
            ["weights", *counts],
            [[name, *(f"{prices[count]:.2f}" for count in counts)] for name, prices in priced.items()],
            1,
        ),
        "beside": figures(beside, exits, 3),
        "lookups": lookup_table(),
        "one-billion": one_billion_table(),
    }


def lookup_table() -> str:
    """Runtimes with drafts from text and without: how many times faster EASE with them is."""
    lines = []
    for precision in ("fp32", "int4"):
        rows = load(f"verify-peers-{precision}.json")["rows"]
        ours = next(row for row in rows if row["runtime"] == "ease, drafts from text")
        lines += [
            {**row, "bundle": precision, "ratio": ours["tokens_per_second"] / row["tokens_per_second"]}
            for row in rows
            if row["error"] is None
        ]
    columns = {
        "EASE's bundle": "{bundle}",
        "runtime": "{runtime}",
        "weights": "{precision}",
        "tokens/s": "{tokens_per_second:.1f}",
        "EASE with drafts is": "{ratio:.2f}",
        "texts as EASE's": "{same_texts:.2f}",
    }
    return figures(lines, columns, 3)


def one_billion_table() -> str:
    columns = {
        "head that drafts": "{head}",
        "acceptance": "{acceptance:.1f}",
        "as it fell": "{accepted:.2f}",
        "drafts": "{draft_length}",
        "a draft, ms": "{draft_ms:.1f}",
        "its head, ms": "{head_ms:.1f}",
        "full depth, ms": "{full_depth_ms:.1f}",
        "speed-up": "{speedup:.2f}",
        "range": "{range[0]:.2f}–{range[1]:.2f}",
        "cost model": "{model_speedup:.2f}",
        "break-even": "{break_even_acceptance:.2f}",
    }
    found = load("verify-1b.json")
    return figures(({"head": head, **row} for head, rows in found.items() for row in rows), columns)


def weight_tables() -> dict[str, str]:
    """Forms of weights and ways to round, by perplexity and time."""
    found = load("weight-rounding.json")
    full = found["rows"][0]["ppl"]
    forms = {
        "weights": "{weights}",
        "perplexity": "{ppl:.2f}",
        "vs fp32": "{change:+.1f} %",
        "MB": "{bundle_mb:.0f}",
    }
    forms |= {f"{count} tokens, ms": f"{{n{count}}}" for count in ("1", "2", "8", "64", "256")}
    rows = [
        {**row, "change": 100 * (row["ppl"] / full - 1), **PENDING, **in_ms(row["milliseconds"] or {})}
        for row in found["rows"]
    ]
    roundings = {
        "rounding": "{rounding}",
        "text": "{text}",
        "perplexity": "{ppl:.2f}",
        "vs fp32": "{change:+.1f} %",
    }
    products = load("weight-forms.json")["rows"]
    today = {tuple(row["shape"]): row["microseconds"] for row in products if row["form"] == "4 32 zeros"}
    columns = {"inputs, outputs": "{place}", "bits, block": "{form}"}
    columns |= {f"{count} rows": f"{{n{count}}}" for count in ("1", "2", "4", "8", "64", "256")}
    return {
        "forms": figures(rows, forms, 1),
        "roundings": figures(found["tried"], roundings, 2),
        "products": figures(
            (
                {
                    **row,
                    "place": f"{row['shape'][0]}, {row['shape'][1]}",
                    **{
                        f"n{n}": f"{us / today[tuple(row['shape'])][n]:.2f}"
                        for n, us in row["microseconds"].items()
                    },
                    "bits": ", ".join(str(n) for n in row["other_bits_at"]) or "–",
                }
                for row in products
            ),
            {**columns, "other bits at": "{bits}"},
            2,
        ),
    }


PENDING = {f"n{count}": "–" for count in (1, 2, 8, 64, 256)}  # of what was not timed


def in_ms(found: Row) -> Row:
    """Milliseconds by number of tokens, as a table's row has them."""
    return {f"n{count}": f"{ms:.1f}" for count, ms in found.items()}


def along_the_sequence(rows: Sequence[Row]) -> str:
    """Perplexity over full depth's in each stretch of the sequences, and mean depth."""
    rows = [named(row) for row in rows]
    stretches = dict.fromkeys(f"{row['from']}–{row['to']}" for row in rows)
    full = {row["to"]: row["ppl"] for row in rows if not leaves_early(row)}
    lines = []
    for setting in dict.fromkeys((row["named"], row["catch_up"]) for row in rows if leaves_early(row)):
        mine = [row for row in rows if (row["named"], row["catch_up"]) == setting]
        lines.append(
            [
                *setting,
                *(
                    f"{100 * (row['ppl'] / full[row['to']] - 1):+.1f} % at {row['mean_depth']:.1f}"
                    for row in mine
                ),
            ]
        )
    return table(["threshold", "catch-up", *stretches], lines, 2)


def catch_up_tables() -> dict[str, str]:
    """Perplexity over full depth's by position, and times by length."""
    found = load("catch-up.json")
    speed = [named(row) for row in found["speed"]["rows"]]
    times = []
    lengths = list(dict.fromkeys(row["length"] for row in speed))
    for setting in dict.fromkeys((row["named"], row["catch_up"]) for row in speed if leaves_early(row)):
        mine = [row for row in speed if (row["named"], row["catch_up"]) == setting]
        times.append(
            [
                *setting,
                *(
                    f"{row['speedup']:.2f} ({row['speedup_range'][0]:.2f}–{row['speedup_range'][1]:.2f})"
                    for row in mine
                ),
            ]
        )
    off = [row for row in speed if not leaves_early(row)]
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


def only(tables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: tables[name] for name in names}


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "engine.md": engine_tables,
    "cost-model.md": cost_model_tables,
    "small.md": small_tables,
    "code.md": code_tables,
    "../../README.md": lambda: (
        {"readme": chosen_rows(load("code-shipped.json"))} | only(contexts_tables.tables(), "contexts-int4")
    ),
    "contexts.md": contexts_tables.tables,
    "../pretrained.md": lambda: only(smollm2_tables(), "answers"),
    "scale.md": scale_tables,
    "precisions.md": precision_tables,
    "verify.md": drafts_tables,
    "original.md": original_tables,
    "smollm2-exits.md": smollm2_tables,
    "methods.md": methods_tables,
    "depth.md": depth_tables,
    "catch-up.md": catch_up_tables,
}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n+)((?:\|.*\n)*)\n*")


def with_tables(page: str, text: str, tables: dict[str, str]) -> str:
    """The page with its tables as they should be.

    Raises PageError for a marker without a table, or the other way round.
    """
    named = [name for _, name, _ in MARKED.findall(text)]
    if sorted(named) != sorted(tables):
        raise PageError(f"{page} has the tables {sorted(named)}, its JSON gives {sorted(tables)}")
    return (
        MARKED.sub(lambda match: f"<!-- table: {match[2]} -->\n\n{tables[match[2]]}\n\n", text).rstrip("\n")
        + "\n"
    )


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
