"""AdamW over a model's weights, which of them learn, and how fast at which step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ease_common.errors import ConfigError
from ease_train.model.blocks import is_narrow
from ease_train.model.decoder import Decoder
from ease_train.training.config import TrainConfig


def learning_rate(step: int, settings: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak (Loshchilov & Hutter 2017, arXiv
    1608.03983).
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def parameters(model: Decoder) -> list[nn.Parameter]:
    """All of a model's parameters, each once, in the order of its parts."""
    return list(dict.fromkeys(parameter for part in model.parts() for parameter in part.parameters()))


def create_optimizer(
    model: Decoder, settings: TrainConfig, layer_lr_scales: Mapping[int, float] | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with weight decay on matrices only.

    `layer_lr_scales` (layer from 1 -> share) is discriminative fine-tuning (Howard & Ruder 2018, arXiv
    1801.06146): a group a share; embedding, norms outside the layers, exits and head have the full rate.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    scales = {
        parameter: scale
        for layer, scale in (layer_lr_scales or {}).items()
        for parameter in model.layers[layer - 1].parameters()
    }
    for parameter in parameters(model):
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((scales.get(parameter, 1.0), decay), []).append(parameter)
    options = [
        {"params": group, "weight_decay": decay, "lr": settings.learning_rate * scale, "lr_scale": scale}
        for (scale, decay), group in groups.items()
    ]
    return torch.optim.AdamW(
        options, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
    )


def take_masters(model: Decoder, all_wide: bool) -> None:
    """Give what is trained fp32 memory of its own; what is frozen stays as it is kept, unless `all_wide`
    (FSDP's shards are of one type).
    """
    for parameter in model.parameters():
        if parameter.requires_grad or all_wide:
            parameter.data = parameter.data.to(torch.float32, copy=True)


def memory_needed(model: Decoder) -> str | None:
    """What training a model that is kept in 16 bits takes, beside its activations; None for one in fp32."""
    narrow = [parameter for parameter in model.parameters() if is_narrow(parameter)]
    if not narrow:
        return None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    widest = max(parameter.numel() for parameter in narrow)
    return (
        f"memory: {16 * trained / 1e9:.2f} GB for what is trained (fp32, gradients, AdamW), "
        f"{4 * widest / 1e9:.2f} GB for one frozen matrix in fp32; {kept / 1e9:.2f} GB of frozen weights are "
        "mapped, and may stay on the disk"
    )


def train_exits_only(model: Decoder, heads: bool) -> None:
    """Freeze all but the early exits' norms, adapters and, if wanted, heads.

    Raises ConfigError when they have none of their own.
    """
    model.requires_grad_(False)
    model.exits.requires_grad_(True)
    if model.reduced_head is not None:
        model.reduced_head.requires_grad_(True)
        model.reduced_head.known.requires_grad_(heads)
    for leave in model.early_exits.values():
        if "head" in leave.own:
            leave.head.requires_grad_(heads)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "method: trains = 'exits', but the exits have no norm, adapter or head of their own; set "
            "exit_adapter = 'mlp'"
        )
