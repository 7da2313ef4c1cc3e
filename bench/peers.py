"""Full-depth greedy decoding beside other runtimes on the same weights, each a process, taking turns in one
run.

    make peers                                   # .venv-peers: transformers, onnxruntime-genai
    python bench/peers.py CHECKPOINT BUNDLE [--json FILE]

What `ease-eval compare` does, for a checkpoint that may have no tokenizer worth the name: the prompts are
made-up ids, of several lengths, and the longer ones are answered by eight rows, too.
"""

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ease_common.files import write_whole
from ease_eval.cli.speed import show_comparison
from ease_eval.peers.compare import ComparisonSettings, Workload, compare_peers
from ease_eval.provenance import provenance
from ease_runtime.llm import LLM

WORKLOADS = ((32, 4, 1), (128, 4, 1), (1024, 1, 1), (1024, 1, 8))  # tokens, prompts, rows
WORK = Path("runs/bench/peers")


def main(checkpoint: Path, bundle: Path, json_file: Path | None) -> None:
    folder = WORK / "huggingface"
    if not folder.is_dir():
        subprocess.run(
            [sys.executable, "-m", "ease_train.cli", "export-hf", str(checkpoint), str(folder)], check=True
        )
    source = provenance(bundle, LLM(bundle), 0)
    workloads = [
        Workload(
            [[(7 * i * i + 3 * i + number) % 40000 for i in range(length)] for number in range(count)], rows
        )
        for length, count, rows in WORKLOADS
    ]
    result = compare_peers(
        ComparisonSettings(bundle, folder, Path(".venv-peers/bin/python"), work=WORK),
        workloads,
        tell=print,
    )
    if json_file:
        write_whole(json_file, result.to_json(source))
    show_comparison(result, Console())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
