"""A bundle with SmolLM2-135M's shape and random weights, for the clock: 30 layers of width 576, a vocabulary
of 49,152.

python bench/llama_shape.py runs/bench/135m      # writes checkpoint/ and bundle/ there, unless they are there
"""

import sys
import time
from pathlib import Path

import torch

from ease_export.build import export_bundle
from ease_train.data.tokens import train_tokenizer
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import Checkpoint, save_checkpoint
from ease_train.training.config import ModelConfig, Recipe, TokenizerConfig, TrainConfig

EXITS = (10, 15, 30)


def make(folder: Path) -> Path:
    """The bundle's path."""
    if not (folder / "checkpoint").is_dir():
        tokenizer_config = TokenizerConfig(kind="bpe", bpe_vocab_size=300)
        config = ModelConfig(
            vocab_size=49152,
            dim=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            ffn_dim=1536,
            max_positions=2048,
            rope_theta=1e5,
            exits=EXITS,
            tie_embeddings=True,
        )
        train = TrainConfig(layer_weights={30: 1.0}, steps=1, sequence_length=64)
        torch.manual_seed(0)
        recipe = Recipe("135m-shape", "", "", config, tokenizer_config, train)
        tokenizer = train_tokenizer(["no text is needed: the weights are random " * 50], tokenizer_config)
        save_checkpoint(Checkpoint(recipe, Decoder(config), tokenizer, 0, "none"), folder / "checkpoint")
    if not (folder / "bundle").is_dir():
        began = time.perf_counter()
        export_bundle(folder / "checkpoint", folder / "bundle")
        print(f"exported in {time.perf_counter() - began:.0f} s")
    return folder / "bundle"


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
