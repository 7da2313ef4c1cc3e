"""Low-rank updates of a model's layers, which learn in the place of their matrices (LoRA, Hu et al.

2021, arXiv 2106.09685).

    add_low_rank(model, rank=8, alpha=16.0)      # all else but the exits' own parts is frozen
    weights = merged(model.state_dict(), alpha=16.0)     # the plain model's names and values

A matrix W becomes W + alpha / rank * up @ down, and starts as W. What is saved is the sum, so nothing behind
training sees a difference.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ease_train.model.decoder import Decoder

ORIGINAL = ".parametrizations.weight.original"
DOWN = ".parametrizations.weight.0.down"
UP = ".parametrizations.weight.0.up"


class LowRankUpdate(nn.Module):
    """W -> W + scale * up @ down, in fp32; `up` starts at zero. Shape: (out, in) -> (out, in)."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def add_low_rank(model: Decoder, rank: int, alpha: float) -> None:
    """Give every matrix of the layers an update, and freeze what is neither that nor an exit's own."""
    model.requires_grad_(False)
    model.exits.requires_grad_(True)
    if model.reduced_head is not None:
        model.reduced_head.requires_grad_(True)
    for module in [module for module in model.layers.modules() if isinstance(module, nn.Linear)]:
        update = LowRankUpdate(module.weight, rank, alpha / rank)
        # unsafe: of a matrix in 16 bits and its update the sum is in fp32
        parametrize.register_parametrization(module, "weight", update, unsafe=True)


def merged(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dictionary with the updates added to their matrices, by the names of a model without them."""
    plain = {name: value for name, value in weights.items() if not name.endswith((ORIGINAL, DOWN, UP))}
    for name in (name.removesuffix(ORIGINAL) for name in weights if name.endswith(ORIGINAL)):
        down = weights[name + DOWN]
        up = weights[name + UP]
        plain[f"{name}.weight"] = weights[name + ORIGINAL] + alpha / len(down) * (up @ down)
    return plain
