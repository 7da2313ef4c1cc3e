"""The tables of the pages about training: the original's table, methods, depths. Means over seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter

import numpy as np
from tables import Dash, PageError, Row, complete, load, mean_of, table

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


Column = tuple[
    Callable[[Row], float | None], int
]  # of a run, and digits; None where a run has no such figure


def study_means(runs: Sequence[Row], columns: dict[str, Column], methods: Iterable[str]) -> list[list[str]]:
    """A line a method: means over the seeds of each column, a dash where a method has no such figure.

    Raises PageError.
    """
    from methods import SEEDS  # experiments/methods.py

    lines = []
    for method in methods:
        mine = [run for run in runs if run["method"] == method]
        line = [method]
        for value, digits in columns.values():
            known = {run["seed"]: found for run in mine if (found := value(run)) is not None}
            line.append("–" if mine and not known else mean_of(complete(known, SEEDS, method), digits))
        lines.append(line)
    return lines


def curve(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """The best perplexity for a time a token: times as shares of full depth's, ascending, and
    perplexities.
    """
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
    """The least mean depth whose perplexity is at most so much above full depth's (0.05: 5 %), by one
    criterion or the best of them.
    """
    if not exits_early(run):
        return None
    points = [point for point in run["criteria"] if criterion in (None, point["criterion"])]
    full = {"ppl_ratio": 1.0, "mean_depth": run["rows"][0]["mean_depth"]}
    return min(point["mean_depth"] for point in [full, *points] if point["ppl_ratio"] <= 1 + tolerance)


def best_speed(run: Row, tolerance: float, rows: str = "rows") -> float | None:
    """The largest measured speed-up at a perplexity that is at most so much above full depth's; `gate_rows`
    are those of the gate.
    """
    return (
        max(row["speedup"] for row in run[rows] if row["ppl_ratio"] <= 1 + tolerance)
        if exits_early(run)
        else None
    )


SPEEDS: dict[str, Column] = {
    "max-prob, 1 %": (partial(best_speed, tolerance=0.01), 2),
    "max-prob, 5 %": (partial(best_speed, tolerance=0.05), 2),
    "gate, 1 %": (partial(best_speed, tolerance=0.01, rows="gate_rows"), 2),
    "gate, 5 %": (partial(best_speed, tolerance=0.05, rows="gate_rows"), 2),
}


def trials_table(runs: Sequence[Row], names: Iterable[str]) -> str:
    """Validation perplexity at full depth of the runs that chose the learning rates."""
    tried = {run["method"]: run["trials"] for run in runs}
    return table(
        ["", *runs[0]["trials"]], [[name, *(f"{ppl:.1f}" for ppl in tried[name].values())] for name in names]
    )


def methods_tables() -> dict[str, str]:
    """Means over three seeds."""
    from methods import CRITERIA, METHODS  # experiments/methods.py

    runs = load("methods.json")["runs"]
    names = list(METHODS.methods)
    early = [name for name, method in METHODS.methods.items() if method.early]
    fastest = max(curve(run["rows"])[0][0] for run in runs if exits_early(run))
    columns: dict[str, Column] = {
        "perplexity": (lambda run: run["rows"][0]["ppl"], 2),
        f"mean of the curve from {fastest:.2f}": (
            lambda run: area(run["rows"], fastest) if exits_early(run) else None,
            2,
        ),
        "depth at 1 %": (lambda run: least_depth(run, 0.01), 2),
        "depth at 5 %": (lambda run: least_depth(run, 0.05), 2),
        **SPEEDS,
    }
    layers: dict[str, Column] = {
        f"layer {layer}": (partial(lambda run, layer: run["validation"].get(layer), layer=str(layer)), 2)
        for layer in (3, 6, 9)
    }
    by_criterion: dict[str, Column] = {
        name: (partial(least_depth, tolerance=0.05, criterion=name), 2) for name in CRITERIA
    }
    rates = {run["method"]: f"{run['learning_rate']:g}" for run in runs}
    minutes: Column = (lambda run: run["minutes"], 1)
    exits = study_means(runs, {**layers, "minutes": minutes}, names)
    return {
        "methods": table(["method", *columns], study_means(runs, columns, names)),
        "exits": table(
            ["method", "learning rate", *layers, "minutes"],
            [[name, rates[name], *line] for name, *line in exits],
        ),
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
        return float(
            run["rows"][0]["ppl"]
            * min(point["ppl_ratio"] for point in run["criteria"] if point["mean_depth"] <= limit)
        )

    def at_its_time(run: Row) -> float | None:
        speed = routed[run["seed"]]["tokens_per_second"]
        return min(
            (float(row["ppl"]) for row in run["rows"] if row["tokens_per_second"] >= speed), default=None
        )

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

    runs = load("depth.json")["runs"]
    names = list(DEPTH.methods)

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
        "bound at a third": (
            lambda run: next(row["speedup"] for row in run["rows"] if row["threshold"] == 0.0),
            2,
        ),
    }
    return {
        "depth": table(["layers", *columns], study_means(runs, columns, names)),
        "trials": trials_table(runs, names),
    }


Value = Callable[[Row], float]  # of a run


class Originals:
    """The runs of original.json."""

    def __init__(self, runs: Iterable[Row]) -> None:
        self.runs = {(run["method"], run["protocol"]["name"], run["seed"]): run for run in runs}

    def values(self, method: str, protocol: str, value: Value) -> dict[int, float]:
        """By seed. Raises PageError where a seed is missing."""
        from original import FEW_SEEDS, OVERFITTED, SEEDS  # experiments/original.py

        found = {
            seed: value(run)
            for (name, under, seed), run in self.runs.items()
            if (name, under) == (method, protocol)
        }
        return complete(
            found, FEW_SEEDS if protocol == OVERFITTED.name else SEEDS, f"{method} under '{protocol}'"
        )

    def mean(self, method: str, protocol: str, value: Value, digits: int = 2) -> str:
        return mean_of(self.values(method, protocol, value), digits)

    def above_standard(self, method: str, protocol: str, plain: str, value: Value) -> dict[int, float]:
        """The difference from `standard` under the protocol `plain`, by seed."""
        standard = self.values("standard", plain, value)
        return {seed: mine - standard[seed] for seed, mine in self.values(method, protocol, value).items()}

    def best_rate(self, method: str) -> str:
        """The protocol with the learning rate that gives a method the least mean perplexity at the stop."""
        from original import ORIGINAL, RATES  # experiments/original.py

        means = {
            name: statistics.mean(self.values(method, name, STOP_TEXT).values())
            for name in (p.name for p in (ORIGINAL, *RATES))
        }
        return min(means, key=lambda name: means[name])

    def changes(self) -> dict[str, tuple[str, str]]:
        """The protocols of `standard` and of `discriminative` that are compared, by what was changed."""
        from original import PROTOCOLS  # experiments/original.py

        same = {protocol.name: (protocol.name, protocol.name) for protocol in PROTOCOLS}
        return {
            **same,
            "learning rate, each its best": (self.best_rate("standard"), self.best_rate("discriminative")),
        }


STOP_TEXT, MORE_TEXT = (
    itemgetter("token_weighted"),
    itemgetter("more_validation"),
)  # of a run: perplexities of its model


def at_stop(figure: str, factor: float = 1.0) -> Value:
    return lambda run: float(factor * run["epochs"][-1][figure])


def num_epochs(run: Row) -> float:
    return len(run["epochs"])


def original_tables() -> dict[str, str]:
    """Means over the seeds, with 95 % intervals of the mean (Student's t)."""
    from original import EXTREMES, FEW_SEEDS, METHODS, ORIGINAL, OVERFITTED  # experiments/original.py

    found = Originals(load("original.json")["runs"])
    name = ORIGINAL.name

    def first_at_record(run: Row) -> tuple[int, Row]:
        return next(
            (number, epoch)
            for number, epoch in enumerate(run["epochs"], 1)
            if epoch["ppl"] <= RECORDED[run["method"]][0]
        )

    def above(method: str) -> str:
        differences = found.above_standard(method, name, name, at_stop("ppl"))
        return "–" if method == "standard" else mean_of(differences)

    first = [
        [
            method,
            f"{RECORDED[method][0]:.2f}",
            found.mean(method, name, at_stop("ppl")),
            above(method),
            found.mean(method, name, MORE_TEXT),
            found.mean(method, name, lambda run: run["more_validation_full_depth"]),
            found.mean(method, name, num_epochs, 1),
            found.mean(method, name, at_stop("compute_cost", 100), 1),
        ]
        for method in METHODS
    ]
    header = [
        "method",
        "recorded",
        "at the stop",
        "above standard",
        "more text",
        "at full depth",
        "epochs",
        "compute %",
    ]
    levels = [
        [
            method,
            f"{RECORDED[method][0]:.2f}",
            f"{Dash() if RECORDED[method][1] is None else RECORDED[method][1]:.1f}",
            found.mean(method, name, lambda run: first_at_record(run)[0], 1),
            found.mean(method, name, lambda run: 100 * first_at_record(run)[1]["shallow_ratio"], 1),
            found.mean(method, name, at_stop("shallow_ratio", 100), 1),
        ]
        for method in METHODS
    ]
    level_header = [
        "method",
        "recorded",
        "early %, recorded",
        "epoch of that perplexity here",
        "early % at it",
        "early % at the stop",
    ]
    return {
        "original": table(header, first),
        "levels": table(level_header, levels),
        "rates": rates_table(found, list(METHODS)),
        "changed": changed_table(found),
        "overfitted": overfitted_table(found, OVERFITTED.name, EXTREMES),
        "overfitting": overfitting_table(found, OVERFITTED.name, FEW_SEEDS[0]),
    }


def rates_table(found: Originals, methods: Sequence[str]) -> str:
    """Every method at every learning rate; then each at its best, on more text, against `standard` at its
    own.
    """
    from original import ORIGINAL, RATES  # experiments/original.py

    protocols = sorted((ORIGINAL, *RATES), key=lambda protocol: protocol.learning_rate)
    plain = found.best_rate("standard")
    lines = []
    for method in methods:
        best = found.best_rate(method)
        above = found.above_standard(method, best, plain, MORE_TEXT)
        rates = [found.mean(method, protocol.name, STOP_TEXT) for protocol in protocols]
        last = [found.mean(method, best, MORE_TEXT), "–" if method == "standard" else mean_of(above)]
        lines.append([method, *rates, *last])
    header = [
        "method",
        *(f"{protocol.learning_rate:g}" for protocol in protocols),
        "its best, more text",
        "above standard's best",
    ]
    return table(header, lines)


def changed_table(found: Originals) -> str:
    """The original's worst and best method under each protocol: perplexities, the difference seed by seed,
    epochs.
    """
    lines = []
    for change, (plain, tuned) in found.changes().items():
        line = [change]
        for value in (STOP_TEXT, MORE_TEXT):
            difference = found.above_standard("discriminative", tuned, plain, value)
            line += [found.mean("standard", plain, value), found.mean("discriminative", tuned, value)]
            line += [mean_of(difference)]
        lines.append(
            [
                *line,
                found.mean("standard", plain, num_epochs, 1),
                found.mean("discriminative", tuned, num_epochs, 1),
            ]
        )
    columns = ("standard", "discriminative", "difference")
    header = [
        "protocol",
        *columns,
        *(f"{column}, more text" for column in columns),
        "epochs, standard",
        "epochs, discriminative",
    ]
    return table(header, lines)


def overfitted_table(found: Originals, protocol: str, methods: Sequence[str]) -> str:
    """Far past the stop: the best epoch and the last."""

    def best(run: Row) -> int:
        return min(range(len(run["epochs"])), key=lambda epoch: float(run["epochs"][epoch]["ppl"]))

    columns: dict[str, tuple[Value, int]] = {
        "best": (lambda run: run["epochs"][best(run)]["ppl"], 2),
        "its epoch": (lambda run: 1 + best(run), 0),
        "last": (at_stop("ppl"), 2),
        "early %, last": (at_stop("shallow_ratio", 100), 1),
    }
    rows = [
        [method, *(found.mean(method, protocol, value, digits) for value, digits in columns.values())]
        for method in methods
    ]
    return table(["method", *columns], rows)


LOOKS = (40, 80, 120, 160, 200)  # epochs


def overfitting_table(found: Originals, protocol: str, seed: int) -> str:
    """Every method with one seed, far past the stop."""
    lines = []
    for method, (recorded, early, _) in RECORDED.items():
        if (method, protocol, seed) not in found.runs:
            raise PageError(f"{method} under '{protocol}' lacks the seed {seed}")
        epochs = found.runs[method, protocol, seed]["epochs"]
        shares = [early, 100 * epochs[-1]["shallow_ratio"]]
        perplexities = [recorded, *(epochs[epoch - 1]["ppl"] for epoch in LOOKS)]
        lines.append(
            [
                method,
                *(f"{ppl:.2f}" for ppl in perplexities),
                *(f"{Dash() if share is None else share:.1f}" for share in shares),
            ]
        )
    return table(
        ["method", "recorded", *map(str, LOOKS), "early %, recorded", f"early % at {LOOKS[-1]}"], lines
    )
