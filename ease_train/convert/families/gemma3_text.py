"""Gemma 3, text: norms before and after, a gate with GELU, norms on query and key heads, sliding and global
layers with rotary bases of their own, scaled embeddings and queries.
"""

from collections.abc import Callable
from typing import Any

from ease_common.errors import ModelImportError, shown
from ease_train.convert.family import (
    IN_LAYER,
    Family,
    Values,
    check_field,
    positive,
    rope_of,
    rotary_fields,
    rotary_settings,
    window_fields,
    windows,
)
from ease_train.training.config import ModelConfig

PATTERN = 6  # every so manieth layer is a global one
LAYERS_OF_27B = 62


def settings(values: Values) -> dict[str, Any]:
    every = values.get("sliding_window_pattern", PATTERN)
    check_field("sliding_window_pattern", every)
    layers = [layer for layer in range(1, values["num_hidden_layers"] + 1) if layer % every]
    found = windows(values, layers)
    far, near = _rotary(values)
    local = {"local_rope_theta": near} if found and near != far["rope_theta"] else {}
    width = values["query_pre_attn_scalar"]
    return {
        **far,
        **found,
        **local,
        "embed_scale": float(values["hidden_size"]) ** 0.5,
        "query_scale": positive(width, "query_pre_attn_scalar") ** -0.5,
        "post_norms": True,
        "qk_norm": True,
    }


def _rotary(values: Values) -> tuple[dict[str, Any], float]:
    """The rotary settings of global layers, and the base of sliding ones."""
    rope = rope_of(values)
    parts = {
        "full_attention": {},
        "sliding_attention": {},
        **{k: v for k, v in rope.items() if k.endswith("_attention")},
    }
    if parts == {"full_attention": {}, "sliding_attention": {}}:
        parts["full_attention"] = rope
    far, near = (dict(part) if isinstance(part, dict) else part for part in parts.values())
    for part in (far, near):
        if not isinstance(part, dict):
            raise ModelImportError(f"config.json has rope_parameters = {shown(rope)}, expected objects")
    if near.get("rope_type", "default") != "default":
        raise ModelImportError(
            f"config.json has scaled rotary embeddings in sliding layers ({shown(near)}), which this decoder "
            "does not compute"
        )
    base = near.get("rope_theta", values.get("rope_local_base_freq", 10000.0))
    plain = {**values, "rope_scaling": far, "rope_theta": values.get("rope_theta", 1000000.0)}
    return rotary_settings(plain), positive(base, "the rotary base of sliding layers")


def gguf_fields(values: Values, read: Callable[..., Any]) -> dict[str, Any]:
    """What llama.cpp takes for granted: a global layer in six, which alone are scaled; scores divided by the
    root of a head's width, but in the model of 27B.
    """
    every = read("attention.sliding_window_pattern", int, PATTERN)
    width = values["head_dim"]
    if values["num_hidden_layers"] == LAYERS_OF_27B:
        width = values["hidden_size"] // values["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": read("rope.freq_base_swa", float, 10000.0)}
    return {
        "sliding_window_pattern": every,
        "query_pre_attn_scalar": width,
        "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": local},
    }


def fields(config: ModelConfig) -> dict[str, Any]:
    values = rotary_fields(config)
    near = config.local_rope_theta or config.rope_theta
    return {
        **values,
        **window_fields(config),
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        },
        "rope_scaling": None,
        "rope_local_base_freq": near,
        "query_pre_attn_scalar": round((config.query_scale or config.head_dim**-0.5) ** -2),
        "attention_bias": False,
    }


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    unsaid={
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    refused=(
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ),
    names={"activation": "hidden_activation"},
    settings=settings,
    fields=fields,
    in_layer={
        **IN_LAYER,
        "post_attention_layernorm": ("attention_out_norm",),
        "pre_feedforward_layernorm": ("mlp_norm",),
        "post_feedforward_layernorm": ("mlp_out_norm",),
    },
    norm_offset=1.0,
    gguf="gemma3",
    gguf_fields=gguf_fields,
    gguf_windows=True,
)
