"""Exits for a model that is already trained: new exits, heads and methods on the weights of a checkpoint.

    trainer = begin_tuning(load_checkpoint(path), load_recipe("ee-tuning"), {"exits": [4, 12]}, source="kjv")

The architecture and tokenizer are the checkpoint's; exits, exit heads, method and training settings the recipe's. A new exit's norm
starts as the final norm, its own head as the LM head, its adapter as the identity (EE-Tuning, Pan et al. 2024, arXiv 2402.00518).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ease_train.checkpoint import Checkpoint
from ease_train.config import SECTIONS, Recipe
from ease_train.errors import ConfigError, did_you_mean
from ease_train.model import Decoder
from ease_train.parallel import Workers
from ease_train.trainer import Trainer

OF_THE_EXITS = ("exits", "exit_norm", "exit_adapter", "adapter_dim", "exit_head")


def tuned_recipe(trained: Recipe, recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The checkpoint's model with the recipe's exits, method and training, and the options over them. Raises ConfigError."""
    values, shape = recipe.to_dict(), trained.model.to_dict()
    values["model"] = {**shape, **{name: values["model"][name] for name in OF_THE_EXITS}, "gates": []}
    values["tokenizer"] = trained.tokenizer.to_dict()
    for name, value in options.items():
        table = next((table for table, section in SECTIONS.items() if name in section.__dataclass_fields__), None)
        if table == "tokenizer" or (table == "model" and name not in OF_THE_EXITS):
            raise ConfigError(
                f"{name} = {value!r} would change the trained model; expected settings of its exits: {', '.join(OF_THE_EXITS)}"
            )
        if table is None:
            raise ConfigError(f"unknown field '{name}'; {did_you_mean(name, OF_THE_EXITS)}")
        values[table][name] = value
    return Recipe.from_dict(values, recipe.name)


def with_exits(model: Decoder, recipe: Recipe) -> Decoder:
    """A decoder with the recipe's exits and the weights of `model`."""
    grown = Decoder(recipe.model)
    grown.load_state_dict(grown.state_dict() | {n: v for n, v in model.state_dict().items() if n in grown.state_dict()})
    had = {int(name) for name in (*model.exit_norms, *model.exit_heads, *model.adapters)}
    with torch.no_grad():
        for layer in {*recipe.model.exits[:-1]} - had:
            if str(layer) in grown.exit_norms:
                grown.exit_norms[str(layer)].load_state_dict(model.norm.state_dict())
            if str(layer) in grown.exit_heads:
                grown.head(layer).weight.copy_(model.lm_head.weight)
    return grown


def begin_tuning(
    trained: Checkpoint,
    recipe: Recipe,
    options: Mapping[str, Any],
    source: str | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    sharded: bool = False,
) -> Trainer:
    """A new run from the checkpoint's weights, on its data or another source. Raises ConfigError, DataError."""
    workers = Workers.join(device, sharded)
    chosen = tuned_recipe(trained.recipe, recipe, options)
    torch.manual_seed(chosen.train.seed)
    model = with_exits(trained.model, chosen)
    tuned = Checkpoint(chosen, model, trained.tokenizer, 0, source or trained.data, conventions=trained.conventions)
    return Trainer(tuned, workers, cache)
