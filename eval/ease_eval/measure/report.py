"""One self-contained HTML file of a bundle's measurements: figures, tables, a passage coloured by depth,
where it all comes from.

    make_report(llm, table, documents, Path("report.html"))

Nothing in it is loaded from elsewhere. Beside it, the figures as PNG and SVG.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from ease_eval.measure.figures import (
    by_position,
    depth_shares,
    drawn,
    pareto,
    reliability,
    row_label,
    save,
    svg,
)
from ease_eval.measure.reliability import measure_reliability
from ease_eval.measure.table import COLUMNS, POSITION_BIN, Table, TableRow, batch_cells, cells
from ease_runtime.cli.show import drafts_line
from ease_runtime.generation import Completion
from ease_runtime.llm import LLM
from ease_runtime.options import Options

TITLES = {
    "perplexity-speed": "What it costs and what it saves",
    "depth-shares": "Where tokens leave",
    "depth-by-position": "Depth along a text",
    "reliability": "Does the confidence mean what it says?",
}
TIME_COLUMNS = (
    "setting",
    "speed-up",
    "GB/s",
    "heads",
    "engine",
    "layers run",
    "prefill ms",
    "p99 ms",
    "drafts accepted",
)
PROMPT_TOKENS = 24
PASSAGE_TOKENS = 120
BINS = 16  # at most, along a text
# Tints of the early exits' and the last layer's passages, light and dark, in the order of depth.
TINTS = (
    ("#b6e3ff", "#0c4a7c"),
    ("#ffe2a8", "#6e4400"),
    ("#c8f2cd", "#1b5227"),
    ("#e9d5ff", "#4c2889"),
    ("#ffd1dc", "#79213c"),
    ("#e5e7eb", "#343b43"),
)


def make_report(llm: LLM, table: Table, documents: Sequence[Sequence[int]], out: Path) -> str:
    """The report's text; its figures go to a folder beside `out`. Reliability is measured on `documents`, one
    of whose beginnings is gone on with.
    """
    rows = table.rows
    along, width = depths_along(rows)
    found = measure_reliability(llm.engine, documents, rows[0].policy)
    draws = {
        "perplexity-speed": pareto(rows),
        "depth-shares": depth_shares(rows),
        "depth-by-position": by_position(along, width),
        "reliability": reliability(found),
    }
    if len(rows) == 1:
        del draws["perplexity-speed"]
    if not found:
        del draws["reliability"]
    if not along:
        del draws["depth-by-position"]
    save(draws, out.with_suffix(""))
    prompt = documents[0][:PROMPT_TOKENS]
    passages = [passage(llm, prompt, row) for row in rows]
    depths = llm.stack.exit_layers
    tints = dict(zip(reversed(llm.stack.exit_layers), reversed(TINTS), strict=False))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ease_eval.measure", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        table=table,
        columns=COLUMNS,
        cells=[cells(row) for row in rows],
        names=[row_label(row) for row in rows],
        said=[describe(row) for row in rows],
        prompt=llm.tokenizer.decode(list(prompt)),
        passages=passages,
        time_columns=TIME_COLUMNS,
        times=[time_cells(row) for row in rows],
        batches=[batch_cells(one) for one in table.batches],
        certificate=llm.manifest.calibration,
        drafts=[
            drafts_line(one.timing.drafts, len(one.tokens)) if one.timing.num_drafted else ""
            for one in passages
        ],
        figures={
            TITLES[name]: [svg(drawn(draw, dress)) for dress in ("light", "dark")]
            for name, draw in draws.items()
        },
        colours={depth: tints.get(depth, TINTS[-1]) for depth in depths},
    )


def describe(row: TableRow) -> str:
    """A setting's figures in a line."""
    return (
        f"perplexity {row.ppl:.2f} ({100 * (row.ppl_ratio - 1):+.1f} %), {row.speedup:.2f}x as fast "
        f"({row.speedup_range[0]:.2f} to {row.speedup_range[1]:.2f}), {row.mean_depth:.2f} layers a token"
    )


def time_cells(row: TableRow) -> list[str]:
    """A row as the texts of TIME_COLUMNS."""
    return [
        row_label(row),
        f"{row.speedup:.2f}x ({row.speedup_range[0]:.2f}–{row.speedup_range[1]:.2f})",
        f"{row.gb_per_second:.1f}",
        f"{row.head_share:.0%}",
        f"{row.engine_efficiency:.0%}",
        f"{row.layers_run:.2f}",
        f"{row.prefill_ms_p50:.1f}",
        f"{row.latency_ms_p99:.2f}",
        f"{row.accepted} of {row.drafted}" if row.drafted else "–",
    ]


def passage(llm: LLM, prompt: Sequence[int], row: TableRow) -> Completion:
    """A greedy continuation under a row's setting."""
    room = llm.stack.max_positions - len(prompt)
    options = Options(
        max_tokens=min(PASSAGE_TOKENS, room),
        policy=row.policy,
        threshold=row.threshold,
        catch_up=row.catch_up,
    )
    return llm.complete(list(prompt), options)


def depths_along(rows: Sequence[TableRow]) -> tuple[dict[str, list[float]], int]:
    """Mean depth along the scored texts for every setting but off (for off where it is alone), in up to BINS
    parts, and the positions of a part. verify has none: full depth says what it says.
    """
    shown = [row for row in rows[1:] or rows if row.depth_by_position]
    group = -(-max((len(row.depth_by_position) for row in shown), default=1) // BINS)
    return {
        row_label(row): [
            float(np.mean(row.depth_by_position[start : start + group]))
            for start in range(0, len(row.depth_by_position), group)
        ]
        for row in shown
    }, group * POSITION_BIN
