"""The layers of a decoder.

Shapes: B batch, S sequence, D width, H query heads, G key/value heads, P width of a head.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.training.config import ModelConfig

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
}


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """A norm of the model's kind."""
    if config.norm == "layer":
        return nn.LayerNorm(width, config.norm_eps)
    return nn.RMSNorm(width, config.norm_eps)


def rotary_tables(config: ModelConfig, local: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv 2104.09864).

    `local`: those of windowed layers with a base of their own. Where only a part of a head is rotated, the
    pairs of the rest turn by no angle. Shape: two of (max_positions, P/2).
    """
    half = (config.rotary_dim or config.head_dim) // 2
    theta = config.local_rope_theta if local else config.rope_theta
    inverse = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if not local:
        inverse = stretched(inverse, config.rope_scaling)
    if config.rope_factors:
        inverse = inverse / torch.tensor(config.rope_factors, dtype=torch.float64)
    angles = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * inverse
    rest = (0, config.head_dim // 2 - half)
    cos, sin = config.rope_gain * angles.cos(), config.rope_gain * angles.sin()
    return F.pad(cos, rest, value=1.0).float(), F.pad(sin, rest).float()


def stretched(frequencies: Tensor, scaling: tuple[float, ...]) -> Tensor:
    """Rotary frequencies (radians a position) for longer texts than the model was first trained on.

    With FACTOR alone all are divided by it (Chen et al. 2023, arXiv 2306.15595). Llama 3 (arXiv 2407.21783)
    divides those that turn less than LOW times in POSITIONS, leaves those that turn more than HIGH times, and
    goes linearly between. Shape: (P/2) -> (P/2).
    """
    if not scaling:
        return frequencies
    factor, *bounds = scaling
    if not bounds:
        return frequencies / factor
    low, high, positions = bounds
    kept = ((positions * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's first and second half by its position's angles (the non-interleaved form).

    Shape: x (B, H, S, P), cos and sin (S, P/2) or (B, 1, S, P/2) -> (B, H, S, P).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_mask(visible: Tensor, window: int = 0) -> Tensor:
    """Who sees whom: oneself, and the visible ones before, `window` tokens in all (0: any number).

    Shape: (B, S) bool -> (B, 1, S, S) bool.
    """
    length = visible.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=visible.device).tril(-1)
    if window:
        before = before.triu(1 - window)
    oneself = torch.eye(length, dtype=torch.bool, device=visible.device)
    return (visible[:, None, None, :] & before) | oneself


def is_narrow(weight: Tensor) -> bool:
    """Whether a weight is kept in 16 bits."""
    return weight.is_floating_point() and weight.element_size() < 4


def wide(weight: Tensor) -> Tensor:
    """A weight that is kept in 16 bits as fp32, any other as it is."""
    return weight.float() if is_narrow(weight) else weight


class WideProduct(torch.autograd.Function):
    """A product with a frozen matrix that is kept in 16 bits: it is widened anew for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


class Linear(nn.Linear):
    """A product in the type of its input: a matrix that is kept in 16 bits is widened for it, and not for
    longer. What an `update` says is added, where there is one (LoRA).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.update: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self.plain(x)
        return product if self.update is None else product + self.update(x)

    def plain(self, x: Tensor) -> Tensor:
        """Without the update. Shape: (..., in) -> (..., out)."""
        weight = self.weight
        if weight.element_size() >= x.element_size() or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, self.bias)  # autocast gives both its own type
        if weight.requires_grad or not torch.is_grad_enabled():
            return F.linear(x, weight.to(x.dtype), self.bias)
        product: Tensor = WideProduct.apply(x, weight)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


def widened(module: nn.Module) -> nn.Module:
    """A module whose matrices are in fp32, for many products: itself, or a copy where some are kept in 16
    bits.
    """
    return deepcopy(module).float() if any(map(is_narrow, module.parameters())) else module


class Attention(nn.Module):
    """Causal attention with grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245).

    `window` is how many tokens it sees, 0 for all; `rotated` whether its heads are turned by their positions,
    `local` by tables of windowed layers; `scale` what its scores are multiplied by, None for P ** -0.5.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.window = config.sliding_window if layer in config.windowed_layers else 0
        self.rotated = layer not in config.unrotated_layers
        self.local = self.window > 0 and config.local_rope_theta > 0
        self.scale = config.query_scale or None
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.dim, config.query_dim, bias=config.attention_bias)
        self.k_proj = Linear(config.dim, config.kv_dim, bias=config.attention_bias)
        self.v_proj = Linear(config.dim, config.kv_dim, bias=config.attention_bias)
        self.o_proj = Linear(config.query_dim, config.dim, bias=config.output_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values. Shape: (B, S, D) -> two of (B, G, S, P)."""
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        return (rotate(k, cos, sin) if self.rotated else k), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend to oneself and to what came before, or to what of it is `visible`.

        Shape: x (B, S, D), visible (B, S) bool -> (B, S, D).
        """
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))).transpose(1, 2)
        k, v = self.keys_values(x, cos, sin)
        groups = self.num_heads // self.num_kv_heads
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        if visible is None and 0 < self.window < x.shape[1]:
            visible = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
        mask = None if visible is None else causal_mask(visible, self.window)
        if self.rotated:
            q = rotate(q, cos, sin)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )  # (B, H, S, P)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """Gated linear unit (Shazeer 2020, arXiv 2002.05202), or two matrices without a gate.

    Shape: (B, S, D) -> (B, S, D).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.mlp_bias
        self.gate_proj = Linear(config.dim, config.ffn_dim, bias=bias) if config.gated else None
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=bias)
        self.activation = config.activation

    def extra_repr(self) -> str:
        return self.activation

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        inner = act(self.up_proj(x)) if self.gate_proj is None else act(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(inner)
        return out


class Residual(nn.Module):
    """What stands around a layer's attention, for training and in the exported form: norms, MLP and sums."""

    attention_norm: nn.Module
    attention_out_norm: nn.Module
    mlp_norm: nn.Module
    mlp: MLP
    mlp_out_norm: nn.Module
    parallel: bool

    def close(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from its input and what attention made of `attention_norm` of it.

        Shape: two of (..., D) -> (..., D).
        """
        after = x + self.attention_out_norm(attended)
        read = x if self.parallel else after
        out: Tensor = after + self.mlp_out_norm(self.mlp(self.mlp_norm(read)))
        return out


class Block(Residual):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), or both of the same x (`parallel_residual`);
    `layer` is its number, from 1. Shape: (B, S, D) -> (B, S, D).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.dim)
        self.attention = Attention(config, layer)
        self.attention_out_norm = make_norm(config, config.dim) if config.post_norms else nn.Identity()
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = MLP(config)
        self.mlp_out_norm = make_norm(config, config.dim) if config.post_norms else nn.Identity()
        self.parallel = config.parallel_residual

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None) -> Tensor:
        return self.close(x, self.attention(self.attention_norm(x), cos, sin, visible))
