"""The layers of a Llama-family decoder.

Shapes: B batch, S sequence, D width, H query heads, G key/value heads, P width of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.training.config import ModelConfig


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv 2104.09864).

    Shape: two of (max_positions, P/2).
    """
    half = config.head_dim // 2
    inverse = stretched(
        config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half), config.rope_scaling
    )
    angles = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * inverse
    return angles.cos().float(), angles.sin().float()


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


def causal_mask(visible: Tensor) -> Tensor:
    """Who sees whom: oneself, and the visible ones before. Shape: (B, S) bool -> (B, 1, S, S) bool."""
    length = visible.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=visible.device).tril(-1)
    oneself = torch.eye(length, dtype=torch.bool, device=visible.device)
    return (visible[:, None, None, :] & before) | oneself


class Attention(nn.Module):
    """Causal attention with grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.query_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.dim, config.kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.dim, config.kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.query_dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values. Shape: (B, S, D) -> two of (B, G, S, P)."""
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        return rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend to oneself and to what came before, or to what of it is `visible`.

        Shape: x (B, S, D), visible (B, S) bool -> (B, S, D).
        """
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))).transpose(1, 2)
        k, v = self.keys_values(x, cos, sin)
        groups = self.num_heads // self.num_kv_heads
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        mask = None if visible is None else causal_mask(visible)
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin), k, v, attn_mask=mask, is_causal=mask is None
        )  # (B, H, S, P)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class GatedMLP(nn.Module):
    """Gated linear unit with SiLU (Shazeer 2020, arXiv 2002.05202). Shape: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). Shape: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, visible)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out
