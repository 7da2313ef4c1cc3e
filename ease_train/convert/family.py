"""What a family's file says (`families/`): a model as Hugging Face writes it, and as it is here, in both
directions. Knows nothing about files.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ease_common.errors import ModelImportError, shown
from ease_train.training.config import ModelConfig

Values = Mapping[str, Any]  # of a config.json

OUTER = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "lm_head"}
IN_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("attention_norm",),
    "self_attn.q_proj": ("attention.q_proj",),
    "self_attn.k_proj": ("attention.k_proj",),
    "self_attn.v_proj": ("attention.v_proj",),
    "self_attn.o_proj": ("attention.o_proj",),
    "self_attn.q_norm": ("attention.q_norm",),
    "self_attn.k_norm": ("attention.k_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "mlp.up_proj": ("mlp.up_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
FIELDS: dict[str, str | None] = {
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
    "activation": "hidden_act",
}
UNSAID: dict[str, Any] = {  # where config.json does not name a field; None follows from other fields
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "hidden_act": "silu",
}
ACTIVATIONS = {  # the first of each is what is written back
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_new": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
}
LARGEST = 1 << 20  # of any size or count: the bytes of a matrix then stay within 64 bits
MOST_POSITIONS = 1 << 22  # whose rotary tables take 2 GB
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROTATED = ("attention.q_proj", "attention.k_proj")


def rotary_settings(values: Values, partial: bool = False) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and, where a family rotates a `partial` head, `rotary_dim`, in the form of
    transformers before version 5, or of 5 (rope_parameters).

    Where a file has both, transformers reads the first. Raises ModelImportError.
    """
    rope = rope_of(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rotary_dim(values, rope)
    if kind not in ("default", "linear", "llama3") or (part and not partial):
        share = f" of {part} numbers of a head" if part else ""
        raise ModelImportError(
            f"rotary embeddings of the kind {shown(kind)}{share} cannot be imported; "
            "expected: default, linear, llama3, of whole heads"
        )
    names = {"default": (), "linear": LLAMA3_SCALING[:1], "llama3": LLAMA3_SCALING}[kind]
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    numbers = {
        name: positive(rope.get(name), f"rotary embeddings of the kind '{kind}' with {name}")
        for name in ("rope_theta", *names)
    }
    return {
        "rope_theta": numbers["rope_theta"],
        "rope_scaling": tuple(numbers[name] for name in names),
        "rotary_dim": part,
    }


def rope_of(values: Values) -> dict[str, Any]:
    """The object that a config.json describes its rotary embedding by. Raises ModelImportError."""
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ModelImportError(f"config.json has rope_scaling = {shown(found)}, expected an object")
    return dict(found)


def rotary_dim(values: Values, rope: Values) -> int:
    """The width of the rotated part of a head; 0 for all of it. Raises ModelImportError."""
    share = values.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    width = head_width(values)
    if share == 1.0:
        return 0
    part = int(width * share) if type(share) in (int, float) and 0 < share < 1 else 0
    if part < 2 or part % 2:
        raise ModelImportError(
            f"config.json has partial_rotary_factor = {shown(share)}, expected a share that makes an even "
            f"part of a head's {width} numbers"
        )
    return part


def head_width(values: Values) -> int:
    """The width of an attention head."""
    width: int = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return width


def positive(value: Any, what: str) -> float:
    """A number of config.json. Raises ModelImportError unless it is above 0."""
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ModelImportError(f"config.json has {what} = {shown(value)}, expected a number above 0")
    return float(value)


def check_field(name: str, value: Any) -> None:
    """Raise ModelImportError unless a field of config.json holds what transformers would take."""
    if name == "tie_word_embeddings":
        sound = type(value) is bool
        expected = "true or false"
    elif name.endswith("norm_eps"):
        sound = type(value) in (int, float) and 0 <= value < 1
        expected = "a number from 0 to 1"
    elif name in ("hidden_act", "hidden_activation"):
        sound = isinstance(value, str) and value in ACTIVATIONS
        expected = f"one that this decoder computes: {', '.join(ACTIVATIONS)}"
    else:
        follows = value is None and UNSAID.get(name, 0) is None
        most = math.inf if name in ("max_position_embeddings", "sliding_window") else LARGEST
        sound = follows or (type(value) is int and 1 <= value <= most)
        expected = "a whole number of at least 1" + ("" if most == math.inf else f" and at most {most}")
    if not sound:
        raise ModelImportError(f"config.json has {name} = {shown(value)}, expected {expected}")


def windows(values: Values, layers: Sequence[int]) -> dict[str, Any]:
    """The settings of a sliding window, which these `layers` have unless `layer_types` names others.

    Raises ModelImportError.
    """
    window = values["sliding_window"]
    if window is None:
        return {}
    check_field("sliding_window", window)
    if (kinds := layer_types(values)) is not None:
        layers = [number for number, kind in enumerate(kinds, 1) if kind == "sliding_attention"]
    window = min(window, MOST_POSITIONS)
    return {"sliding_window": window, "windowed_layers": tuple(layers)} if layers else {}


def layer_types(values: Values) -> list[str] | None:
    """What each layer attends to, where config.json says so. Raises ModelImportError."""
    kinds = values.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
        raise ModelImportError(f"config.json has layer_types = {shown(kinds)}, expected {' or '.join(known)}")
    if len(kinds) != values["num_hidden_layers"]:
        raise ModelImportError(
            f"config.json has {len(kinds)} layer_types for {values['num_hidden_layers']} layers"
        )
    return kinds


def rotary_fields(config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as config.json has it, for transformers before version 5, and for 5."""
    scaling = dict(zip(LLAMA3_SCALING, config.rope_scaling, strict=False))
    rope: dict[str, Any] = {"rope_type": ("default", "linear", "", "", "llama3")[len(scaling)], **scaling}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    share = {"partial_rotary_factor": config.rotary_dim / config.head_dim} if config.rotary_dim else {}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {**rope, **share, "rope_theta": config.rope_theta},
        **share,
    }


def window_fields(config: ModelConfig) -> dict[str, Any]:
    """The sliding window as config.json has it."""
    if not config.sliding_window:
        return {"sliding_window": None}
    kinds = [
        "sliding_attention" if layer in config.windowed_layers else "full_attention"
        for layer in range(1, config.num_layers + 1)
    ]
    return {"sliding_window": config.sliding_window, "layer_types": kinds}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model_type of config.json: its class in transformers, and where it is not Llama.

    unsaid       its values of fields that a config.json does not name
    refused      fields that ask for what this decoder has not, unless they are false
    names        what it calls fields otherwise, by our settings; None for one that it has not
    settings     config.json's values -> our settings beyond those of `names`
    fields       our settings -> what of config.json says so
    outer, in_layer, layers   the names of its weights -> ours, several where one tensor holds them in rows
    by_head      such a tensor has them head by head
    ignored      how the names of tables end that old files hold beside the weights
    norm_offset  norms multiply by their weight and this
    partial      heads may be rotated in part
    gguf, gguf_in_layer   the architecture's name in .gguf files, and the tensors there that are not Llama's
    gguf_fields  the values of config.json so far, and what reads a key of such a file -> those that differ
    gguf_windows the window that such a file names is one of some layers, or else the context is cut to it
    paired       .gguf files have rotated pairs side by side
    """

    architecture: str
    unsaid: Values = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    names: Mapping[str, str | None] = field(default_factory=dict)
    settings: Callable[[Values], dict[str, Any]] = rotary_settings
    fields: Callable[[ModelConfig], dict[str, Any]] = rotary_fields
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER)
    in_layer: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: IN_LAYER)
    layers: str = "model.layers"
    by_head: bool = False
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    norm_offset: float = 0.0
    gguf: str = ""
    gguf_in_layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_fields: Callable[[Values, Callable[..., Any]], dict[str, Any]] = lambda values, read: {}
    gguf_windows: bool = False
    paired: bool = False
    partial: bool = False

    @cached_property
    def ours(self) -> dict[str, tuple[str, int]]:
        """Where each of our modules is: the name of theirs (within a layer, if it is in one), and which of
        its parts it is.
        """
        return places_of(self.in_layer) | {ours: (theirs, 0) for theirs, ours in self.outer.items()}

    def stored(self, name: str) -> tuple[str, int] | None:
        """The name of the tensor that holds one of our weights, and which of its parts it is; None for what
        belongs to the exits, and to this project alone.
        """
        module, _, kind = name.rpartition(".")
        if module in self.outer.values():
            return f"{self.ours[module][0]}.{kind}", 0
        head, _, rest = module.partition(".")
        number, _, inner = rest.partition(".")
        if head != "layers" or inner not in self.ours:
            return None
        theirs, place = self.ours[inner]
        return f"{self.layers}.{number}.{theirs}.{kind}", place

    def held(self, name: str) -> tuple[str, ...]:
        """Our names of what a tensor holds; none for a strange one."""
        module, _, kind = name.rpartition(".")
        if module in self.outer:
            return (f"{self.outer[module]}.{kind}",)
        number, _, inner = module.removeprefix(f"{self.layers}.").partition(".")
        parts = self.in_layer.get(inner, ()) if module.startswith(f"{self.layers}.") else ()
        return tuple(f"layers.{number}.{part}.{kind}" for part in parts)

    def taken(self, whole: Tensor, name: str, sizes: ModelConfig) -> Tensor:
        """One of our weights, of the tensor that holds it: in its type and memory, unless numbers or their
        order differ. Raises ModelImportError.
        """
        inner = inner_name(name)
        theirs, place = self.ours[inner]
        parts = self.in_layer.get(theirs, ())
        if len(parts) > 1:
            rows = [_rows(part, sizes) for part in parts]
            if whole.shape[0] != sum(rows):
                raise ModelImportError(f"it has {whole.shape[0]} rows, but config.json makes it {sum(rows)}")
            if self.by_head:
                whole = torch.unflatten(whole, 0, (sizes.num_heads, len(parts), -1))[:, place].flatten(0, 1)
            else:
                whole = torch.split(whole, rows)[place]
        if inner in ROTATED and sizes.rotary_dim:
            whole = by_pairs(whole, sizes)
        whole = whole.to(self.dtype(whole.dtype, name))
        return whole + self.norm_offset if self.offsets(inner) else whole

    def dtype(self, stored: torch.dtype, name: str) -> torch.dtype:
        """The type of one of our weights, by that of the tensor that holds it."""
        narrow = stored in (torch.bfloat16, torch.float16)
        return stored if narrow and not self.offsets(inner_name(name)) else torch.float32

    def offsets(self, inner: str) -> bool:
        """Whether a module is a norm that multiplies by its weight and an offset."""
        return bool(self.norm_offset) and inner.endswith("norm")

    def given(self, weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """The tensors of its files, of weights by our names."""
        groups = dict[str, list[tuple[int, Tensor]]]()
        for name, weight in weights.items():
            if (found := self.stored(name)) is None:
                continue
            inner = inner_name(name)
            if inner in ROTATED and config.rotary_dim:
                weight = by_pairs(weight, config, back=True)
            if self.offsets(inner):
                weight = weight.float() - self.norm_offset
            groups.setdefault(found[0], []).append((found[1], weight))
        return {
            name: self._whole([part for _, part in sorted(parts, key=lambda part: part[0])], config)
            for name, parts in groups.items()
        }

    def _whole(self, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
        if len(parts) > 1 and self.by_head:
            parts = [torch.unflatten(part, 0, (config.num_heads, -1)) for part in parts]
            return torch.cat(parts, dim=1).flatten(0, 1)
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0].contiguous()


def places_of(in_layer: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    """By our modules of a layer: the name of theirs, and which of its parts it is."""
    return {part: (theirs, place) for theirs, parts in in_layer.items() for place, part in enumerate(parts)}


def inner_name(name: str) -> str:
    """A weight's module within its layer, or in the model. `layers.3.mlp.up_proj.weight` -> `mlp.up_proj`."""
    module = name.rpartition(".")[0]
    return module.split(".", 2)[2] if module.startswith("layers.") else module


def _rows(part: str, sizes: ModelConfig) -> int:
    """How many rows a projection has."""
    rows = {
        "attention.q_proj": sizes.query_dim,
        "attention.k_proj": sizes.kv_dim,
        "attention.v_proj": sizes.kv_dim,
    }
    return rows.get(part, sizes.ffn_dim)


def by_pairs(whole: Tensor, sizes: ModelConfig, back: bool = False) -> Tensor:
    """Rows of queries or keys of heads that are rotated in part, in our order, or `back` in theirs.

    They have the rotated rows in front. Here all pairs are half a head apart, and those of the rest turn by
    no angle. Shape: (heads*P, ...) -> same.
    """
    rows = torch.arange(sizes.head_dim)
    turned, rest = rows[: sizes.rotary_dim], rows[sizes.rotary_dim :]
    halves = zip(turned.view(2, -1), rest.view(2, -1), strict=True)
    order = torch.cat([part for half in halves for part in half])
    heads = torch.unflatten(whole, 0, (-1, sizes.head_dim))
    found: Tensor = heads[:, order.argsort() if back else order].flatten(0, 1)
    return found
