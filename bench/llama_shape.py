"""Bundles of a Llama's shape with random weights, for the clock.

    python bench/llama_shape.py runs/bench/135m                 # writes checkpoint/ and bundle/ there
    python bench/llama_shape.py runs/gpu/1b --shape 1b --precision fp16 --target cuda     # bundle-fp16/

What is there stays. With --reduced-head early exits have a head over that many tokens.
135m: SmolLM2-135M's 30 layers of width 576 and vocabulary of 49,152; 1b: Llama-3.2-1B's
16 layers of width 2,048 and vocabulary of 128,256; tiny: for trying commands.
fp32 is called bundle/, others bundle-PRECISION/.
"""

import time
from pathlib import Path

import click
import torch

from ease_export.build import export_bundle
from ease_runtime.bundle.manifest import TARGETS
from ease_train.data.tokens import train_tokenizer
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import Checkpoint, save_checkpoint
from ease_train.training.config import ModelConfig, Recipe, TokenizerConfig, TrainConfig

SHAPES = {
    "135m": {
        "vocab_size": 49152,
        "dim": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "ffn_dim": 1536,
        "exits": (8, 15, 30),
        "rope_theta": 1e5,
    },
    "1b": {
        "vocab_size": 128256,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_dim": 8192,
        "exits": (4, 8, 16),
        "rope_theta": 5e5,
    },
    "tiny": {
        "vocab_size": 49152,
        "dim": 64,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_dim": 128,
        "exits": (2, 4, 8),
        "rope_theta": 1e4,
    },
}


def make_checkpoint(folder: Path, shape: str, reduced_head: int) -> None:
    """A checkpoint of random weights, unless it is there."""
    if folder.is_dir():
        return
    head = {"exit_head": "reduced", "exit_vocab_size": reduced_head} if reduced_head else {}
    tokenizer_config = TokenizerConfig(kind="bpe", bpe_vocab_size=300)
    config = ModelConfig(**{"max_positions": 2048, "tie_embeddings": True, **SHAPES[shape], **head})
    train = TrainConfig(layer_weights={config.num_layers: 1.0}, steps=1, sequence_length=64)
    torch.manual_seed(0)
    recipe = Recipe(f"{shape}-shape", "", "", config, tokenizer_config, train)
    tokenizer = train_tokenizer(["no text is needed: the weights are random " * 50], tokenizer_config)
    save_checkpoint(Checkpoint(recipe, Decoder(config), tokenizer, 0, "none"), folder)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="As ease-export build has it.")
@click.option("--target", type=click.Choice(TARGETS), help="As ease-export build has it.")
@click.option("--reduced-head", default=0, help="Tokens of the early exits' head; 0: the model's own.")
def main(folder: Path, shape: str, precision: str, target: str | None, reduced_head: int) -> None:
    """Write what is missing in FOLDER."""
    make_checkpoint(folder / "checkpoint", shape, reduced_head)
    bundle = folder / ("bundle" if precision == "fp32" else f"bundle-{precision}")
    if not bundle.is_dir():
        began = time.perf_counter()
        export_bundle(folder / "checkpoint", bundle, precision, target=target)
        click.echo(f"exported in {time.perf_counter() - began:.0f} s")
    click.echo(bundle)


if __name__ == "__main__":
    main()
