"""Low-rank updates of a model's layers, which learn in the place of their matrices (LoRA, Hu et al.

2021, arXiv 2106.09685).

    add_low_rank(model, rank=8, alpha=16.0)      # all else but the exits' own parts is frozen
    weights = merged(model.state_dict(), alpha=16.0)     # the plain model's names and values

A product with W becomes W x + alpha / rank * up (down x), and starts as W x. What is saved is the sum of the
matrices, so nothing behind training sees a difference.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.model.blocks import Linear
from ease_train.model.decoder import Decoder
from ease_train.training.tensors import Tensors

UPDATE = ".update."  # between a matrix's name and that of a part


class LowRankUpdate(nn.Module):
    """What is added to a product with a weight (out, in): nothing at first, since `up` starts at zero.

    Shape: (..., in) -> (..., out).
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down), self.up)


def add_low_rank(model: Decoder, rank: int, alpha: float) -> None:
    """Give every matrix of the layers an update, and freeze what is neither that nor an exit's own."""
    model.requires_grad_(False)
    model.exits.requires_grad_(True)
    if model.reduced_head is not None:
        model.reduced_head.requires_grad_(True)
    for module in [module for module in model.layers.modules() if isinstance(module, Linear)]:
        module.update = LowRankUpdate(module.weight, rank, alpha / rank)


def merged(weights: Mapping[str, Tensor], alpha: float) -> Tensors:
    """A state dictionary by the names of a model without updates, which are added, in fp32, to a matrix when
    it is asked for.
    """
    plain = {name: value for name, value in weights.items() if UPDATE not in name}

    def updated(name: str) -> str | None:
        """What the names of a weight's update begin with, where it has one."""
        begin = name.removesuffix(".weight") + UPDATE
        return begin if f"{begin}up" in weights else None

    def made(name: str) -> Tensor:
        if (begin := updated(name)) is None:
            return plain[name]
        down, up = weights[f"{begin}down"], weights[f"{begin}up"]
        return plain[name] + alpha / len(down) * (up @ down)

    described = {
        name: (torch.float32 if updated(name) else value.dtype, value.shape) for name, value in plain.items()
    }
    return Tensors(described, made)
