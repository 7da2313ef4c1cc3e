"""Full-depth greedy decoding beside other runtimes on the same weights, each a process, taking turns in one run.

    make peers                                   # .venv-peers: transformers, onnxruntime-genai
    python bench/peers.py CHECKPOINT BUNDLE [--json FILE]

A peer that cannot start is named with its reason, and left out. Each worker reads a line {"prompt": ids, "new": N} and answers
with the seconds of the first token and of the others, and the ids.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEERS = {"ease": "own", "onnxruntime-genai": "genai", "transformers eager": "transformers"}
PROMPT, NEW, ROUNDS = 32, 64, 5
WORK = Path("runs/bench/peers")


def answer(run: Any) -> None:
    """Serve requests with `run(prompt, new)`, an iterator over token ids."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        clock, ids = [time.perf_counter()], []
        for token in run(request["prompt"], request["new"]):
            clock.append(time.perf_counter())
            ids.append(int(token))
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        print(json.dumps({"first": clock[1] - clock[0], "rest": clock[-1] - clock[1], "ids": ids, "resident": memory}), flush=True)


def own(_: Path, bundle: Path) -> None:
    from ease_runtime.engine import Engine
    from ease_runtime.stack import OrtStack

    engine = Engine(OrtStack(bundle))

    def run(prompt: list[int], new: int) -> Any:
        return (token.id for token in engine.generate(engine.start(prompt, max_new_tokens=new)))

    answer(run)


def genai(folder: Path, _: Path) -> None:
    import onnxruntime_genai as og

    built = WORK / "genai"
    if not (built / "model.onnx").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(built), "-p", "fp32", "-e", "cpu"]
        subprocess.run([*command, "-c", str(WORK / "cache")], check=True, stdout=subprocess.DEVNULL)
    model = og.Model(str(built))

    def run(prompt: list[int], new: int) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(new):
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    answer(run)


def transformers(folder: Path, _: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def run(prompt: list[int], new: int) -> Any:
        inputs, cache = torch.tensor([prompt]), None
        for _ in range(new):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, inputs = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield inputs.item()

    answer(run)


class Worker:
    """A peer's process. `error` says why there is none."""

    def __init__(self, name: str, folder: Path, bundle: Path) -> None:
        python = sys.executable if name == "ease" else ".venv-peers/bin/python"
        self.name, self.error = name, None if Path(python).is_file() else "make peers has not been run"
        self.answers: list[dict[str, Any]] = []
        if self.error is None:
            command = [python, __file__, "--worker", PEERS[name], str(folder), str(bundle)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.error = None if self._read().get("ready") else "its process did not start"

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        return {}

    def ask(self, prompt: list[int], new: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        self.process.stdin.flush()
        return self._read()


def main(checkpoint: Path, bundle: Path, json_file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    folder = WORK / "huggingface"
    if not folder.is_dir():
        subprocess.run([sys.executable, "-m", "ease_train.cli", "export-hf", str(checkpoint), str(folder)], check=True)
    workers = [Worker(name, folder, bundle) for name in PEERS]
    running = [worker for worker in workers if worker.error is None]
    for number in range(ROUNDS + 1):
        prompt = [(7 * i * i + 3 * i + number) % 40000 for i in range(PROMPT)]
        for worker in running:
            found = worker.ask(prompt, NEW)
            if number:
                worker.answers.append(found)
    rows, table = [], Table("runtime", "tokens/s", "ease is", "first token ms", "resident MB", "tokens as ease")
    for worker in workers:
        if worker.error is not None:
            rows.append({"runtime": worker.name, "error": worker.error})
            table.add_row(worker.name, worker.error)
            continue
        ratios = [theirs["rest"] / ours["rest"] for theirs, ours in zip(worker.answers, running[0].answers, strict=True)]
        same = sum(theirs["ids"] == ours["ids"] for theirs, ours in zip(worker.answers, running[0].answers, strict=True))
        row = {
            "runtime": worker.name,
            "tokens_per_second": (NEW - 1) / statistics.median(a["rest"] for a in worker.answers),
            "ease_over_this": statistics.median(ratios),
            "first_token_ms": 1000 * statistics.median(a["first"] for a in worker.answers),
            "resident_mb": worker.answers[-1]["resident"] / 1e6,
            "same_texts": f"{same} of {ROUNDS}",
        }
        rows.append(row)
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"prompt": PROMPT, "new": NEW, "rounds": ROUNDS, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        globals()[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
