"""The training methods on the same text, with the same number of tokens and the same tuning, and their exits on the clock.

    python experiments/methods.py train        # learning rates on one seed, then every run, gates and bundles; hours, goes on where stopped
    python experiments/methods.py measure      # tables with the clock: nothing else should run meanwhile
    python experiments/methods.py collect      # docs/experiments/methods.json

Nine layers of width 128, byte-level BPE of 2048 words, WikiText-2, early exits after layers 3 and 6 (after 3 alone where the method has
one). Every method chooses among the same learning rates by the validation perplexity of full depth, on one seed and a third of the steps.
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

from ease_eval.files import write_whole
from ease_eval.perplexity import record_exits, score_documents
from ease_eval.table import first_tokens
from ease_runtime.llm import LLM
from ease_runtime.policy import ExitPolicy
from ease_train.corpora import load_documents

RUNS, OUT = Path("runs/methods"), Path("docs/experiments/methods.json")
DATA, SEEDS, LEARNING_RATES = "wikitext-2", (42, 43, 44), (1e-3, 2e-3, 4e-3)
STEPS, TRIAL_STEPS = 600, 200
SHAPE = ("--dim", "128", "--num-layers", "9", "--num-heads", "4", "--num-kv-heads", "2", "--max-positions", "512")
TOKENS = ("--bpe-vocab-size", "2048", "--batch-size", "8", "--sequence-length", "256", "--warmup-steps", "50")
LOOKS = ("--eval-every", "200", "--save-every", "100", "--eval-tokens", "20000", "--log-every", "20")
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
CRITERIA = ("max-prob", "margin", "entropy", "similarity", "patience", "gate")
QUANTILES = np.linspace(0.02, 0.98, 25)  # of a criterion's confidences: where its thresholds are tried
SCORED_TOKENS = 20_000


@dataclass(frozen=True)
class Method:
    """A recipe, with what it must be told for nine layers."""

    recipe: str
    options: tuple[str, ...]
    early: tuple[int, ...] = (3, 6)


def weights(**by_layer: float) -> tuple[str, ...]:
    return tuple(part for layer, weight in by_layer.items() for part in ("--layer-weights", layer.removeprefix("at_"), str(weight)))


def exits(*layers: int) -> tuple[str, ...]:
    return tuple(part for layer in (*layers, 9) for part in ("--exits", str(layer)))


ASYMMETRIC = (*exits(3), *weights(at_3=0.7, at_9=0.3))
SLOWER = tuple(part for layer in range(4, 10) for part in ("--layer-lr-scales", str(layer), "0.5" if layer < 7 else "0.1"))
METHODS = {
    "standard": Method("standard", (*exits(), *weights(at_9=1.0)), ()),
    "deep supervision": Method("deep-supervision", exits(3, 6)),
    "auxiliary loss": Method("auxiliary", (*exits(3), *weights(at_3=0.5, at_9=0.5)), (3,)),
    "asymmetric": Method("asymmetric", ASYMMETRIC, (3,)),
    "discriminative": Method("discriminative", (*ASYMMETRIC, *SLOWER), (3,)),
    "LayerSkip": Method("layerskip", (*exits(3, 6), "--rotate-every", "2")),
    "self-distillation": Method("self-distillation", (*exits(3, 6), *weights(at_3=0.3, at_6=0.3, at_9=1.0))),
    "token-routed": Method("token-routed", (*ASYMMETRIC, "--routing-warmup-steps", str(STEPS // 4)), (3,)),
    "Mixture-of-Depths": Method(
        "mixture-of-depths",
        (*exits(), *weights(at_9=1.0), *(part for layer in (2, 4, 6, 8) for part in ("--routed-layers", str(layer)))),
        (),
    ),
}


def call(*command: str) -> None:
    click.echo(" ".join(command))
    subprocess.run(command, check=True)


def fit(method: Method, folder: Path, seed: int, steps: int, rate: float, threads: int) -> None:
    """Train to the end, or go on; a finished run is left alone."""
    place = ("--out", str(folder), "--cache", str(RUNS / "cache"), "--threads", str(threads))
    if not folder.is_dir():
        settings = (*SHAPE, *TOKENS, *LOOKS, "--steps", str(steps), "--learning-rate", str(rate), "--seed", str(seed))
        call("ease-train", "fit", method.recipe, "--data", DATA, *place, *settings, *method.options)
    elif metrics(folder)[-1]["step"] < steps:
        call("ease-train", "fit", method.recipe, *place, "--resume")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def full_depth(folder: Path) -> float:
    """The last validation perplexity of full depth."""
    return float([line["perplexity"]["9"] for line in metrics(folder) if "perplexity" in line][-1])


def trial(name: str, rate: float) -> Path:
    return RUNS / name / f"rate-{rate:g}"


def best_rate(name: str) -> float:
    return min(LEARNING_RATES, key=lambda rate: full_depth(trial(name, rate)))


@click.group()
def main() -> None:
    """Train, measure, collect."""


@main.command()
@click.option("--only", multiple=True, type=click.Choice(list(METHODS)), help="These methods; all by default.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of a run.")
def train(only: tuple[str, ...], threads: int) -> None:
    """Learning rates, runs, gates, bundles: what is there is kept."""
    chosen = {name: method for name, method in METHODS.items() if not only or name in only}
    for name, method in chosen.items():
        for rate in LEARNING_RATES:
            fit(method, trial(name, rate), SEEDS[0], TRIAL_STEPS, rate, threads)
    for seed in SEEDS:
        for name, method in chosen.items():
            began, folder = time.time(), RUNS / name / f"seed-{seed}"
            fit(method, folder / "checkpoint", seed, STEPS, best_rate(name), threads)
            last = folder / "checkpoint"
            if method.early:
                last = folder / "gated"
                if not last.is_dir():
                    gates = ("--steps", "150", "--batch-size", "8", "--eval-tokens", "20000", "--threads", str(threads))
                    call("ease-train", "gates", str(folder / "checkpoint"), "--out", str(last), *gates)
            if not (folder / "bundle").is_dir():
                call("ease-export", "build", str(last), str(folder / "bundle"))
                click.echo(f"{name}, seed {seed}: {time.time() - began:.0f} s")


@main.command()
def measure() -> None:
    """What each bundle says and how fast, with max-prob; and how deep each criterion must go for the same perplexity."""
    for seed in SEEDS:
        for name, method in METHODS.items():
            folder = RUNS / name / f"seed-{seed}"
            amounts = ("--scored-tokens", str(SCORED_TOKENS), "--texts", "4", "--new-tokens", "96", "--rounds", "3")
            rows = ("--thresholds", ",".join(map(str, THRESHOLDS)), "--catch-up", "recompute", "--catch-up", "propagate")
            asked = (*amounts, *(rows if method.early else ("--thresholds", "off")))
            if not (folder / "table.json").is_file():
                call("ease-eval", "table", str(folder / "bundle"), "--data", DATA, *asked, "--json", str(folder / "table.json"))
            if method.early and not (folder / "criteria.json").is_file():
                write_whole(folder / "criteria.json", json.dumps(criteria(folder / "bundle"), indent=1) + "\n")


def criteria(bundle: Path) -> list[dict[str, Any]]:
    """For each criterion and threshold, of state propagation: perplexity over full depth's, and mean depth."""
    llm = LLM(bundle)
    documents = list(first_tokens([llm.encode(text) for text in load_documents(DATA, "test")], SCORED_TOKENS))
    (off,) = score_documents(llm.engine, documents, [ExitPolicy()], "propagate")
    found = []
    for name in CRITERIA:
        for policy, threshold in policies(llm, documents, name):
            (scores,) = score_documents(llm.engine, documents, [policy], "propagate")
            ratio, depth = scores.perplexity / off.perplexity, float(scores.depths.mean())
            found.append({"criterion": name, "threshold": threshold, "ppl_ratio": ratio, "mean_depth": depth})
    return found


