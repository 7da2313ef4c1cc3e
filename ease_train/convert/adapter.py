"""Adapters of peft: low-rank changes of a model's matrices (LoRA, Hu et al. 2021, arXiv 2106.09685), merged
as the model is read.

    adapter = Adapter(Path("my-lora"))
    adapter.merged("model.layers.0.self_attn.q_proj.weight", weight)
"""

import math
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ease_common.errors import ModelImportError, shown
from ease_train.convert.files import opened_tensors, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
REFUSED = (  # what would change more than a matrix by two others, unless it is false or empty
    *("use_dora", "use_qalora", "modules_to_save", "fan_in_fan_out", "megatron_config", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "lora_bias", "alora_invocation_tokens"),
)


class Adapter:
    """The changes in a folder, by the names of the tensors that they change.

    Raises ModelImportError for a folder that holds none, or others than LoRA's.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        if config is None:
            raise ModelImportError(f"{folder} is no adapter of peft: {CONFIG} is missing")
        check_settings(config, folder)
        self.folder = folder
        self.config = config
        if not (folder / WEIGHTS).is_file():
            raise ModelImportError(f"{folder} lacks {WEIGHTS}; save the adapter with safetensors")
        with opened_tensors(folder / WEIGHTS) as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
        self.pairs = paired(tensors, folder)

    def check(self, names: Set[str]) -> None:
        """Raise ModelImportError unless a model has every tensor that is changed."""
        if lacking := sorted(self.pairs.keys() - names):
            raise ModelImportError(
                f"{self.folder} changes {len(lacking)} tensors that the model has not, the first is "
                f"{lacking[0]}: the adapter belongs to another model"
            )

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A tensor with its change, as fp32; itself where there is none. Raises ModelImportError."""
        if name not in self.pairs:
            return weight
        down, up = self.pairs[name]
        if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            raise ModelImportError(
                f"{self.folder} changes {name} by {[*up.shape]} times {[*down.shape]}, but it has the shape "
                f"{[*weight.shape]}: the adapter belongs to another model"
            )
        return weight.float() + self.scale(name, down.shape[0]) * (up @ down)

    def scale(self, name: str, rank: int) -> float:
        """What a change is multiplied by: alpha over its rank, or over the root of that."""
        module = name.removesuffix(".weight")
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((a for key, a in patterns.items() if f".{module}".endswith(f".{key}")), None)
        alpha = self.config["lora_alpha"] if alpha is None else alpha
        scale: float = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return scale


def check_settings(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelImportError for an adapter that is not a LoRA of matrices."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelImportError(f"{folder} is an adapter of the kind {shown(kind)}, expected LORA")
    found = [name for name in REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise ModelImportError(
            f"{folder} has {found[0]} = {shown(config[found[0]])}, which is not merged here; merge it with "
            "peft (merge_and_unload, save_pretrained)"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping) or any(re.search(r"[^\w.]", key) for key in patterns):
        raise ModelImportError(f"{folder} has alpha_pattern = {shown(patterns)}, expected names of modules")
    for alpha in (config.get("lora_alpha"), *patterns.values()):
        if type(alpha) not in (int, float):
            raise ModelImportError(f"{folder} has an alpha of {shown(alpha)}, expected a number")


def paired(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The two matrices of each change, by the name of the tensor that it changes. Raises ModelImportError."""
    pairs = dict[str, tuple[Tensor, Tensor]]()
    for name, tensor in tensors.items():
        module = name.removesuffix(DOWN)
        if name.endswith(DOWN) and module + UP in tensors:
            pairs[f"{module.removeprefix(PREFIX)}.weight"] = (tensor, tensors[module + UP])
    if len(tensors) != 2 * len(pairs) or not pairs:
        taken = {PREFIX + name.removesuffix(".weight") + end for name in pairs for end in (DOWN, UP)}
        strange = next((name for name in tensors if name not in taken), "nothing")
        raise ModelImportError(f"{folder} holds {strange}, expected pairs of {DOWN[1:]} and {UP[1:]}")
    if bad := next((name for name, pair in pairs.items() if not all(map(finite, pair))), None):
        raise ModelImportError(f"{folder}: the change of {bad} holds numbers that are not finite")
    return pairs


def finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
