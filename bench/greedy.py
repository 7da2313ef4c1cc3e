"""Greedy answers of a bundle on a device, and how far two files of them agree.

python bench/greedy.py BUNDLE --device cuda --json cuda.json
python bench/greedy.py --compare cpu.json cuda.json
"""

import json
from pathlib import Path

import click

from ease_eval.peers.compare import agreement
from ease_runtime.llm import LLM
from ease_runtime.ort.device import DEVICES

NUM_PROMPTS = 8
PROMPT = 64
NEW = 128


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--compare", is_flag=True, help="The files are two of --json's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the answers here.")
def main(files: tuple[Path, ...], device: str, compare: bool, json_file: Path | None) -> None:
    """Answer with how pieces of bench/engine.py go on, or compare answers."""
    if compare:
        first, second = (json.loads(file.read_text(encoding="utf-8"))["answers"] for file in files)
        shares = [agreement(b, a, frozenset()) for a, b in zip(first, second, strict=True)]
        same = f"{shares.count(1.0)} of {len(shares)} answers are the same"
        click.echo(f"{same}; mean agreement {sum(shares) / len(shares):.3f}")
        return
    llm = LLM(files[0], device=device)
    ids = llm.encode_part(Path(__file__).with_name("engine.py").read_text(encoding="utf-8"))
    answers = []
    for number in range(NUM_PROMPTS):
        prompt = ids[number * PROMPT : (number + 1) * PROMPT]
        sequence = llm.engine.start(prompt, max_new_tokens=NEW)
        answers.append([token.id for token in llm.engine.generate(sequence)])
    if json_file:
        found = {"bundle": str(files[0]), "device": llm.stack.device.name, "answers": answers}
        json_file.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
