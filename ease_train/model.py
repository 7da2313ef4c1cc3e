"""A Llama-family decoder whose hidden state can be read at several exits.

Knows nothing about losses, tokenizers or files. Shapes: B batch, S sequence, D width, P width of a head, V vocabulary.
Layers and exits are numbered from 1.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ease_train.blocks import Block, rotary_tables
from ease_train.config import ModelConfig
from ease_train.exits import Gate, exit_adapter, start_as_identity
from ease_train.routed import RoutedBlock

__all__ = ["Block", "Decoder", "RoutedBlock"]


class Decoder(nn.Module):
    """The decoder: embedding, blocks, and an LM head that the exits share unless the configuration gives them their own.

    model = Decoder(ModelConfig(vocab_size=4096))
    logits = model(input_ids)                       # full depth, (B, S, V)
    for layer, hidden in model.exit_states(input_ids):
        logits = model.head(layer)(model.exit_hidden(hidden, layer))
    """

    cos: Tensor
    sin: Tensor
    draft_ids: Tensor
    draft_log_shares: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "the vocabulary's size comes from the tokenizer before a model is built"
        self.config, early = config, config.exits[:-1]
        self.recompute_activations = False  # in the backward pass, instead of keeping them: less memory, more time
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        layers = range(1, config.num_layers + 1)
        self.layers = nn.ModuleList(RoutedBlock(config) if layer in config.routed_layers else Block(config) for layer in layers)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps) if config.final_norm else nn.Identity()
        own = early if config.exit_norm == "own" and config.final_norm else ()
        self.exit_norms = nn.ModuleDict({str(layer): nn.RMSNorm(config.dim, config.norm_eps) for layer in own})
        adapted = early if config.exit_adapter != "none" else ()
        self.adapters = nn.ModuleDict({str(layer): exit_adapter(config) for layer in adapted})
        headed = early if config.exit_head == "own" else ()
        self.exit_heads = nn.ModuleDict({str(layer): nn.Linear(config.dim, config.vocab_size, bias=False) for layer in headed})
        self.draft_head: nn.Linear | None = None
        self.draft_rest: nn.Linear | None = None
        if early and config.exit_head == "reduced":
            self.draft_head = nn.Linear(config.dim, config.exit_vocab_size, bias=False)
            self.draft_rest = nn.Linear(config.dim, 1, bias=False)  # all tokens that the reduced head does not know, as one
            self.register_buffer("draft_ids", torch.arange(config.exit_vocab_size))  # ascending; chosen by `choose_draft_ids`
            self.register_buffer("draft_log_shares", torch.zeros(config.vocab_size))  # of the rest, by token; 0 for known ones
            self.draft_log_shares[config.exit_vocab_size :] = -math.log(config.vocab_size - config.exit_vocab_size)
        self.gates = nn.ModuleDict({str(layer): Gate(config.dim, config.gate_width) for layer in config.gates})
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._initialise)
        for adapter in self.adapters.values():
            start_as_identity(adapter)
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

    def run_layers(self, hidden: Tensor, first: int, last: int, active: Tensor | None = None, drop: Sequence[float] = ()) -> Tensor:
        """Run layers first..last (from 1, both included).

        A token with `active` False is frozen: its hidden state passes through unchanged, and each layer's keys and
        values for it come from that frozen state, which is state propagation (CALM, arXiv 2207.07061, section 3.1).
        `drop` holds a probability a layer of the whole model: a sequence skips the layer with it (LayerSkip, arXiv 2404.16710).
        Shape: hidden (B, S, D), active (B, S) bool -> (B, S, D).
        """
        for layer in range(first, last + 1):
            after = self._after(layer, hidden, drop[layer - 1] if drop else 0.0)
            hidden = after if active is None else torch.where(active[..., None], after, hidden)
        return hidden

    def _after(self, layer: int, hidden: Tensor, drop: float) -> Tensor:
        """The hidden state after one layer, for the sequences that do not skip it."""
        if drop == 0.0:
            return self._run(layer, hidden)
        kept = (torch.rand(len(hidden)) >= drop).nonzero().flatten().to(hidden.device)  # on the CPU: its state is in the checkpoint
        return hidden.index_copy(0, kept, self._run(layer, hidden[kept]))

    def _run(self, layer: int, hidden: Tensor) -> Tensor:
        return self._through(self.layers[layer - 1], hidden)

    def _through(self, block: nn.Module, hidden: Tensor) -> Tensor:
        cos, sin = self.cos[: hidden.shape[1]], self.sin[: hidden.shape[1]]
        if self.recompute_activations and isinstance(block, Block):
            return cast(Tensor, checkpoint(block, hidden, cos, sin, use_reentrant=False))
        return cast(Tensor, block(hidden, cos, sin))

    def exit_states(self, input_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, hidden state) at each exit, shallow first. Shape: (B, S) -> (B, S, D) each."""
        hidden = self.embed(input_ids)
        for first, last in self.config.segments:
            hidden = self.run_layers(hidden, first, last)
            yield last, hidden

    def exit_block(self, layer: int) -> Block | None:
        """The layer of its own that an exit after `layer` begins with, where it has one: it attends, as the model's layers do."""
        adapter = self.adapters[str(layer)] if str(layer) in self.adapters else None  # noqa: SIM401 - a ModuleDict has no get
        return adapter if isinstance(adapter, Block) else None

    def exit_module(self, layer: int) -> nn.Module:
        """What stands between a hidden state at `layer`, after the exit's block where it has one, and the exit's head.

        An adapter that is no block, then the norm; each token on its own. Shape: (..., D) -> (..., D).
        """
        norm = self.exit_norms[str(layer)] if str(layer) in self.exit_norms else self.norm  # noqa: SIM401 - a ModuleDict has no get
        adapted = str(layer) in self.adapters and self.exit_block(layer) is None
        return nn.Sequential(self.adapters[str(layer)], norm) if adapted else norm

    def exit_hidden(self, hidden: Tensor, layer: int) -> Tensor:
        """What the exit's head and gate read. Shape: (..., D) -> (..., D); (B, S, D) from position 0 where the exit has a block."""
        if (block := self.exit_block(layer)) is not None:
            hidden = self._through(block, hidden)
        return cast(Tensor, self.exit_module(layer)(hidden))

    def head(self, layer: int) -> nn.Linear:
        """The LM head of an exit: its own, the early exits' reduced one, or the shared one. Shape: (..., D) -> (..., V or M)."""
        if self.draft_head is not None and layer != self.config.num_layers:
            return self.draft_head
        own = str(layer) in self.exit_heads
        return cast(nn.Linear, self.exit_heads[str(layer)]) if own else self.lm_head

    def head_ids(self, layer: int) -> Tensor | None:
        """The tokens that an exit's head knows, ascending, where it does not know all. Shape: (M) int64."""
        return self.draft_ids if self.draft_head is not None and layer != self.config.num_layers else None

    def head_weight(self, layer: int) -> Tensor:
        """The head's matrix; a reduced head's last row is for the rest of the vocabulary as one. Shape: (V, D), or (M + 1, D)."""
        head = self.head(layer)
        return head.weight if self.draft_rest is None or head is not self.draft_head else torch.cat((head.weight, self.draft_rest.weight))

    def exit_logits(self, layer: int, exit_hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary. What a reduced head gives the rest is shared out as these tokens were counted.

        Shape: (..., D) -> (..., V).
        """
        logits: Tensor = self.head(layer)(exit_hidden)
        ids = self.head_ids(layer)
        if ids is None or self.draft_rest is None:
            return logits
        rest: Tensor = self.draft_rest(exit_hidden) + self.draft_log_shares
        return rest.index_copy(-1, ids, logits)

    @torch.no_grad()
    def choose_draft_ids(self, counts: Tensor) -> None:
        """Let the reduced head know the tokens that were counted most often, its rows the LM head's. Shape: counts (V) int64.

        The rest's row starts as the mean of theirs; each of them was counted once more than it was, so that none has no share.
        """
        assert self.draft_head is not None
        assert self.draft_rest is not None
        most_first = counts.argsort(descending=True, stable=True)
        self.draft_ids.copy_(most_first[: len(self.draft_ids)].sort().values)
        self.draft_head.weight.copy_(self.lm_head.weight[self.draft_ids])
        rest = most_first[len(self.draft_ids) :]
        shares = (counts[rest] + 1) / (counts[rest] + 1).sum()
        self.draft_log_shares.zero_().index_copy_(0, rest, shares.log().to(self.draft_log_shares.dtype))
        self.draft_rest.weight.copy_(shares.to(self.lm_head.weight.dtype) @ self.lm_head.weight[rest])

    def predictor_loss(self) -> Tensor | None:
        """Mean loss of the routed blocks' predictors in the last forward pass of training; None without routed blocks."""
        losses = [block.predictor_loss for block in self.layers if isinstance(block, RoutedBlock) and block.predictor_loss is not None]
        return torch.stack(losses).mean() if losses else None
