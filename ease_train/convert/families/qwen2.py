"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and sliding windows where they are asked
for.
"""

from typing import Any

from ease_train.convert.family import (
    Family,
    Values,
    check_field,
    rotary_fields,
    rotary_settings,
    window_fields,
    windows,
)
from ease_train.training.config import ModelConfig


def asked_windows(values: Values) -> dict[str, Any]:
    """The windows of a Qwen, of layers from `max_window_layers` on unless layer_types names others."""
    if not values.get("use_sliding_window"):
        return {}
    first = values.get("max_window_layers", 28)
    if first != 0:
        check_field("max_window_layers", first)
    return windows(values, range(first + 1, values["num_hidden_layers"] + 1))


def asked_fields(config: ModelConfig) -> dict[str, Any]:
    """The same as config.json has it."""
    return {**rotary_fields(config), **window_fields(config), "use_sliding_window": config.sliding_window > 0}


def settings(values: Values) -> dict[str, Any]:
    return {**rotary_settings(values), **asked_windows(values), "attention_bias": True}


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    unsaid={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    settings=settings,
    fields=asked_fields,
    gguf="qwen2",
)
