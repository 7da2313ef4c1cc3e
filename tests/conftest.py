"""Fixtures that every package's tests share: a seeded tiny checkpoint, the bundles cut from it, and a small corpus."""

import os
import platform
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest


def pytest_report_header() -> str:
    versions = f"onnxruntime {onnxruntime.__version__} ({', '.join(onnxruntime.get_available_providers())}), numpy {np.__version__}"
    return f"{versions}, python {platform.python_version()}, {os.cpu_count()} CPUs"


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outside(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` keeps its caches with the tests' own files, and asks no hub."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """About 40,000 characters with some structure: sentences over a small vocabulary, in paragraphs."""
    rng = random.Random(0)
    subjects = ["the king", "a shepherd", "the river", "my servant", "the stone", "a voice"]
    verbs = ["went up to", "spoke unto", "looked upon", "was with", "did follow", "came before"]
    places = ["the mountain", "the city", "the people", "the sea", "the house of the lord", "the field"]
    sentence = lambda: f"And {rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(places)}; and it was {rng.choice(['good', 'so', 'night', 'day'])}."  # noqa: E731
    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(150)) + "\n"


@pytest.fixture(scope="session")
def corpus_file(corpus_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(corpus_text * 4, encoding="utf-8")
    return path


TINY_EXITS = (2, 4, 6)
TINY_CONTEXT = 288  # more than two steps of the cache, and no multiple of one


@pytest.fixture(scope="session")
def tiny_checkpoint(corpus_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded model of 6 layers with exits at 2, 4 and 6, untrained; its head is scaled so that confidences spread over (0, 1)."""
    import torch

    from ease_train.checkpoint import Checkpoint, save_checkpoint
    from ease_train.config import ModelConfig, Recipe, TokenizerConfig, TrainConfig
    from ease_train.model import Decoder
    from ease_train.tokens import train_tokenizer

    tokenizer_config = TokenizerConfig(kind="bpe", bpe_vocab_size=320)
    tokenizer = train_tokenizer([corpus_text], tokenizer_config)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), dim=64, num_layers=6, num_heads=4, num_kv_heads=2, max_positions=TINY_CONTEXT, exits=TINY_EXITS, tie_embeddings=False
    )
    train = TrainConfig(layer_weights={2: 0.3, 6: 1.0}, steps=1, sequence_length=64)
    torch.manual_seed(7)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # layers that move the state, so that the exits differ
        model.embed.weight.mul_(20.0)
        model.lm_head.weight.mul_(25.0)
        for norm in model.exit_norms.values():
            norm.weight.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_checkpoint(Checkpoint(Recipe("tiny", "", "", config, tokenizer_config, train), model, tokenizer, 0, "corpus.txt"), path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`: three segments."""
    from ease_export.build import export_bundle

    path = tmp_path_factory.mktemp("tiny_bundle") / "bundle"
    export_bundle(tiny_checkpoint, path)
    return path
