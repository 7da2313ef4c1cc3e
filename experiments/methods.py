"""Training methods, or depths, on the same text, with the same number of tokens and the same tuning, and
their exits on the clock.

    # learning rates on one seed, then every run, gates and bundles; hours, goes on
    python experiments/methods.py train
    # how deep each criterion must go for the same perplexity; no clock
    python experiments/methods.py criteria
    # tables with the clock, after criteria: nothing else should run meanwhile
    python experiments/methods.py measure
    # docs/experiments/methods.json
    python experiments/methods.py collect

Byte-level BPE of 2048 words, WikiText-2, width 96. Methods: nine layers, early exits after layers 3 and 6
(after 3 alone where the method has one). With --study depth: 3, 6, 12 and 24 layers, deep supervision, early
exits after a third and two thirds (depth.json). Everything in a study chooses among the same learning rates
by the validation perplexity of full depth, on one seed and a fifth of the steps.
"""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from ease_common.files import write_whole
from ease_eval.measure.documents import Document, first_tokens
from ease_eval.measure.perplexity import record_exits, score_documents
from ease_runtime.llm import LLM
from ease_runtime.policies import FULL_DEPTH, ExitPolicy, make_policy
from ease_train.data.corpora import load_documents
from ease_train.training.checkpoint import read_metrics

DATA = "wikitext-2"
SEEDS = (42, 43, 44)
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
STEPS = 2000
TRIAL_STEPS = 400
SHAPE = ("--dim", "96", "--num-heads", "3", "--num-kv-heads", "1")
TOKENS_A_STEP = 2 * 256
TOKENS = (
    "--bpe-vocab-size",
    "2048",
    "--batch-size",
    "2",
    "--sequence-length",
    "256",
    "--warmup-steps",
    "50",
    "--max-positions",
    "256",
)
LOOKS = ("--eval-every", "400", "--save-every", "200", "--eval-tokens", "20000", "--log-every", "20")
THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
CRITERIA = ("max-prob", "margin", "entropy", "similarity", "patience", "gate")
QUANTILES = np.linspace(0.02, 0.98, 25)  # of a criterion's confidences: where its thresholds are tried
SCORED_TOKENS = 20_000


@dataclass(frozen=True)
class Method:
    """A recipe, with what it must be told for so many layers."""

    recipe: str
    options: tuple[str, ...]
    early: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """Methods that are trained on as many tokens and tuned alike."""

    name: str
    methods: dict[str, Method]
    options: tuple[str, ...]  # of all methods

    @property
    def runs(self) -> Path:
        return Path("runs") / self.name

    def trial(self, name: str, rate: float) -> Path:
        return self.runs / name / f"rate-{rate:g}"

    def folder(self, name: str, seed: int) -> Path:
        return self.runs / name / f"seed-{seed}"

    def best_rate(self, name: str) -> float:
        return min(LEARNING_RATES, key=lambda rate: full_depth(self.trial(name, rate)))


def weights(**by_layer: float) -> tuple[str, ...]:
    return tuple(
        part
        for layer, weight in by_layer.items()
        for part in ("--layer-weights", layer.removeprefix("at_"), str(weight))
    )


def exits(*layers: int) -> tuple[str, ...]:
    return tuple(part for layer in layers for part in ("--exits", str(layer)))


