"""Phi-3 and Phi-4-mini: Llama with fused weights, heads that may be rotated in part, and a sliding window.

Of longrope the factors for texts up to the original length are read, and the context is cut to it: past it
transformers turns every position anew by others, which no cache can follow.
"""

import math
from typing import Any

from ease_common.errors import ModelImportError, shown
from ease_train.convert.families import mistral
from ease_train.convert.family import (
    Family,
    Values,
    check_field,
    head_width,
    positive,
    rope_of,
    rotary_dim,
    rotary_settings,
)
from ease_train.training.config import ModelConfig

LONG = ("longrope", "su", "yarn")  # three names of one


def settings(values: Values) -> dict[str, Any]:
    rope = rope_of(values)
    long = rope.get("rope_type", rope.get("type")) in LONG
    return {
        **(_longrope(values, rope) if long else rotary_settings(values, partial=True)),
        **mistral.windows_everywhere(values),
    }


def _longrope(values: Values, rope: dict[str, Any]) -> dict[str, Any]:
    original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    check_field("original_max_position_embeddings", original)
    part = rotary_dim(values, rope)
    pairs = (part or head_width(values)) // 2
    short = rope.get("short_factor")
    if not isinstance(short, list) or len(short) != pairs:
        raise ModelImportError(
            f"config.json has short_factor = {shown(short)}, expected {pairs} numbers, one "
            "for each rotated pair"
        )
    factor = positive(rope.get("factor") or values["max_position_embeddings"] / original, "factor")
    gain = rope.get("attention_factor")
    if gain is None:
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {
        "rope_theta": positive(rope.get("rope_theta", values.get("rope_theta", 10000.0)), "rope_theta"),
        "rope_factors": tuple(positive(number, "a short_factor") for number in short),
        "rope_gain": positive(gain, "attention_factor"),
        "rotary_dim": part,
        "max_positions": min(original, values["max_position_embeddings"]),
    }


def fields(config: ModelConfig) -> dict[str, Any]:
    values = mistral.fields(config)
    if not config.rope_factors:
        return values
    rope = {
        **values["rope_parameters"],
        "rope_type": "longrope",
        "short_factor": list(config.rope_factors),
        "long_factor": list(config.rope_factors),
        "attention_factor": config.rope_gain,
    }
    return {
        **values,
        "rope_scaling": rope,
        "rope_parameters": rope,
        "original_max_position_embeddings": config.max_positions,
    }


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    partial=True,
    unsaid={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    settings=settings,
    fields=fields,
    in_layer={
        "input_layernorm": ("attention_norm",),
        "self_attn.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "self_attn.o_proj": ("attention.o_proj",),
        "post_attention_layernorm": ("mlp_norm",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    },
    gguf="phi3",
    gguf_in_layer={
        "attn_qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "ffn_up": ("mlp.gate_proj", "mlp.up_proj"),
    },
    gguf_windows=True,
)
