"""The figures of docs/experiments, out of the JSON files beside them.

    # draws every figure anew
    python experiments/plots.py
    # exit code 1 where one was drawn from other figures, or no page shows it
    python experiments/plots.py --check

A figure's first line holds the SHA-256 of the JSON files it was drawn from.
"""

import hashlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from original import FEW_SEEDS, OVERFITTED
from pages import KINDS, LAYERS, TEXTS
from tables import FOLDER, Row, interval, leaves_early, load, named
from training_tables import MORE_TEXT, RECORDED, STOP_TEXT, Originals, exits_early

from ease_eval.measure.figures import Draw, drawn, svg


@dataclass(frozen=True)
class Plot:
    """A figure: the page that shows it, the files it comes from, and how they are drawn."""

    page: str
    sources: tuple[str, ...]
    draw: Callable[..., Draw]  # of what is in the files

    @property
    def digest(self) -> str:
        """Of its sources."""
        return hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in self.sources)).hexdigest()


MARKERS = {"recompute": "o", "propagate": "s", "verify": "^"}


def trade(tables: dict[str, Sequence[Row]]) -> Draw:
    """Perplexity against measured speed-up: a colour a table, a mark a catch-up; bars are the range over
    rounds.
    """

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        for colour, (name, rows) in zip(colours, tables.items(), strict=False):
            for catch_up, marker in MARKERS.items():
                mine = [row for row in rows if leaves_early(row) and row["catch_up"] == catch_up]
                if not mine:
                    continue
                x = [row["speedup"] for row in mine]
                y = [100 * (row["ppl_ratio"] - 1) for row in mine]
                label = catch_up if name == catch_up else f"{name}, {catch_up}"
                across = [
                    [abs(row["speedup_range"][side] - row["speedup"]) for row in mine] for side in (0, 1)
                ]
                axes.errorbar(
                    x,
                    y,
                    xerr=across,
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    elinewidth=0.7,
                    label=label,
                )
        axes.plot(
            [1.0], [0.0], marker="*", markersize=12, color=colours[-1], linestyle="none", label="full depth"
        )
        axes.set_xlabel("measured speed-up over full depth")
        axes.set_ylabel("perplexity, % more")
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return draw


