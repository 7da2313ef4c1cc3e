"""Fixtures of the training tests: one thread, tiny recipes, and a plain reference model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ease_train.training.config import Recipe

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "dim": 16,
        "num_layers": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        "ffn_dim": 32,
        "max_positions": 32,
        "exits": [2, 3, 4],
    },
    "tokenizer": {"kind": "char"},
    "train": {
        "layer_weights": {2: 0.3, 3: 0.2, 4: 1.0},
        "steps": 12,
        "batch_size": 2,
        "sequence_length": 16,
        "warmup_steps": 3,
        "log_every": 1,
        "eval_every": 6,
        "eval_tokens": 64,
        "save_every": 4,
    },
}


def tiny_recipe(**tables: dict[str, Any]) -> Recipe:
    known = {**TINY, **{table: {} for table in tables if table not in TINY}}
    return Recipe.from_dict(
        {"name": "tiny", **{t: {**fields, **tables.get(t, {})} for t, fields in known.items()}}, "tiny"
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit-identical sums whatever ran before, and no fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """`make_recipe(train={"steps": 3})`: the tiny recipe with some fields replaced."""
    return tiny_recipe


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe()


@pytest.fixture(scope="session")
def small_corpus(corpus_text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local text file of about 90,000 characters: 22 documents, so that every split has one."""
    path: Path = tmp_path_factory.mktemp("small") / "small.txt"
    path.write_text((corpus_text * 3)[:92_000], encoding="utf-8")
    return str(path)
