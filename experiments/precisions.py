"""Weights of 32, 8 and 4 bits: perplexity at full depth, sizes, memory, and what the export takes.

    python experiments/precisions.py     # adds to docs/experiments/precisions.json what it lacks

Needs what scripts/demo-llm.sh leaves in runs/llm, and the `small` model of docs/experiments/small.md in
runs/small.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from ease_common.files import write_whole

RUNS = Path("runs/precisions")
OUT = Path("docs/experiments/precisions.json")
MODELS = {  # checkpoint, text, scored tokens
    "SmolLM2-135M-Instruct": (Path("runs/llm/untouched"), "wikitext-2", 4000),
    "small": (Path("runs/small/final"), "kjv", 20_000),
}
PRECISIONS = ("fp32", "int8", "int4")
LOAD = """
import sys
from ease_runtime.llm import LLM
llm = LLM(sys.argv[1], num_threads=1)
lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
print(int(lines["VmRSS"].split()[0]) / 1e3)
"""


def export(checkpoint: Path, bundle: Path, precision: str) -> dict[str, float]:
    """Seconds and largest memory of an export, all its threads' CPU time."""
    what = ["--precision", precision, "--target", "cpu"]
    command = ["ease-export", "build", str(checkpoint), str(bundle), *what]
    _, status, used = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise click.ClickException(f"failed: {' '.join(command)}")
    return {"export_cpu_seconds": used.ru_utime + used.ru_stime, "export_peak_mb": used.ru_maxrss / 1e3}


def figures(checkpoint: Path, bundle: Path, precision: str, data: str, tokens: int) -> dict[str, Any]:
    exported = export(checkpoint, bundle, precision)
    scores = bundle.with_suffix(".json")
    asked = ["--data", data, "--thresholds", "off", "--scored-tokens", str(tokens), "--json", str(scores)]
    subprocess.run(["ease-eval", "ppl", str(bundle), *asked], check=True)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(bundle)], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(scores.read_text(encoding="utf-8"))
    return {
        "ppl": found["rows"][0]["ppl"],
        "bundle_mb": sum(path.stat().st_size for path in bundle.iterdir()) / 1e6,
        "loaded_mb": float(loaded),
        **exported,
        "versions": found["versions"],
    }


@click.command()
def main() -> None:
    """Every model in every precision."""
    rows = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.is_file() else []
    for model, (checkpoint, data, tokens) in MODELS.items():
        for precision in PRECISIONS:
            if (model, precision) in {(row["model"], row["precision"]) for row in rows}:
                continue
            made = figures(checkpoint, RUNS / f"{model}-{precision}", precision, data, tokens)
            rows.append({"model": model, "precision": precision, "data": data, "tokens": tokens, **made})
            write_whole(OUT, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
