"""Full-depth greedy decoding beside other runtimes on the same weights, each a process, taking turns in one
run.

    make peers                                   # .venv-peers: transformers, onnxruntime-genai
    python bench/peers.py CHECKPOINT BUNDLE [--json FILE]
    python bench/peers.py CHECKPOINT BUNDLE --device cuda --runtimes genai --prompt-tokens 32 --batch 1,8,32

What `ease-eval compare` does, for a checkpoint that may have no tokenizer worth the name: the prompts are
made-up ids, of several lengths, and the longer ones are answered by eight rows, too.
"""

import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console

from ease_common.files import write_whole
from ease_common.lists import list_of
from ease_eval.cli.speed import show_comparison
from ease_eval.peers.compare import FLOATS, RUNTIMES, ComparisonSettings, Workload, compare_peers
from ease_eval.provenance import provenance
from ease_runtime.llm import LLM

WORKLOADS = ((32, 4, 1), (128, 4, 1), (1024, 1, 1), (1024, 1, 8))  # tokens, prompts, rows
WORK = Path("runs/bench/peers")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--runtimes", **list_of(click.Choice(RUNTIMES), "NAME[,NAME...]"), default=[",".join(RUNTIMES)])
@click.option("--device", type=click.Choice(list(FLOATS)), default="cpu", show_default=True)
@click.option("--python", default=".venv-peers/bin/python", help="That of the peers.")
@click.option("--prompt-tokens", type=int, help="Prompts of this length alone.")
@click.option(
    "--batch", **list_of(click.IntRange(1), "N[,N...]"), default=["1"], help="Rows, with --prompt-tokens."
)
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="For what peers are given.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(
    checkpoint: Path,
    bundle: Path,
    runtimes: tuple[str, ...],
    device: str,
    python: str,
    prompt_tokens: int | None,
    batch: tuple[int, ...],
    work: Path,
    json_file: Path | None,
) -> None:
    """Generate beside other runtimes."""
    folder = work / "huggingface"
    if not folder.is_dir():
        subprocess.run(
            [sys.executable, "-m", "ease_train.cli", "export-hf", str(checkpoint), str(folder)], check=True
        )
    source = provenance(bundle, LLM(bundle, device=device), 0)
    sizes = [(prompt_tokens, 1, rows) for rows in batch] if prompt_tokens else WORKLOADS
    workloads = [
        Workload(
            [[(7 * i * i + 3 * i + number) % 40000 for i in range(length)] for number in range(count)], rows
        )
        for length, count, rows in sizes
    ]
    settings = ComparisonSettings(bundle, folder, Path(python), runtimes=runtimes, device=device, work=work)
    result = compare_peers(settings, workloads, tell=print)
    if json_file:
        write_whole(json_file, result.to_json(source))
    show_comparison(result, Console())


if __name__ == "__main__":
    main()
