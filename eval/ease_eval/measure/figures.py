"""Figures of a table, for a report and for papers: matplotlib, in a light and a dark dress, as SVG text or
files.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ease_common.files import write_whole
from ease_eval.measure.reliability import Reliability
from ease_eval.measure.table import TableRow

matplotlib.use("svg")

DRESSES = {
    "light": {
        "ink": "#1f2328",
        "grid": "#d0d7de",
        "colours": ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989"),
    },
    "dark": {
        "ink": "#e6edf3",
        "grid": "#3d444d",
        "colours": ("#58a6ff", "#ffa657", "#3fb950", "#d2a8ff", "#ff7b72"),
    },
}
SIZE = (6.2, 3.8)  # inches

Draw = Callable[[Any, tuple[str, ...]], None]  # axes, colours


def drawn(draw: Draw, dress: str) -> Figure:
    """A figure with one pair of axes, in a dress."""
    ink = str(DRESSES[dress]["ink"])
    grid = str(DRESSES[dress]["grid"])
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink)
    for spine in axes.spines.values():
        spine.set_color(grid)
    draw(axes, tuple(DRESSES[dress]["colours"]))
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(ink)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set_alpha(0.0)
        for text in legend.get_texts():
            text.set_color(ink)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ease", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def save(figures: dict[str, Draw], folder: Path) -> None:
    """Each figure as PNG and SVG, light, for papers. Raises RequestError where they cannot be written."""
    for name, draw in figures.items():
        write_whole(folder / f"{name}.svg", svg(drawn(draw, "light")))
        write_whole(folder / f"{name}.png", png(drawn(draw, "light")))


def pareto(rows: Sequence[TableRow]) -> Draw:
    """Perplexity (relative to off, 95 % intervals) against measured speed-up (range over rounds), a line a
    catch-up.
    """

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        for colour, catch_up in zip(colours, dict.fromkeys(row.catch_up for row in rows[1:]), strict=False):
            mine = sorted((row for row in rows[1:] if row.catch_up == catch_up), key=lambda row: row.speedup)
            speed = np.array([row.speedup for row in mine])
            cost = np.array([100 * (row.ppl_ratio - 1) for row in mine])
            across = np.abs(np.array([row.speedup_range for row in mine]).T - speed)
            up = np.abs(100 * (np.array([row.ppl_ratio_interval for row in mine]).T - 1) - cost)
            axes.errorbar(
                speed,
                cost,
                xerr=across,
                yerr=up,
                color=colour,
                marker="o",
                capsize=3,
                linewidth=1.2,
                label=catch_up,
            )
        axes.plot([1.0], [0.0], marker="s", color=colours[-1], linestyle="none", label="off")
        axes.set_xlabel("measured speed-up over full depth")
        axes.set_ylabel("perplexity, % more")
        axes.legend()

    return draw


def depth_shares(rows: Sequence[TableRow]) -> Draw:
    """The share of the tokens at each depth, a bar a threshold."""

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        depths = sorted({depth for row in rows for depth in row.depth_counts})
        left = np.zeros(len(rows))
        for i, depth in enumerate(depths):
            share = np.array(
                [row.depth_counts.get(depth, 0) / sum(row.depth_counts.values()) for row in rows]
            )
            axes.barh(
                range(len(rows)), share, left=left, color=colours[i % len(colours)], label=f"layer {depth}"
            )
            left += share
        axes.set_yticks(range(len(rows)), [row_label(row) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("share of the tokens that left after a layer")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(depths))

    return draw


def by_position(depths: dict[str, list[float]], width: int) -> Draw:
    """Mean depth along a text, in bins of `width` positions, a line a setting."""

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        for i, (name, means) in enumerate(depths.items()):
            axes.plot(
                np.arange(len(means)) * width + width / 2,
                means,
                color=colours[i % len(colours)],
                marker=".",
                label=name,
            )
        axes.set_xlabel("position in the text")
        axes.set_ylabel("mean depth, layers")
        axes.legend()

    return draw


def reliability(found: Sequence[Reliability]) -> Draw:
    """How often full depth agrees, against what an exit's confidence says."""

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        axes.plot([0, 1], [0, 1], color=colours[-1], linestyle="--", linewidth=1)
        for i, exit_ in enumerate(found):
            label = (
                f"layer {exit_.layer}: ECE {exit_.error:.3f}, at T = {exit_.temperature:.2f} "
                f"{exit_.scaled_error:.3f}"
            )
            axes.plot(
                exit_.confidence, exit_.agreement, color=colours[i % len(colours)], marker="o", label=label
            )
        axes.set_xlabel("confidence")
        axes.set_ylabel("agreement with full depth")
        axes.legend()

    return draw


def row_label(row: TableRow) -> str:
    """A setting in a few characters."""
    if not row.threshold:
        return "off"
    return f"{row.catch_up} {row.threshold}"
