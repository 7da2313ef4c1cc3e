"""Mistral: Llama, in its first version with a sliding window in every layer."""

from typing import Any

from ease_train.convert.family import Family, Values, rotary_fields, rotary_settings, windows
from ease_train.training.config import ModelConfig


def settings(values: Values) -> dict[str, Any]:
    return {**rotary_settings(values), **windows_everywhere(values)}


def windows_everywhere(values: Values) -> dict[str, Any]:
    """A sliding window of every layer, whatever layer_types says."""
    return windows({**values, "layer_types": None}, range(1, values["num_hidden_layers"] + 1))


def fields(config: ModelConfig) -> dict[str, Any]:
    return {**rotary_fields(config), "sliding_window": config.sliding_window or None}


FAMILY = Family(
    architecture="MistralForCausalLM",
    unsaid={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    settings=settings,
    fields=fields,
)
