"""An exit: an adapter or a block, a norm, a head, and a gate that says whether a token may leave.

Shapes: N tokens, D width, V vocabulary, M tokens of a reduced head.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ease_train.model.blocks import Block, Linear, wide
from ease_train.training.config import ModelConfig


class LowRankAdapter(nn.Module):
    """x + up(down(x)), the identity until it is trained (Hu et al.

    2021, arXiv 2106.09685, on an exit). Shape: (..., D) -> (..., D).
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = Linear(dim, width, bias=False)
        self.up = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(self.down(x))
        return out


class MLPAdapter(nn.Module):
    """x + up(silu(down(norm(x)))): EE-Tuning's MLP exit (Pan et al.

    2024, arXiv 2402.00518), the identity until it is trained.

    Shape: (..., D) -> (..., D).
    """

    def __init__(self, dim: int, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.down = Linear(dim, width, bias=False)
        self.up = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(nn.functional.silu(self.down(self.norm(x))))
        return out


def exit_adapter(config: ModelConfig, layer: int) -> LowRankAdapter | MLPAdapter | Block:
    """The adapter of the exit after `layer`, of the kind that the configuration names.

    A block is a layer of the exit's own, with its own keys and values (EE-LLM, Chen et al. 2024, arXiv
    2312.04916; Kangaroo, Liu et al. 2024, arXiv 2404.18911), like the one that follows. Each starts as the
    identity, since what it adds starts at zero (`start_as_identity`).
    """
    if config.exit_adapter == "block":
        return Block(config, layer + 1)
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
        self.inner = Linear(dim, width) if width else None
        self.out = Linear(width or dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.inner is not None:
            x = nn.functional.silu(self.inner(x))
        score: Tensor = self.out(x).squeeze(-1)
        return score


class Gate(nn.Module):
    """The probability that the full-depth model would say what this exit says.

    A meta-classifier as in CALM (Schuster et al. 2022, arXiv 2207.07061, section 3.4), with a calibrated
    temperature (Guo et al. 2017, arXiv 1706.04599). Shape: exit hidden state (N, D) -> (N) in [0, 1].
    """

    temperature: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.score = TokenScore(dim, width)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, exit_hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.score(exit_hidden) / self.temperature)


class LMHead(Linear):
    """Logits of the whole vocabulary. Shape: (..., D) -> (..., V)."""

    ids: None = None  # it knows all tokens

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.vocab_size, bias=False)


class ReducedHead(nn.Module):
    """One head for all early exits, over the M most frequent tokens, and a row for all the others as one.

    What it gives the others is shared out as these tokens were counted (FR-Spec, Zhao et al. 2025, arXiv
    2502.14856). `ids` (M), ascending, are the tokens that it knows; `log_shares` (V) those of the others, 0
    for known ones. Shape: (..., D) -> (..., V).
    """

    ids: Tensor
    log_shares: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.exit_vocab_size
        self.known = Linear(config.dim, size, bias=False)
        self.rest = Linear(config.dim, 1, bias=False)
        self.register_buffer("ids", torch.arange(size))
        self.register_buffer("log_shares", torch.zeros(config.vocab_size))
        self.log_shares[size:] = -math.log(config.vocab_size - size)

    @property
    def weight(self) -> Tensor:
        """The rows of the known tokens, and the others' row last, in fp32 at least. Shape: (M + 1, D)."""
        return torch.cat((wide(self.known.weight), wide(self.rest.weight)))

    def forward(self, exit_hidden: Tensor) -> Tensor:
        rest: Tensor = self.rest(exit_hidden) + self.log_shares
        return rest.index_copy(-1, self.ids, self.known(exit_hidden))

    @torch.no_grad()
    def choose_tokens(self, counts: Tensor, lm_head: Tensor) -> None:
        """Know the tokens that were counted most often, by the LM head's rows.

        Shape: counts (V) int64, lm_head (V, D).

        The rest's row starts as the mean of theirs; each of them was counted once more than it was, so that
        none has no share.
        """
        most_first = counts.argsort(descending=True, stable=True)
        self.ids.copy_(most_first[: len(self.ids)].sort().values)
        self.known.weight.copy_(lm_head[self.ids])
        rest = most_first[len(self.ids) :]
        shares = (counts[rest] + 1) / (counts[rest] + 1).sum()
        self.log_shares.zero_().index_copy_(0, rest, shares.log().to(self.log_shares.dtype))
        rows = wide(lm_head[rest])
        self.rest.weight.copy_(shares.to(rows.dtype) @ rows)


class Exit(nn.Module):
    """What stands at an exit: an adapter (or a block), a norm, a head and a gate; adapter and gate may lack.

    Its parameters and its state are those of its own parts. A norm or a head that it shares with the model is
    only referred to. Shape: hidden (..., D), after the block where it has one -> exit_hidden (..., D), which
    head and gate read.
    """

    PARTS = ("norm", "adapter", "head", "gate")
    norm: nn.Module
    adapter: nn.Module | None
    head: LMHead | ReducedHead
    gate: Gate | None

    def __init__(self, own: Mapping[str, nn.Module], shared: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.__dict__.update({"adapter": None, "gate": None, **shared})
        for name, module in own.items():
            del self.__dict__[name]
            self.add_module(name, module)

    @property
    def own(self) -> dict[str, nn.Module]:
        """Its own parts, by name."""
        return dict(self.named_children())

    @property
    def block(self) -> Block | None:
        """The layer of its own that it begins with, where it has one: it attends, as the model's
        layers do.
        """
        return self.adapter if isinstance(self.adapter, Block) else None

    def tokenwise(self) -> nn.Module:
        """What stands between a hidden state, after the block where there is one, and the head: each token on
        its own.
        """
        return (
            self.norm
            if self.adapter is None or self.block is not None
            else nn.Sequential(self.adapter, self.norm)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.tokenwise()(hidden)
        return out
