"""Qwen3: Llama with norms on query and key heads, and heads of a width of their own."""

from typing import Any

from ease_train.convert.families.qwen2 import asked_fields, asked_windows
from ease_train.convert.family import Family, Values, rotary_settings


def settings(values: Values) -> dict[str, Any]:
    return {**rotary_settings(values), **asked_windows(values), "qk_norm": True}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    unsaid={"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    refused=("attention_bias",),
    settings=settings,
    fields=asked_fields,
    gguf="qwen3",
)
