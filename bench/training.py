"""What training costs: tokens a second beside the `transformers` Trainer, and the peak memory of a step with
four exits.

    python bench/training.py [--json FILE] [--rounds N] [--steps N]

Speed: the standard recipe (full-depth loss only) and a LlamaForCausalLM of the same size take the same blocks
in the same batches with the same optimizer, in turns; medians over all steps but the first two of a turn.
Memory: a step of the demo model with a vocabulary of 32768 in a process of its own, beyond what the imports
and the model's start take.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ease_train.methods.losses import Objective, exit_loss
from ease_train.methods.method import Distill
from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig, load_recipe
from ease_train.training.trainer import Trainer

MEMORY = (
    ("one exit", "12", 0.0),
    ("four exits", "3,6,9,12", 0.0),
    ("four exits, distilled", "3,6,9,12", 1.0),
)
WARM_UP = 2  # steps of a turn that do not count


def our_turn(trainer: Trainer, steps: int) -> list[float]:
    """Seconds a step."""
    ends = [time.perf_counter()]
    for _ in range(steps):
        trainer.train_step(trainer.next_batch())
        ends.append(time.perf_counter())
    return [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


def llama_trainer(trainer: Trainer, steps: int) -> tuple[Any, list[float]]:
    """The `transformers` Trainer of a model of the same size on the same blocks, and the list that its steps'
    ends go to.
    """
    import transformers

    model = trainer.recipe.model
    settings = trainer.settings
    ends: list[float] = []
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
    )
    arguments = transformers.TrainingArguments(
        output_dir="runs/bench",
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.grad_clip,
        optim="adamw_torch_fused",
        logging_steps=settings.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
    )

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends[:] = [time.perf_counter()]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    blocks = [
        torch.from_numpy(block[:-1].astype("int64"))
        for block in trainer.blocks[: 4 * steps * settings.batch_size]
    ]
    llama = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in llama.parameters()) == sum(p.numel() for p in trainer.model.parameters())
    data = [{"input_ids": ids, "labels": ids} for ids in blocks]
    watched = transformers.Trainer(model=llama, args=arguments, train_dataset=data, callbacks=[Watch()])
    watched.remove_callback(transformers.PrinterCallback)
    return watched, ends


def their_turn(trainer: Any, ends: list[float]) -> list[float]:
    """Seconds a step."""
    trainer.train()
    return [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


def speed(rounds: int, steps: int) -> dict[str, float]:
    """Medians in tokens a second of both, in turns."""
    ours = Trainer.begin(load_recipe("standard").with_options({"steps": 10_000}), "kjv")
    theirs, ends = llama_trainer(ours, steps)
    seconds: dict[str, list[float]] = {"ease_train": [], "transformers": []}
    for _ in range(rounds):
        seconds["ease_train"] += our_turn(ours, steps)
        seconds["transformers"] += their_turn(theirs, ends)
    tokens = ours.sequences_a_step * ours.settings.sequence_length
    found = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return {**found, "ratio": found["ease_train"] / found["transformers"]}


def peak_megabytes() -> float:
    """The process's largest resident size so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss would begin with the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def step_memory(exits: tuple[int, ...], distill: float) -> float:
    """Megabytes that two steps take beyond the imports."""
    torch.set_num_threads(1)
    before = peak_megabytes()
    model = Decoder(ModelConfig(vocab_size=32768, dim=256, num_layers=12, max_positions=256, exits=exits))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(32768, (4, 257))
    for _ in range(2):
        loss, _ = exit_loss(
            model,
            ids[:, :-1],
            ids[:, 1:],
            Objective(weights=dict.fromkeys(exits, 1.0), distill=Distill(weight=distill, temperature=1.0)),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_megabytes() - before


def memory() -> dict[str, float]:
    """Megabytes of each setting, each in a process of its own."""
    found = {}
    for name, exits, distill in MEMORY:
        command = [sys.executable, __file__, "--memory-of", exits, str(distill)]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def show(report: dict[str, Any]) -> None:
    speeds = report["speed"]
    sizes = report["memory"]
    table = Table("trainer", "tokens/s", "of transformers'", title="training, full-depth loss")
    for name in ("transformers", "ease_train"):
        table.add_row(name, f"{speeds[name]:.0f}", f"{speeds[name] / speeds['transformers']:.2f}x")
    Console().print(table)
    table = Table("step", "peak MB", "of one exit's", title="memory, vocabulary of 32768")
    for name, size in sizes.items():
        table.add_row(name, f"{size:.0f}", f"{size / sizes['one exit']:.2f}x")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each trainer")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("EXITS", "DISTILL"), help="print the megabytes of one setting"
    )
    arguments = parser.parse_args()
    if arguments.memory_of:
        exits, distill = arguments.memory_of
        print(step_memory(tuple(int(layer) for layer in exits.split(",")), float(distill)))
        return
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    report = {"versions": versions, "speed": speed(arguments.rounds, arguments.steps), "memory": memory()}
    show(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
