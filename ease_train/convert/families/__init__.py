"""The families that can be imported: a file each, named like its `model_type` in config.json."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ease_common.errors import ModelImportError, shown
from ease_train.convert.family import Family

MISSING = {  # what this decoder has not, and models that need it
    "mixtures of experts": (
        *(
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "phimoe",
            "gpt_oss",
            "deepseek_v2",
            "deepseek_v3",
        ),
        *("granitemoe", "olmoe", "dbrx", "jamba", "llama4", "llama4_text", "glm4_moe", "minimax"),
    ),
    "ALiBi": ("bloom", "mpt", "baichuan"),
    "learned positions": ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "xglm", "biogpt"),
    "rotated pairs side by side": (
        "gptj",
        "codegen",
        "glm",
        "glm4",
        "chatglm",
        "helium",
        "cohere",
        "cohere2",
    ),
    "recurrent layers": (
        *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "bamba", "zamba", "zamba2", "lfm2"),
        *("nemotron_h", "falcon_h1"),
    ),
    "encoders": ("t5", "mt5", "bart", "whisper", "bert", "roberta"),
    "images or sound": (
        "gemma3",
        "gemma3n",
        "gemma4",
        "mllama",
        "llava",
        "mistral3",
        "qwen2_vl",
        "qwen2_5_vl",
    ),
    "softcapped scores": ("gemma2",),
    "scaled residuals": ("granite", "minicpm"),
    "norms behind attention and MLP only": ("olmo2", "olmo3", "exaone4"),
    "squared ReLU": ("nemotron", "arcee", "bitnet"),
}
SIGNS = {  # fields of config.json that ask for it, unless they are false or 1
    "mixtures of experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "ALiBi": ("alibi",),
    "encoders": ("is_encoder_decoder",),
    "images or sound": ("vision_config", "audio_config"),
    "recurrent layers": ("state_size", "ssm_cfg", "mamba_d_state"),
}


def known() -> list[str]:
    """Every model_type that has a file, Llama first."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(names, key=lambda name: (name != "llama", name))


def family_named(kind: str) -> Family:
    """The family of a model_type that is known."""
    found: Family = import_module(f"ease_train.convert.families.{kind}").FAMILY
    return found


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises ModelImportError, in one line, for a model or a feature that this decoder has not.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in known():
        why = f" ({what} are not computed here)" if (what := missing(values)) else ""
        raise ModelImportError(
            f"models of the type {shown(kind)} cannot be imported{why}; expected one of: {', '.join(known())}"
        )
    family = family_named(kind)
    unsupported = {
        "quantization_config": values.get("quantization_config") is not None,
        **{name: bool(values.get(name)) for name in family.refused},
    }
    for name, found in unsupported.items():
        if found:
            raise ModelImportError(
                f"config.json has {name} = {shown(values[name])}, which this decoder does not compute"
            )
    return family


def missing(values: Mapping[str, Any]) -> str:
    """What a model needs that this decoder has not, as far as its config.json shows."""
    kind = values.get("model_type")
    for what, fields in SIGNS.items():
        found = [values.get(name) for name in fields]
        if any(value is True or value not in (None, 0, 1) for value in found):
            return what
    return next((what for what, kinds in MISSING.items() if kind in kinds), "")
