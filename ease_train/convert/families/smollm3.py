"""SmolLM3: Llama, whose every fourth layer has no rotary embedding."""

from typing import Any

from ease_common.errors import ModelImportError, shown
from ease_train.convert.families.qwen2 import asked_fields
from ease_train.convert.family import Family, Values, check_field, rotary_settings, windows
from ease_train.training.config import ModelConfig


def settings(values: Values) -> dict[str, Any]:
    unrotated = _unrotated(values)
    asked = bool(values.get("use_sliding_window"))
    return {
        **rotary_settings(values),
        **(windows(values, unrotated) if asked else {}),
        "unrotated_layers": unrotated,
    }


def _unrotated(values: Values) -> tuple[int, ...]:
    """Layers without a rotary embedding, from 1."""
    count = values["num_hidden_layers"]
    turned = values.get("no_rope_layers")
    if turned is None:
        every = values.get("no_rope_layer_interval", 4)
        check_field("no_rope_layer_interval", every)
        return tuple(range(every, count + 1, every))
    if not isinstance(turned, list) or len(turned) < count or any(kind not in (0, 1) for kind in turned):
        raise ModelImportError(
            f"config.json has no_rope_layers = {shown(turned)}, expected 0 or 1 for each of {count} layers"
        )
    return tuple(number for number, kind in enumerate(turned[:count], 1) if not kind)


def fields(config: ModelConfig) -> dict[str, Any]:
    turned = [int(layer not in config.unrotated_layers) for layer in range(1, config.num_layers + 1)]
    return {
        **asked_fields(config),
        "no_rope_layers": turned,
    }


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    unsaid={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "sliding_window": None,
    },
    refused=("attention_bias", "mlp_bias"),
    settings=settings,
    fields=fields,
    gguf="smollm3",
    paired=True,
)
