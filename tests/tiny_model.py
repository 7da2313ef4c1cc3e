"""The seeded tiny checkpoint and bundle of the tests, also for a place without torch:

python tests/tiny_model.py OUT      # writes OUT/checkpoint and OUT/bundle
"""

import random
import sys
from pathlib import Path
from typing import Any

EXITS = (2, 4, 6)
CONTEXT = 288  # more than two steps of the cache, and no multiple of one


def corpus() -> str:
    """About 40,000 characters with some structure: sentences over a small vocabulary, in paragraphs."""
    rng = random.Random(0)
    subjects = ["the king", "a shepherd", "the river", "my servant", "the stone", "a voice"]
    verbs = ["went up to", "spoke unto", "looked upon", "was with", "did follow", "came before"]
    places = ["the mountain", "the city", "the people", "the sea", "the house of the lord", "the field"]

    def sentence() -> str:
        return (
            f"And {rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(places)}; and it was "
            f"{rng.choice(['good', 'so', 'night', 'day'])}."
        )

    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(150)) + "\n"


def write_checkpoint(path: Path, exits: tuple[int, ...] = EXITS, **model_fields: Any) -> None:
    """A seeded model of 6 layers, untrained; its head is scaled so that confidences spread over (0, 1).

    Whatever the exits, layers, embedding and head hold the same weights. `model_fields` are more fields of
    ModelConfig.
    """
    import torch

    from ease_train.data.tokens import train_tokenizer
    from ease_train.model.decoder import Decoder
    from ease_train.training.checkpoint import Checkpoint, save_checkpoint
    from ease_train.training.config import ModelConfig, Recipe, TokenizerConfig, TrainConfig

    tokenizer_config = TokenizerConfig(kind="bpe", bpe_vocab_size=320)
    tokenizer = train_tokenizer([corpus()], tokenizer_config)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        exits=exits,
        **{"dim": 64, "max_positions": CONTEXT, "tie_embeddings": False, **model_fields},
    )
    train = TrainConfig(layer_weights={6: 1.0}, steps=1, sequence_length=min(64, config.max_positions))
    torch.manual_seed(7)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # layers that move the state, so that the exits differ
        model.embed.weight.mul_(20.0)
        if not config.tie_embeddings:
            model.lm_head.weight.mul_(25.0)
        own = [(kind, part) for leave in model.early_exits.values() for kind, part in leave.own.items()]
        for norm in (part for kind, part in own if kind == "norm"):
            norm.weight.uniform_(0.5, 1.5)
        for gate in (weight for kind, part in own if kind == "gate" for weight in part.parameters()):
            gate.mul_(60.0)  # probabilities that spread, too
        for adapter in (weight for kind, part in own if kind == "adapter" for weight in part.parameters()):
            if adapter.ndim == 2:
                adapter.normal_(std=0.2)
    save_checkpoint(
        Checkpoint(
            Recipe("tiny", "", "", config, tokenizer_config, train), model, tokenizer, 0, "corpus.txt"
        ),
        path,
    )


if __name__ == "__main__":
    from ease_export.build import export_bundle

    out = Path(sys.argv[1])
    write_checkpoint(out / "checkpoint")
    export_bundle(out / "checkpoint", out / "bundle")