def beside(pairs: dict[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Draw:
    """Points around the diagonal."""

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        values = [value for points in pairs.values() for point in points for value in point]
        ends = [0.95 * min(values), 1.05 * max(values)]
        axes.plot(ends, ends, color=colours[-1], linestyle="--", linewidth=1)
        for colour, (label, points) in zip(colours, pairs.items(), strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", linestyle="none", label=label)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend()

    return draw


def small(table: Row) -> Draw:
    return trade(
        {catch_up: [row for row in table["rows"] if row["catch_up"] == catch_up] for catch_up in MARKERS}
    )


def engine(found: Row) -> Draw:
    pairs = {
        "every token leaves at one exit": [(row["ideal_speedup"], row["speedup"]) for row in found["depth"]],
        "verify, drafts accepted at random": [
            (row["model_speedup"], row["speedup"]) for row in found["verify"]
        ],
    }
    return beside(pairs, "speed-up at the cost of the calls alone", "measured speed-up")


def cost_model(small_model: Row, smollm2: Row) -> Draw:
    found = {"small, fp32": small_model, "SmolLM2, int8": smollm2}
    pairs = {
        name: [(row["predicted_speedup"], row["measured_speedup"]) for row in one["predictions"]]
        for name, one in found.items()
    }
    return beside(pairs, "predicted speed-up", "measured speed-up")


def scale(found: Row) -> Draw:
    lines = {
        "verify, a quarter of the depth, acceptance 0.9": "verify_quarter_90",
        "verify, half of it, 0.9": "verify_half_90",
        "verify, half of it, 0.8": "verify_half_80",
        "half of the tokens leave at half depth": "recompute_half_of_them",
    }

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        for colour, (label, key) in zip(colours, lines.items(), strict=False):
            axes.plot(
                [row["billions"] for row in found["rows"]],
                [row[key] for row in found["rows"]],
                color=colour,
                marker="o",
                label=label,
            )
        axes.set_xscale("log")
        axes.set_ylim(1.0)
        axes.set_xlabel("weights, billions")
        axes.set_ylabel("speed-up, on paper")
        axes.legend(fontsize="small")

    return draw


def precisions(found: Row) -> Draw:
    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        for colour, above, model in zip(
            colours, (14, 4), dict.fromkeys(row["model"] for row in found["rows"]), strict=False
        ):
            rows = [row for row in found["rows"] if row["model"] == model]
            size = [100 * row["bundle_mb"] / rows[0]["bundle_mb"] for row in rows]
            cost = [100 * (row["ppl"] / rows[0]["ppl"] - 1) for row in rows]
            axes.plot(size, cost, color=colour, marker="o", linestyle=":", label=model)
            for row, x, y in zip(rows[1:], size[1:], cost[1:], strict=True):
                axes.annotate(
                    row["precision"], (x, y), textcoords="offset points", xytext=(8, above), color=colour
                )
        axes.set_xlabel("size of the bundle, % of fp32")
        axes.set_ylabel("perplexity, % more than fp32")
        axes.legend()

    return draw


def original(found: Row) -> Draw:
    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        methods = list(RECORDED)
        runs = [row for row in found["runs"] if row["protocol"]["name"] == "original"]
        here = [
            interval([row["epochs"][-1]["ppl"] for row in runs if row["method"] == method])
            for method in methods
        ]
        places = range(len(methods))
        axes.plot(
            [RECORDED[method][0] for method in methods],
            places,
            color=colours[1],
            marker="D",
            linestyle="none",
            label="recorded, one seed",
        )
        means, halves = zip(*here, strict=True)
        label = "here, five seeds, 95 %"
        axes.errorbar(
            means, places, xerr=halves, color=colours[0], marker="o", linestyle="none", capsize=3, label=label
        )
        axes.set_yticks(list(places), methods)
        axes.invert_yaxis()
        axes.set_xlim(0)
        axes.set_xlabel("validation perplexity at the stop, characters")
        axes.legend()

    return draw


def original_changes(found: Row) -> Draw:
    """The difference between two methods, under each protocol."""

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        runs = Originals(found["runs"])
        changes = runs.changes()
        for colour, shift, (label, value) in zip(
            colours, (-0.12, 0.12), {"10,000": STOP_TEXT, "200,000": MORE_TEXT}.items(), strict=False
        ):
            each = [
                interval(runs.above_standard("discriminative", tuned, plain, value).values())
                for plain, tuned in changes.values()
            ]
            means, halves = zip(*each, strict=True)
            places = [place + shift for place in range(len(changes))]
            name = f"on {label} characters"
            axes.errorbar(
                means, places, xerr=halves, color=colour, marker="o", linestyle="none", capsize=3, label=name
            )
        axes.axvline(0, color=colours[-1], linestyle="--", linewidth=1)
        axes.set_yticks(range(len(changes)), list(changes))
        axes.invert_yaxis()
        axes.set_xlabel("perplexity, discriminative above standard, five seeds, 95 %")
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return draw


def overfitting(found: Row) -> Draw:
    """Validation perplexity over the epochs, a line a method, one seed."""

    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        runs = Originals(found["runs"]).runs
        for i, method in enumerate(RECORDED):
            perplexities = [epoch["ppl"] for epoch in runs[method, OVERFITTED.name, FEW_SEEDS[0]]["epochs"]]
            epochs = range(1, len(perplexities) + 1)
            style = ("-", "--")[i // len(colours)] + "osD^vPXh*"[i]
            axes.plot(
                epochs,
                perplexities,
                style,
                color=colours[i % len(colours)],
                markevery=20,
                markersize=4,
                label=method,
            )
        recorded = [perplexity for perplexity, _, _ in RECORDED.values()]
        axes.axhspan(min(recorded), max(recorded), color=colours[-1], alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_yticks([8, 10, 20, 40, 80], ["8", "10", "20", "40", "80"])
        axes.minorticks_off()
        axes.set_xlabel("epoch; shaded: the perplexities that the original records")
        axes.set_ylabel("validation perplexity, characters")
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return draw


def smollm2_curve(found: Row) -> Draw:
    def draw(axes: Any, colours: tuple[str, ...]) -> None:
        styles = dict(zip(LAYERS, (":", "--", "-"), strict=True))
        for colour, (name, run) in zip(colours, found["runs"].items(), strict=False):
            for layer in LAYERS:
                lines = [(line["step"], 100 * line["agreement"][layer]) for line in run["evaluations"]]
                label = f"{KINDS[name]}, layer {layer}" if layer == LAYERS[-1] else None
                axes.plot(
                    *zip(*lines, strict=True), color=colour, linestyle=styles[layer], marker=".", label=label
                )
        axes.set_xlabel("step (1,024 tokens each); dotted layer 10, dashed 15")
        axes.set_ylabel("agreement with full depth, %")
        axes.legend()

    return draw


def smollm2_speed(*found: Row) -> Draw:
    return trade(
        {text: [named(row) for row in one["rows"]] for text, one in zip(TEXTS.values(), found, strict=True)}
    )


def study(figure_of: Callable[[Row], float], y_label: str) -> Callable[[Row], Draw]:
    """A figure of each row against its measured speed-up: a line a method, means over the seeds, from
    threshold 0 to full depth.
    """

    def means(runs: Sequence[Row], value: Callable[[Row], float]) -> list[float]:
        """Of each threshold; full depth, which is the first row, last."""
        each = [
            statistics.mean(map(value, rows)) for rows in zip(*(run["rows"] for run in runs), strict=True)
        ]
        return [*each[1:], each[0]]

    def figure(found: Row) -> Draw:
        def draw(axes: Any, colours: tuple[str, ...]) -> None:
            for i, name in enumerate(
                dict.fromkeys(run["method"] for run in found["runs"] if exits_early(run))
            ):
                runs = [run for run in found["runs"] if run["method"] == name]
                x = means(runs, lambda row: row["speedup"])
                y = means(runs, figure_of)
                axes.plot(
                    x, y, color=colours[i % len(colours)], marker="osD^vPX"[i], markersize=4, label=name
                )
            axes.set_xlabel("measured speed-up over its own full depth")
            axes.set_ylabel(y_label)
            axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

        return draw

    return figure


def catch_up(
    part: str, place: str, value: Callable[[Row, Row], float], x_label: str, y_label: str
) -> Callable[[Row], Draw]:
    """A line a catch-up and threshold, over full depth, along the sequence."""

    def figure(found: Row) -> Draw:
        def draw(axes: Any, colours: tuple[str, ...]) -> None:
            rows = [named(row) for row in found[part]["rows"]]
            full = {row[place]: row for row in rows if not leaves_early(row)}
            settings = list(
                dict.fromkeys((row["catch_up"], row["named"]) for row in rows if leaves_early(row))
            )
            thresholds = list(dict.fromkeys(threshold for _, threshold in settings))
            for way, threshold in settings:
                mine = [row for row in rows if (row["catch_up"], row["named"]) == (way, threshold)]
                style = ("-", "--", ":")[thresholds.index(threshold)]
                line = [(row[place], value(row, full[row[place]])) for row in mine]
                colour = colours[list(MARKERS).index(way)]
                axes.plot(
                    *zip(*line, strict=True),
                    color=colour,
                    marker=MARKERS[way],
                    linestyle=style,
                    label=f"{way}, {threshold}",
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(full), list(map(str, full)))
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

        return draw

    return figure


PLOTS = {
    "methods": Plot("methods.md", ("methods.json",), study(lambda row: row["ppl"], "perplexity")),
    "depth": Plot(
        "depth.md", ("depth.json",), study(lambda row: 100 * (row["ppl_ratio"] - 1), "perplexity, % more")
    ),
    "catch-up-quality": Plot(
        "catch-up.md",
        ("catch-up.json",),
        catch_up(
            "quality",
            "to",
            lambda row, full: 100 * (row["ppl"] / full["ppl"] - 1),
            "up to this position",
            "perplexity, % more",
        ),
    ),
    "catch-up-speed": Plot(
        "catch-up.md",
        ("catch-up.json",),
        catch_up(
            "speed",
            "length",
            lambda row, _: row["speedup"],
            "length of the sequence",
            "measured speed-up over full depth",
        ),
    ),
    "small": Plot("small.md", ("small-gate.json",), small),
    "engine": Plot("engine.md", ("engine.json",), engine),
    "cost-model": Plot("cost-model.md", ("advise-small.json", "advise-smollm2.json"), cost_model),
    "scale": Plot("scale.md", ("scale.json",), scale),
    "precisions": Plot("precisions.md", ("precisions.json",), precisions),
    "original": Plot("original.md", ("original.json",), original),
    "original-changes": Plot("original.md", ("original.json",), original_changes),
    "original-overfitting": Plot("original.md", ("original.json",), overfitting),
    "smollm2-curve": Plot("smollm2-exits.md", ("smollm2-exits.json",), smollm2_curve),
    "smollm2-speed": Plot(
        "smollm2-exits.md", tuple(f"smollm2-speed-distilled-{kind}.json" for kind in TEXTS), smollm2_speed
    ),
}


def wrong_with(name: str, plot: Plot) -> str | None:
    """What a figure lacks."""
    path = FOLDER / f"{name}.svg"
    first = path.read_text(encoding="utf-8").split("\n", 1)[0] if path.is_file() else ""
    if plot.digest not in first:
        return (
            f"{path.name} was not drawn from {', '.join(plot.sources)} as they are; draw it: python "
            "experiments/plots.py"
        )
    if f"]({path.name})" not in (FOLDER / plot.page).read_text(encoding="utf-8"):
        return f"{plot.page} does not show {path.name}"
    return None


@click.command()
@click.option(
    "--check", is_flag=True, help="Draw nothing; exit code 1 where a figure is not that of its JSON."
)
def main(check: bool) -> None:
    """Draw or check the figures of docs/experiments."""
    for name, plot in PLOTS.items():
        if not check:
            figure = drawn(plot.draw(*map(load, plot.sources)), "light")
            figure.patch.set(facecolor="white", alpha=1.0)
            (FOLDER / f"{name}.svg").write_text(f"<!-- {plot.digest} -->\n{svg(figure)}", encoding="utf-8")
    wrong = [line for name, plot in PLOTS.items() if (line := wrong_with(name, plot))]
    for line in wrong:
        click.echo(f"error: {line}", err=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
