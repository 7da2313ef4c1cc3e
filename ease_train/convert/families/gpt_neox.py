"""GPT-NeoX and Pythia: LayerNorm, biases everywhere, attention and MLP of the same state, an MLP without a
gate, heads rotated in part.
"""

from collections.abc import Callable
from typing import Any

from ease_train.convert.family import Family, Values, rope_of, rotary_fields, rotary_settings
from ease_train.training.config import ModelConfig

BIASED = {"norm": "layer", "gated": False, "mlp_bias": True}


def settings(values: Values) -> dict[str, Any]:
    rope = rope_of(values)
    rope.setdefault("rope_theta", values.get("rotary_emb_base", 10000.0))
    rope.setdefault("partial_rotary_factor", values.get("rotary_pct", 0.25))
    rotary = rotary_settings({**values, "rope_scaling": rope, "partial_rotary_factor": None}, partial=True)
    biased = values["attention_bias"] is True
    parallel = values["use_parallel_residual"] is True
    return {
        **rotary,
        **BIASED,
        "attention_bias": biased,
        "output_bias": biased,
        "parallel_residual": parallel,
    }


def fields(config: ModelConfig) -> dict[str, Any]:
    share = config.rotary_dim / config.head_dim if config.rotary_dim else 1.0
    values = rotary_fields(config)
    return {
        **values,
        "rope_parameters": {**values["rope_parameters"], "partial_rotary_factor": share},
        "rotary_pct": share,
        "rotary_emb_base": config.rope_theta,
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
    }


def gguf_fields(values: Values, read: Callable[..., Any]) -> dict[str, Any]:
    return {"use_parallel_residual": read("use_parallel_residual", bool, True)}


FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    partial=True,
    unsaid={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    names={"norm_eps": "layer_norm_eps", "num_kv_heads": None, "head_dim": None},
    settings=settings,
    fields=fields,
    outer={"gpt_neox.embed_in": "embed", "gpt_neox.final_layer_norm": "norm", "embed_out": "lm_head"},
    layers="gpt_neox.layers",
    in_layer={
        "input_layernorm": ("attention_norm",),
        "attention.query_key_value": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.dense": ("attention.o_proj",),
        "post_attention_layernorm": ("mlp_norm",),
        "mlp.dense_h_to_4h": ("mlp.up_proj",),
        "mlp.dense_4h_to_h": ("mlp.down_proj",),
    },
    by_head=True,
    gguf="gptneox",
    gguf_in_layer={"attn_qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj")},
    gguf_fields=gguf_fields,
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