def policies(llm: LLM, documents: Sequence[Sequence[int]], name: str) -> Iterator[tuple[ExitPolicy, float]]:
    """A criterion with thresholds all over what it says of some of the text; patience with the numbers of exits that there are."""
    layers = llm.stack.exit_layers
    if name == "patience":
        for patience in range(1, len(layers) - 1):
            yield ExitPolicy.create(name, None, layers, patience=patience), float(patience)
        return
    said, _, _ = record_exits(llm.engine, list(first_tokens(documents, 4000)), ExitPolicy.create(name, [0.5], layers))
    for threshold in np.unique(np.quantile(said, QUANTILES)):
        yield ExitPolicy.create(name, [float(threshold)], layers), float(threshold)


@main.command()
def collect() -> None:
    """Everything that was measured, as one file."""
    runs = []
    for name, method in METHODS.items():
        for seed in SEEDS:
            folder = RUNS / name / f"seed-{seed}"
            if not (folder / "table.json").is_file():
                continue
            table, lines = json.loads((folder / "table.json").read_text(encoding="utf-8")), metrics(folder / "checkpoint")
            rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
            kept = ("threshold", "catch_up", "ppl", "ppl_ratio", "mean_depth", "speedup", "ideal_speedup", "tokens_per_second")
            runs.append(
                {
                    "method": name,
                    "seed": seed,
                    "learning_rate": best_rate(name),
                    "trials": {f"{rate:g}": full_depth(trial(name, rate)) for rate in LEARNING_RATES},
                    "validation": [line["perplexity"] for line in lines if "perplexity" in line][-1],
                    "minutes": round(STEPS * 2048 / rates[len(rates) // 2] / 60, 1),
                    "rows": [{key: row[key] for key in kept} for row in table["rows"]],
                    "exits": table["exits"],
                    "versions": table["versions"],
                    "criteria": json.loads((folder / "criteria.json").read_text(encoding="utf-8")) if method.early else [],
                }
            )
    write_whole(OUT, json.dumps({"data": DATA, "steps": STEPS, "tokens": STEPS * 2048, "runs": runs}) + "\n")
    click.echo(f"{OUT}: {len(runs)} of {len(METHODS) * len(SEEDS)} runs")


if __name__ == "__main__":
    main()
