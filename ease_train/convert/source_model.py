"""A model as Hugging Face writes it, and as it is here, by what its family's file says. Knows nothing about
files.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ease_common.errors import ConfigError, ModelImportError, shown
from ease_train.convert.families import family_named, family_of, known
from ease_train.convert.family import (
    ACTIVATIONS,
    FIELDS,
    MOST_POSITIONS,
    UNSAID,
    Family,
    Values,
    check_field,
)
from ease_train.convert.grid import Grid
from ease_train.convert.text_format import TextFormat
from ease_train.training.config import OF_THE_EXITS, ModelConfig

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OF_EASE = (*OF_THE_EXITS, "gates", "gate_width", "capacity", "routing_rule")  # of which no config.json knows


class Weights(Mapping[str, Tensor]):
    """A source's weights by our names, each read when it is asked for, in the source's type where that is
    fp32, fp16 or bf16.
    """

    strange: tuple[str, ...] = ()  # what of the source nothing here has a place for

    @abstractmethod
    def called(self, name: str) -> str:
        """What the source calls one of our weights."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The type of one of our weights, which is not read for it."""


@dataclass(frozen=True)
class SourceModel:
    """Another project's model: the values of its config.json, its weights, and what comes along.

    `report` says line by line what of the source was used, where its reader counts that. `grids` are the
    matrices that the source holds in whole numbers, by our names.
    """

    config: dict[str, Any]
    weights: Weights
    tokenizer: Tokenizer
    text_format: TextFormat
    report: tuple[str, ...] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)


def filled_in(values: Values, family: Family) -> dict[str, Any]:
    """The values of a config.json, with what transformers takes for those that it does not name."""
    return {**UNSAID, **family.unsaid, **values}


def fields_of(family: Family) -> dict[str, str]:
    """Our settings, and what its config.json calls them."""
    return {ours: theirs for ours, theirs in {**FIELDS, **family.names}.items() if theirs is not None}


def model_config(
    values: Values, exits: tuple[int, ...], max_positions: int | None, tied: bool
) -> ModelConfig:
    """A config.json as ours; `tied` says whether embedding and LM head are one matrix.

    Raises ModelImportError for what would compute otherwise.
    """
    family = family_of(values)
    if missing := [name for name in NEEDED if name not in values]:
        raise ModelImportError(
            f"config.json lacks {', '.join(missing)}: it describes no decoder that is known here"
        )
    values = filled_in(values, family)
    names = fields_of(family)
    for name in names.values():
        check_field(name, values[name])
    given = {ours: values[theirs] for ours, theirs in names.items() if values[theirs] is not None}
    settings = {
        "num_kv_heads": given["num_heads"],
        **given,
        "activation": ACTIVATIONS[given["activation"]],
        **family.settings(values),
    }
    positions = min(max_positions or settings["max_positions"], settings["max_positions"])
    if positions > MOST_POSITIONS:
        raise ModelImportError(
            f"config.json has a context of {shown(positions)} tokens, expected at most {MOST_POSITIONS}; cut "
            "it: --max-positions N"
        )
    if settings.get("sliding_window", 0) >= positions and "local_rope_theta" not in settings:
        settings |= {"sliding_window": 0, "windowed_layers": ()}
    return ModelConfig.from_dict(
        {**settings, "tie_embeddings": tied, "max_positions": positions, "exits": exits}, "config.json"
    )


def source_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that computes what a configuration says, and its config.json.

    Raises ModelImportError where transformers has none.
    """
    plain: dict[str, Any] = {f.name: f.default for f in fields(ModelConfig) if f.name in OF_EASE}
    expected = replace(config, **{**plain, "exits": ()})
    for kind in known():
        family = family_named(kind)
        values = _written(kind, family, config)
        try:
            found = model_config(values, (), None, config.tie_embeddings)
        except (ModelImportError, ConfigError):
            continue
        if found == expected:
            return family, values
    raise ModelImportError(
        "no family that is known here computes this model: routed layers, a missing final norm and some "
        "settings together (biases and q/k norms) have no transformers form"
    )


def _written(kind: str, family: Family, config: ModelConfig) -> dict[str, Any]:
    """A configuration as a family's config.json."""
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    values = {theirs: getattr(config, ours) for ours, theirs in fields_of(family).items()}
    values[fields_of(family)["activation"]] = activations[config.activation]
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        **values,
        "attention_bias": False,
        **family.fields(config),
    }
