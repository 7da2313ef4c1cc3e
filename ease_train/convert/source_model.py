"""A model as Hugging Face writes it, and as it is here: one table of names, read in both directions.

Llama 2 and 3, SmolLM2, Mistral (without its sliding window), Qwen2 and 2.5, Qwen3. Knows nothing about files.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from ease_common.errors import ModelImportError, shown
from ease_train.convert.grid import Grid
from ease_train.convert.text_format import TextFormat
from ease_train.training.config import ModelConfig

OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
CONFIG = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
UNSAID = {  # what transformers takes where config.json does not name a field; None follows from other fields
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


@dataclass(frozen=True)
class Family:
    """A model_type of config.json: its class in transformers, and where it is not Llama.

    unsaid   its values of fields that a config.json does not name
    refused  fields that ask for what this decoder has not, unless they are false
    biased   queries, keys and values have biases
    normed   query and key heads have norms
    slides   attention has a window: "always", where it is "asked" for, or "never"
    """

    architecture: str
    unsaid: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    biased: bool = False
    normed: bool = False
    slides: str = "asked"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", refused=("attention_bias", "mlp_bias"), slides="never"),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072},
        slides="always",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {"num_key_value_heads": 32, "max_position_embeddings": 32768}, biased=True
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
        refused=("attention_bias",),
        normed=True,
    ),
}
LARGEST = 1 << 20  # of any size or count: the bytes of a matrix then stay within 64 bits
MOST_POSITIONS = 1 << 22  # whose rotary tables take 2 GB
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROTARY_BUFFER = ".rotary_emb.inv_freq"  # which old files hold beside the weights


@dataclass(frozen=True)
class SourceModel:
    """A Hugging Face model: the values of its config.json, its weights by their names there, and what comes
    along.

    `report` says line by line what of the source was used, where its reader counts that. `grids` are the
    matrices that the source holds in whole numbers, by our names.
    """

    config: dict[str, Any]
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    text_format: TextFormat
    report: tuple[str, ...] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a weight; None for what belongs to the exits, and to this project alone."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    head, _, rest = module.partition(".")
    number, _, inner = rest.partition(".")
    return (
        f"model.layers.{number}.{IN_LAYER[inner]}.{kind}" if head == "layers" and inner in IN_LAYER else None
    )


def model_config(
    values: Mapping[str, Any], exits: tuple[int, ...], max_positions: int | None, tied: bool
) -> ModelConfig:
    """A config.json as ours; `tied` says whether embedding and LM head are one matrix.

    Raises ModelImportError for what would compute otherwise.
    """
    family = _known_family(values)
    if missing := [name for name in NEEDED if name not in values]:
        raise ModelImportError(
            f"config.json lacks {', '.join(missing)}: it describes no decoder of the Llama family"
        )
    values = {**UNSAID, **family.unsaid, **values}
    for name in CONFIG.values():
        _check_field(name, values[name])
    given = {ours: values[theirs] for ours, theirs in CONFIG.items() if values[theirs] is not None}
    positions = _positions(values, family)
    positions = min(max_positions or positions, positions)
    if positions > MOST_POSITIONS:
        raise ModelImportError(
            f"config.json has a context of {shown(positions)} tokens, expected at most {MOST_POSITIONS}; cut "
            "it: --max-positions N"
        )
    return ModelConfig.from_dict(
        {
            "num_kv_heads": given["num_heads"],
            **given,
            **rotary_settings(values),
            "tie_embeddings": tied,
            "max_positions": positions,
            "attention_bias": family.biased,
            "qk_norm": family.normed,
            "exits": exits,
        },
        "config.json",
    )


def _check_field(name: str, value: Any) -> None:
    """Raise ModelImportError unless a field of config.json holds what transformers would take."""
    if name == "tie_word_embeddings":
        sound = type(value) is bool
        expected = "true or false"
    elif name == "rms_norm_eps":
        sound = type(value) in (int, float) and 0 <= value < 1
        expected = "a number from 0 to 1"
    else:
        follows = value is None and UNSAID.get(name, 0) is None
        most = math.inf if name in ("max_position_embeddings", "sliding_window") else LARGEST
        sound = follows or (type(value) is int and 1 <= value <= most)
        expected = "a whole number of at least 1" + ("" if most == math.inf else f" and at most {most}")
    if not sound:
        raise ModelImportError(f"config.json has {name} = {shown(value)}, expected {expected}")


def _known_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises ModelImportError, in one line, for an architecture or a feature that this decoder has not.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelImportError(
            f"models of the type {shown(kind)} cannot be imported; expected one of: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    unsupported = {
        "hidden_act": values.get("hidden_act", "silu") not in ("silu", "swish"),  # two names of one function
        "quantization_config": values.get("quantization_config") is not None,
        **{name: bool(values.get(name)) for name in family.refused},
    }
    for name, found in unsupported.items():
        if found:
            raise ModelImportError(
                f"config.json has {name} = {shown(values[name])}, which this decoder does not compute"
            )
    return family


def _positions(values: Mapping[str, Any], family: Family) -> int:
    """The longest text that this model attends to as a whole: past its sliding window, where it has one, it
    would not.
    """
    longest: int = values["max_position_embeddings"]
    slides = family.slides == "always" or (family.slides == "asked" and values.get("use_sliding_window"))
    window = values["sliding_window"] if slides else None
    if window is not None:
        _check_field("sliding_window", window)
    return longest if window is None else min(longest, window)


def rotary_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, in the form of transformers before version 5, or of 5
    (rope_parameters).

    Where a file has both, transformers reads the first. Raises ModelImportError.
    """
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ModelImportError(f"config.json has rope_scaling = {shown(found)}, expected an object")
    rope = dict(found)
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = values.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "linear", "llama3") or share != 1.0:
        raise ModelImportError(
            f"rotary embeddings of the kind {shown(kind)} (share {shown(share)}) cannot be imported; "
            "expected: default, linear, llama3"
        )
    names = {"default": (), "linear": LLAMA3_SCALING[:1], "llama3": LLAMA3_SCALING}[kind]
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    for name in ("rope_theta", *names):
        value: Any = rope.get(name)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ModelImportError(
                f"config.json has rotary embeddings of the kind '{kind}' with {name} = {shown(value)}, "
                "expected a number above 0"
            )
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": tuple(float(rope[name]) for name in names),
    }


def source_config(config: ModelConfig) -> dict[str, Any]:
    """Our configuration as a config.json. Raises ModelImportError for what transformers' models have not."""
    if not config.final_norm or config.routed_layers or (config.qk_norm and config.attention_bias):
        raise ModelImportError(
            "only models with a final norm, without routed layers, and not with both bias and q/k norm "
            "have a transformers form"
        )
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    values = {theirs: getattr(config, ours) for ours, theirs in CONFIG.items()}
    scaling = dict(zip(LLAMA3_SCALING, config.rope_scaling, strict=False))
    rope: dict[str, Any] = {"rope_type": ("default", "linear", "", "", "llama3")[len(scaling)], **scaling}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        **values,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "dtype": "float32",
        "torch_dtype": "float32",
    }
