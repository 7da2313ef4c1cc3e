"""What the layers below an exit see of its gradient; the forward pass is the same for all three rules.

`joint`: all of it. `detached`: nothing from the early exits, whose own parts and head still learn.
`equilibrium`: rescaled so that a layer sees the mean over the exits behind it, not their sum (Li et al. 2019,
arXiv 1908.06294, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, its gradient multiplied on the way back."""
    out: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return out


def split_gradient(hidden: Tensor, exits_from_here: int, rule: str) -> tuple[Tensor, Tensor]:
    """The hidden state for the exit, and for the layers behind it; `exits_from_here` counts this exit and
    those behind it.

    For `equilibrium` with k exits from here the exit's gradient is scaled by 1/k, that of the layers behind
    by (k-1)/k.
    """
    if rule == "joint" or exits_from_here == 1:
        return hidden, hidden
    if rule == "detached":
        return hidden.detach(), hidden
    return scale_gradient(hidden, 1 / exits_from_here), scale_gradient(
        hidden, (exits_from_here - 1) / exits_from_here
    )
