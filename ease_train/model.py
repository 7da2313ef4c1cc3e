"""A Llama-family decoder whose hidden state can be read at several exits.

Knows nothing about losses, tokenizers or files. Shapes: B batch, S sequence, D width, H query heads,
G key/value heads, P width of a head, V vocabulary. Layers and exits are numbered from 1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.config import ModelConfig


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv 2104.09864).

    Shape: two of (max_positions, P/2).
    """
    half = config.head_dim // 2
    inverse = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * inverse
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's first and second half by its position's angles (the non-interleaved form).

    Shape: x (B, H, S, P), cos and sin (S, P/2) -> (B, H, S, P).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.dim, config.kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.dim, config.kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values. Shape: (B, S, D) -> two of (B, G, S, P)."""
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        return rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend to oneself and to what came before. Shape: (B, S, D) -> (B, S, D)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))).transpose(1, 2)
        k, v = self.keys_values(x, cos, sin)
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)  # (B, H, S, P)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """The decoder: embedding, blocks, and one LM head that every exit shares.

    model = Decoder(ModelConfig(vocab_size=4096))
    logits = model(input_ids)                       # full depth, (B, S, V)
    for layer, hidden in model.exit_states(input_ids):
        logits = model.lm_head(model.exit_hidden(hidden, layer))
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "the vocabulary's size comes from the tokenizer before a model is built"
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps) if config.final_norm else nn.Identity()
        own = config.exits[:-1] if config.exit_norm == "own" and config.final_norm else ()
        self.exit_norms = nn.ModuleDict({str(layer): nn.RMSNorm(config.dim, config.norm_eps) for layer in own})
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._initialise)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the last layer. Shape: (B, S) int64 -> (B, S, V)."""
        hidden = self.run_layers(self.embed(input_ids), 1, self.config.num_layers)
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits

    def run_layers(self, hidden: Tensor, first: int, last: int, active: Tensor | None = None) -> Tensor:
        """Run layers first..last (from 1, both included).

        A token with `active` False is frozen: its hidden state passes through unchanged, and each layer's keys and
        values for it come from that frozen state, which is state propagation (CALM, arXiv 2207.07061, section 3.1).
        Shape: hidden (B, S, D), active (B, S) bool -> (B, S, D).
        """
        cos, sin = self.cos[: hidden.shape[1]], self.sin[: hidden.shape[1]]
        for layer in range(first - 1, last):
            after = self.layers[layer](hidden, cos, sin)
            hidden = after if active is None else torch.where(active[..., None], after, hidden)
        return hidden

    def exit_states(self, input_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, hidden state) at each exit, shallow first. Shape: (B, S) -> (B, S, D) each."""
        hidden = self.embed(input_ids)
        for first, last in self.config.segments:
            hidden = self.run_layers(hidden, first, last)
            yield last, hidden

    def exit_hidden(self, hidden: Tensor, layer: int) -> Tensor:
        """The exit's norm: what stands between a hidden state at `layer` and the LM head. Shape: (..., D) -> (..., D)."""
        norm: nn.Module = self.exit_norms[str(layer)] if str(layer) in self.exit_norms else self.norm  # noqa: SIM401 - ModuleDict.get lost its type
        out: Tensor = norm(hidden)
        return out
