"""How often each exit of some checkpoints says what their last layer says, on text that none of them has
learned from.

    python scripts/exit_agreement.py runs/llm/untouched runs/llm/tuned --text runs/llm/text/heldout.jsonl \\
        --json runs/llm/agreement.json

The checkpoints must share their layers (they were tuned with frozen ones), which then run once a document. A
document is read alone, from its beginning; of one with a `prompt` only the tokens of the answer count, which
are those that would be generated. `confident half` is the agreement on that half of the tokens where the
exit's top probability is highest. Intervals (95 %) resample documents. The last layer is there, too, for its
perplexity.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import Checkpoint, load_checkpoint

RESAMPLES = 1000
SEED = 42
LONGEST = 700  # tokens of a document that are read


@dataclass
class Found:
    """An exit on one kind of text, a list entry a document: of each token its agreement, confidence, loss in
    nats, and whether its head has the last layer's token."""

    agrees: list[NDArray[np.bool_]] = field(default_factory=list)
    confidence: list[NDArray[np.float32]] = field(default_factory=list)
    losses: list[NDArray[np.float32]] = field(default_factory=list)
    known: list[NDArray[np.bool_]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        agrees = np.concatenate(self.agrees)
        order = np.argsort(-np.concatenate(self.confidence), kind="stable")
        hits = np.array([part.sum() for part in self.agrees])
        sizes = np.array([len(part) for part in self.agrees])
        chosen = np.random.default_rng(SEED).integers(0, len(sizes), (RESAMPLES, len(sizes)))
        low, high = np.quantile(hits[chosen].sum(axis=1) / sizes[chosen].sum(axis=1), (0.025, 0.975))
        return {
            "documents": len(sizes),
            "tokens": len(agrees),
            "agreement": round(float(agrees.mean()), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
            "confident_half": round(float(agrees[order[: len(order) // 2]].mean()), 4),
            "confident_quarter": round(float(agrees[order[: len(order) // 4]].mean()), 4),
            "perplexity": round(float(np.exp(np.concatenate(self.losses).mean())), 3),
            "known_to_head": round(float(np.concatenate(self.known).mean()), 4),
        }


def layers_of(model: Decoder) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("embed.", "layers.", "norm.", "lm_head."))
    }


def check_layers(checkpoints: dict[str, Checkpoint]) -> None:
    """Raise UsageError unless all have the layers of the first."""
    (first, reference), *others = (
        (name, layers_of(checkpoint.model)) for name, checkpoint in checkpoints.items()
    )
    for name, layers in others:
        if layers.keys() != reference.keys() or not all(
            torch.equal(value, layers[key]) for key, value in reference.items()
        ):
            raise click.UsageError(f"{name} has other layers than {first}; measure it alone")


def read_document(row: dict[str, Any], checkpoint: Checkpoint) -> tuple[Tensor, int]:
    """Ids (1, S), and how many positions come before the one that predicts the first token that counts."""
    tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode(row["text"], add_special_tokens=False).ids
    prompt = len(tokenizer.encode(row["prompt"], add_special_tokens=False).ids) if "prompt" in row else 0
    start = [] if "prompt" in row else [checkpoint.text_format.separator]
    return torch.tensor([[*start, *ids][:LONGEST]]), max(0, prompt - 1)


@torch.no_grad()
def measure(
    checkpoints: dict[str, Checkpoint], rows: list[dict[str, Any]]
) -> dict[str, dict[str, dict[int, Found]]]:
    """checkpoint -> kind of text -> exit's layer -> what was found."""
    found: dict[str, dict[str, dict[int, Found]]] = {name: {} for name in checkpoints}
    base = next(iter(checkpoints.values()))
    wanted = sorted(
        {layer for checkpoint in checkpoints.values() for layer in checkpoint.recipe.model.exits[:-1]}
    )
    with click.progressbar(rows, label="documents") as bar:
        for row in bar:
            ids, skip = read_document(row, base)
            states = {}
            hidden = base.model.embed(ids[:, :-1])
            done = 0
            for layer in (*wanted, base.recipe.model.num_layers):
                hidden = base.model.run_layers(hidden, done + 1, layer)
                done = layer
                states[layer] = hidden
            last = base.model.lm_head(base.model.norm(hidden[0, skip:])).argmax(dim=-1)
            for name, checkpoint in checkpoints.items():
                for layer in checkpoint.recipe.model.exits:
                    exit_found = found[name].setdefault(row["source"], {}).setdefault(layer, Found())
                    exit_hidden = checkpoint.model.exit_hidden(states[layer], layer)[0, skip:]
                    note(exit_found, checkpoint.model, layer, exit_hidden, last, ids[0, skip + 1 :])
    return found


def note(
    found: Found, model: Decoder, layer: int, exit_hidden: Tensor, last: Tensor, targets: Tensor
) -> None:
    """Add one document. Shape: exit_hidden (n, D), last and targets (n)."""
    head = model.exit(layer).head
    logprobs = head(exit_hidden).log_softmax(dim=-1)
    ids = head.ids
    confidence, top = logprobs.max(dim=-1)
    found.agrees.append((top == last).numpy())
    found.confidence.append(confidence.numpy())
    found.losses.append(-logprobs.gather(1, targets[:, None])[:, 0].numpy())
    found.known.append(
        (torch.ones_like(last, dtype=torch.bool) if ids is None else torch.isin(last, ids)).numpy()
    )


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Documents: text, source, and for answers prompt.",
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--documents", default=0, help="At most so many of each kind; 0 takes all.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def main(paths: tuple[Path, ...], text: Path, out: Path | None, documents: int, threads: int | None) -> None:
    """Measure the exits of checkpoints."""
    if threads:
        torch.set_num_threads(threads)
    checkpoints = {str(path): load_checkpoint(path) for path in paths}
    check_layers(checkpoints)
    lines = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    kinds = sorted({row["source"] for row in lines})
    rows = [
        row for kind in kinds for row in [row for row in lines if row["source"] == kind][: documents or None]
    ]
    found = measure(checkpoints, rows)
    figures = {
        name: {
            kind: {layer: exit_found.figures() for layer, exit_found in exits.items()}
            for kind, exits in by_kind.items()
        }
        for name, by_kind in found.items()
    }
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, by_kind in figures.items():
        for kind, exits in by_kind.items():
            for layer, values in exits.items():
                shares = " ".join(
                    f"{values[key]:.3f}"
                    for key in ("agreement", "confident_half", "confident_quarter", "known_to_head")
                )
                click.echo(
                    f"{name} {kind} layer {layer}: agreement, confident half, quarter, bound {shares}, "
                    f"perplexity {values['perplexity']}"
                )


if __name__ == "__main__":
    main()