ASYMMETRIC = (*exits(3, 9), *weights(at_3=0.7, at_9=0.3))
SLOWER = tuple(
    part
    for layer in range(4, 10)
    for part in ("--layer-lr-scales", str(layer), "0.5" if layer < 7 else "0.1")
)
ROUTED = tuple(part for layer in (2, 4, 6, 8) for part in ("--routed-layers", str(layer)))
METHODS = Study(
    "methods",
    {
        "standard": Method("standard", (*exits(9), *weights(at_9=1.0)), ()),
        "deep supervision": Method("deep-supervision", exits(3, 6, 9), (3, 6)),
        "auxiliary loss": Method("auxiliary", (*exits(3, 9), *weights(at_3=0.5, at_9=0.5)), (3,)),
        "asymmetric": Method("asymmetric", ASYMMETRIC, (3,)),
        "discriminative": Method("discriminative", (*ASYMMETRIC, *SLOWER), (3,)),
        "LayerSkip": Method("layerskip", (*exits(3, 6, 9), "--curriculum-every", "2"), (3, 6)),
        "self-distillation": Method(
            "self-distillation", (*exits(3, 6, 9), *weights(at_3=0.3, at_6=0.3, at_9=1.0)), (3, 6)
        ),
        "token-routed": Method("token-routed", (*ASYMMETRIC, "--routing-warmup-steps", "500"), (3,)),
        "Mixture-of-Depths": Method("mixture-of-depths", (*exits(9), *weights(at_9=1.0), *ROUTED), ()),
    },
    ("--num-layers", "9"),
)
DEPTH = Study(
    "depth",
    {
        f"{depth} layers": Method(
            "deep-supervision",
            ("--num-layers", str(depth), *exits(depth // 3, 2 * depth // 3, depth)),
            (depth // 3, 2 * depth // 3),
        )
        for depth in (3, 6, 12, 24)
    },
    (),
)
STUDIES = {study.name: study for study in (METHODS, DEPTH)}


def call(*command: str) -> None:
    click.echo(" ".join(command))
    subprocess.run(command, check=True)


def fit(study: Study, method: Method, folder: Path, seed: int, steps: int, rate: float, threads: int) -> None:
    """Train to the end, or go on; a finished run is left alone."""
    place = ("--out", str(folder), "--cache", str(study.runs / "cache"), "--threads", str(threads))
    if not folder.is_dir():
        settings = (
            *SHAPE,
            *study.options,
            *TOKENS,
            *LOOKS,
            "--steps",
            str(steps),
            "--learning-rate",
            str(rate),
            "--seed",
            str(seed),
        )
        call("ease-train", "fit", method.recipe, "--data", DATA, *place, *settings, *method.options)
    elif read_metrics(folder)[-1]["step"] < steps:
        call("ease-train", "fit", method.recipe, *place, "--resume")


def validation(folder: Path) -> dict[str, float]:
    """The last validation perplexity of each exit, the last layer's last."""
    return dict([line["perplexity"] for line in read_metrics(folder) if "perplexity" in line][-1])


def full_depth(folder: Path) -> float:
    return list(validation(folder).values())[-1]


@click.group()
@click.option("--study", type=click.Choice(list(STUDIES)), default=METHODS.name, show_default=True)
@click.pass_context
def main(context: click.Context, study: str) -> None:
    """Train, measure, collect."""
    context.obj = STUDIES[study]


@main.command()
@click.option("--only", multiple=True, help="These methods; all by default.")
@click.option("--seed", "seeds", multiple=True, type=int, default=SEEDS, show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads of a run.")
@click.pass_obj
def train(study: Study, only: tuple[str, ...], seeds: tuple[int, ...], threads: int) -> None:
    """Learning rates, runs, gates, bundles: what is there is kept."""
    chosen = {name: method for name, method in study.methods.items() if not only or name in only}
    for name, method in chosen.items():
        for rate in LEARNING_RATES:
            fit(study, method, study.trial(name, rate), SEEDS[0], TRIAL_STEPS, rate, threads)
    for seed in seeds:
        for name, method in chosen.items():
            began = time.time()
            folder = study.folder(name, seed)
            last = folder / "checkpoint"
            fit(study, method, last, seed, STEPS, study.best_rate(name), threads)
            if method.early:
                last = folder / "gated"
                if not last.is_dir():
                    gates = (
                        "--steps",
                        "150",
                        "--batch-size",
                        "8",
                        "--eval-tokens",
                        "20000",
                        "--threads",
                        str(threads),
                    )
                    call("ease-train", "gates", str(folder / "checkpoint"), "--out", str(last), *gates)
            if not (folder / "bundle").is_dir():
                call("ease-export", "build", str(last), str(folder / "bundle"), "--target", "cpu")
                click.echo(f"{name}, seed {seed}: {time.time() - began:.0f} s")


def bundles(study: Study) -> Iterator[tuple[Method, Path]]:
    """The folders of the runs that have their bundle."""
    for seed in SEEDS:
        for name, method in study.methods.items():
            if (folder := study.folder(name, seed) / "bundle").is_dir():
                yield method, folder.parent


@main.command()
@click.pass_obj
def measure(study: Study) -> None:
    """What each bundle says and how fast, with max-prob and with gates, exact keys and values.

    Needs the criteria.
    """
    amounts = ("--scored-tokens", str(SCORED_TOKENS), "--texts", "4", "--new-tokens", "96", "--rounds", "3")
    for method, folder in bundles(study):
        asked = {"table": ("max-prob", ",".join(map(str, THRESHOLDS)) if method.early else "off")}
        if method.early:
            asked["gate-table"] = (
                "gate",
                ",".join(f"{threshold:.6f}" for threshold in gate_thresholds(folder)),
            )
        for name, (policy, thresholds) in asked.items():
            settings = ("--policy", policy, "--thresholds", thresholds, "--catch-up", "recompute")
            out = folder / f"{name}.json"
            if not out.is_file():
                call(
                    "ease-eval",
                    "table",
                    str(folder / "bundle"),
                    "--data",
                    DATA,
                    *amounts,
                    *settings,
                    "--json",
                    str(out),
                )


def gate_thresholds(folder: Path) -> list[float]:
    """Some of those that the gate was tried with: every fourth."""
    found = json.loads((folder / "criteria.json").read_text(encoding="utf-8"))
    return [point["threshold"] for point in found if point["criterion"] == "gate"][::4]


@main.command()
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.pass_obj
def criteria(study: Study, threads: int) -> None:
    """How deep each criterion must go for the same perplexity."""
    for method, folder in bundles(study):
        if method.early and not (folder / "criteria.json").is_file():
            found = criteria_of(LLM(folder / "bundle", num_threads=threads))
            write_whole(folder / "criteria.json", json.dumps(found, indent=1) + "\n")
            click.echo(f"{folder}: {len(found)} policies")


def criteria_of(llm: LLM) -> list[dict[str, Any]]:
    """For each criterion and threshold, with exact keys and values: perplexity over full depth's, and mean
    depth.
    """
    texts = [Document.of(llm, text) for text in load_documents(DATA, "test")]
    documents = [document.ids for document in first_tokens(texts, SCORED_TOKENS)]
    some = [document.ids for document in first_tokens(texts, 4000)]
    tried = [(name, *pair) for name in CRITERIA for pair in policies(llm, some, name)]
    off, *scores = score_documents(
        llm.engine, documents, [FULL_DEPTH, *(policy for _, policy, _ in tried)], "recompute"
    )
    return [
        {
            "criterion": name,
            "threshold": threshold,
            "ppl_ratio": mine.perplexity / off.perplexity,
            "mean_depth": float(mine.mean_depth),
        }
        for (name, _, threshold), mine in zip(tried, scores, strict=True)
    ]


def policies(llm: LLM, documents: Sequence[Sequence[int]], name: str) -> Iterator[tuple[ExitPolicy, float]]:
    """A criterion with thresholds all over what it says of some of the text; patience with the numbers of
    exits that there are.
    """
    layers = llm.stack.exit_layers
    if name == "patience":
        for patience in range(1, len(layers) - 1):
            yield make_policy(name, None, layers, patience=patience), float(patience)
        return
    said, _, _ = record_exits(llm.engine, documents, make_policy(name, [0.5], layers))
    for threshold in np.unique(np.quantile(said, QUANTILES)):
        yield make_policy(name, [float(threshold)], layers), float(threshold)


@main.command()
@click.pass_obj
def collect(study: Study) -> None:
    """Everything that was measured, as one file."""
    runs = []
    kept = (
        "threshold",
        "ppl",
        "ppl_ratio",
        "mean_depth",
        "layers_run",
        "speedup",
        "ideal_speedup",
        "tokens_per_second",
        "latency_ms_p50",
    )
    for name, method in study.methods.items():
        for seed in SEEDS:
            folder = study.folder(name, seed)
            if not (folder / "table.json").is_file():
                continue
            table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
            gated = (
                json.loads((folder / "gate-table.json").read_text(encoding="utf-8"))
                if method.early
                else {"rows": []}
            )
            rates = [
                line["tokens_per_second"]
                for line in read_metrics(folder / "checkpoint")
                if "tokens_per_second" in line
            ]
            runs.append(
                {
                    "method": name,
                    "seed": seed,
                    "learning_rate": study.best_rate(name),
                    "trials": {f"{rate:g}": full_depth(study.trial(name, rate)) for rate in LEARNING_RATES},
                    "validation": validation(folder / "checkpoint"),
                    "minutes": STEPS * TOKENS_A_STEP / float(np.median(rates)) / 60,
                    "rows": [{key: row[key] for key in kept} for row in table["rows"]],
                    "gate_rows": [{key: row[key] for key in kept} for row in gated["rows"]],
                    "exits": table["exits"],
                    "versions": table["versions"],
                    "criteria": json.loads((folder / "criteria.json").read_text(encoding="utf-8"))
                    if method.early
                    else [],
                }
            )
    out = Path(f"docs/experiments/{study.name}.json")
    write_whole(
        out, json.dumps({"data": DATA, "steps": STEPS, "tokens": STEPS * TOKENS_A_STEP, "runs": runs}) + "\n"
    )
    click.echo(f"{out}: {len(runs)} of {len(study.methods) * len(SEEDS)} runs")


if __name__ == "__main__":
    main()
