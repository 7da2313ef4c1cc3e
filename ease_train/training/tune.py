"""Exits for a model that is already trained: new exits, heads and methods on the weights of a checkpoint.

    trainer = begin_tuning(load_checkpoint(path), load_recipe("ee-tuning"), {"exits": [4, 12]}, source="kjv")

The architecture and tokenizer are the checkpoint's; exits, exit heads, method and training settings the
recipe's. A new exit's norm starts as the final norm, its own head as the LM head, its adapter as the identity
(EE-Tuning, Pan et al. 2024, arXiv 2402.00518), its block as the layer that follows, a reduced head as the LM
head's rows of the text's most frequent tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ease_common.errors import ConfigError
from ease_train.model.decoder import Block, Decoder, grown
from ease_train.training.checkpoint import Checkpoint
from ease_train.training.config import OF_THE_EXITS, OPTIONS, Recipe, cut_warmup, set_option
from ease_train.training.parallel import Workers
from ease_train.training.trainer import Trainer, known_data, token_counts


def tuned_recipe(trained: Recipe, recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The checkpoint's model with the recipe's exits, method and training, and the options over them.

    Raises ConfigError.
    """
    values = recipe.to_dict()
    shape = trained.model.to_dict()
    values["model"] = {**shape, **{name: values["model"][name] for name in OF_THE_EXITS}, "gates": []}
    values["tokenizer"] = trained.tokenizer.to_dict()
    for name, value in options.items():
        table = OPTIONS.get(name, ("unknown",))[0]
        if table == "tokenizer" or (table == "model" and name not in OF_THE_EXITS):
            raise ConfigError(
                f"{name} = {value!r} would change the trained model; expected settings of its exits: "
                f"{', '.join(OF_THE_EXITS)}"
            )
        set_option(values, name, value)
    cut_warmup(values, options)
    return Recipe.from_dict(values, recipe.name)


def with_exits(model: Decoder, recipe: Recipe) -> Decoder:
    """A decoder with the recipe's exits and the weights of `model`, whose matrices are not copied."""
    found = grown(recipe.model, model.state_dict())
    shapes = {name: value.shape for name, value in found.state_dict().items()}
    kept = {name for name, value in model.state_dict().items() if shapes.get(name) == value.shape}
    for layer, leave in found.early_exits.items():
        starts: dict[str, nn.Module] = {"norm": model.norm, "head": model.lm_head}
        if leave.block is not None and isinstance(model.layers[layer], Block):
            starts["adapter"] = model.layers[layer]
        for name, part in leave.own.items():
            if name in starts and any(
                f"exits.{layer}.{name}.{weight}" not in kept for weight in part.state_dict()
            ):
                part.load_state_dict(starts[name].state_dict())
    return found


def has_new_reduced_head(trained: Decoder, grown: Decoder) -> bool:
    """Whether a reduced head's tokens are still to be chosen: there is one, and the trained model had none of
    its size.
    """
    had = trained.reduced_head
    has = grown.reduced_head
    return has is not None and (had is None or len(had.ids) != len(has.ids))


def begin_tuning(
    trained: Checkpoint,
    recipe: Recipe,
    options: Mapping[str, Any],
    source: str | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    sharded: bool = False,
    counted: str | None = None,
) -> Trainer:
    """A new run from the checkpoint's weights, on its data or another source. Raises ConfigError, DataError.

    A reduced head knows the most frequent tokens of `counted`, by default of the run's own text; more text
    says better which they are.
    """
    workers = Workers.join(device, sharded)
    chosen = tuned_recipe(trained.recipe, recipe, options)
    torch.manual_seed(chosen.train.seed)
    model = with_exits(trained.model, chosen)
    data, sums = (source, {}) if source else (known_data(trained), trained.data_sha256)
    tuned = Checkpoint(
        chosen,
        model,
        trained.tokenizer,
        0,
        data,
        text_format=trained.text_format,
        data_sha256=dict(sums),
        base=recipe,
        grids=trained.grids,
    )
    if model.reduced_head is not None and has_new_reduced_head(trained.model, model):
        text = replace(tuned, data=counted, data_sha256={}, num_documents={}) if counted else tuned
        model.reduced_head.choose_tokens(token_counts(text, cache), model.lm_head.weight)
    elif counted is not None:
        raise ConfigError(
            f"count data {counted} has no effect: no reduced head is to be chosen (--exit-head reduced)"
        )
    return Trainer(tuned, workers, cache)
