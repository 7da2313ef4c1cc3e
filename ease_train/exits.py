"""What stands at an exit: adapters before its head, and gates that say whether a token may leave.

Shapes: N tokens, D width.
"""

import torch
from torch import Tensor, nn

from ease_train.blocks import Block
from ease_train.config import ModelConfig


class LowRankAdapter(nn.Module):
    """x + up(down(x)), the identity until it is trained (Hu et al. 2021, arXiv 2106.09685, on an exit). Shape: (..., D) -> (..., D)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(self.down(x))
        return out


class MLPAdapter(nn.Module):
    """x + up(silu(down(norm(x)))): EE-Tuning's MLP exit (Pan et al. 2024, arXiv 2402.00518), the identity until it is trained.

    Shape: (..., D) -> (..., D).
    """

    def __init__(self, dim: int, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.down = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(nn.functional.silu(self.down(self.norm(x))))
        return out


def exit_adapter(config: ModelConfig) -> LowRankAdapter | MLPAdapter | Block:
    """The adapter of one exit, of the kind that the configuration names.

    A block is a layer of the exit's own, with its own keys and values (EE-LLM, Chen et al. 2024, arXiv 2312.04916; Kangaroo,
    Liu et al. 2024, arXiv 2404.18911). Each starts as the identity, since what it adds starts at zero (`start_as_identity`).
    """
    if config.exit_adapter == "block":
        return Block(config)
    if config.exit_adapter == "low-rank":
        return LowRankAdapter(config.dim, config.adapter_width)
    return MLPAdapter(config.dim, config.adapter_width, config.norm_eps)


@torch.no_grad()
def start_as_identity(adapter: nn.Module) -> None:
    """Set the projections through which an adapter adds to its input to zero."""
    if isinstance(adapter, Block):
        adapter.attention.o_proj.weight.zero_()
        adapter.mlp.down_proj.weight.zero_()
    if isinstance(adapter, LowRankAdapter | MLPAdapter):
        adapter.up.weight.zero_()


class TokenScore(nn.Module):
    """One number a token: linear, or with one hidden layer. Shape: (..., D) -> (...)."""

    def __init__(self, dim: int, width: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, width) if width else None
        self.out = nn.Linear(width or dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.inner is not None:
            x = nn.functional.silu(self.inner(x))
        score: Tensor = self.out(x).squeeze(-1)
        return score


class Gate(nn.Module):
    """The probability that the full-depth model would say what this exit says.

    A meta-classifier as in CALM (Schuster et al. 2022, arXiv 2207.07061, section 3.4), with a calibrated temperature
    (Guo et al. 2017, arXiv 1706.04599). Shape: exit hidden state (N, D) -> (N) in [0, 1].
    """

    temperature: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.score = TokenScore(dim, width)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, exit_hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.score(exit_hidden) / self.temperature)
