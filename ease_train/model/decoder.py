"""A decoder whose hidden state can be read at several exits.

Knows nothing about losses, tokenizers or files. Shapes: B batch, S sequence, D width, P width of a head, V
vocabulary. Layers and exits are numbered from 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ease_train.model.blocks import Block, make_norm, rotary_tables, wide
from ease_train.model.exits import Exit, Gate, LMHead, ReducedHead, exit_adapter, start_as_identity
from ease_train.model.routed import RoutedBlock
from ease_train.training.config import ModelConfig

__all__ = ["Block", "Decoder", "RoutedBlock", "grown"]


class Embedding(nn.Embedding):
    """Rows of a table, no narrower than fp32, times a scale. Shape: (...) int64 -> (..., D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab_size, config.dim)
        self.scale = config.embed_scale

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.scaled(wide(super().forward(input_ids)))

    def scaled(self, rows: Tensor) -> Tensor:
        """What enters the first layer. Shape: (..., D) -> same."""
        return rows if self.scale == 1.0 else rows * self.scale


class Decoder(nn.Module):
    """The decoder: embedding, blocks, and an LM head that the exits share unless the configuration gives them
    their own.

    model = Decoder(ModelConfig(vocab_size=4096))
    logits = model(input_ids)                       # full depth, (B, S, V)
    for layer, hidden in model.exit_states(input_ids):
        logits = model.exit(layer).head(model.exit_hidden(hidden, layer))

    It computes in fp32, whatever its matrices are kept in. `trunk` is the device of all but the exits' own
    parts: "meta" where their weights are yet to be given.
    """

    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    def __init__(self, config: ModelConfig, trunk: str | None = None) -> None:
        super().__init__()
        assert config.vocab_size > 0, "the vocabulary's size comes from the tokenizer before a model is built"
        self.config = config
        early = config.exits[:-1]
        # in the backward pass, instead of keeping them: less memory, more time
        self.recompute_activations = False
        with torch.device(trunk) if trunk else nullcontext():
            self.embed = Embedding(config)
            layers = range(1, config.num_layers + 1)
            self.layers = nn.ModuleList(
                RoutedBlock(config, layer) if layer in config.routed_layers else Block(config, layer)
                for layer in layers
            )
            self.norm = make_norm(config, config.dim) if config.final_norm else nn.Identity()
        parts: dict[str, dict[int, nn.Module]] = {}  # kind by kind: a seed draws the weights in this order
        if config.exit_norm == "own" and config.final_norm:
            parts["norm"] = {layer: make_norm(config, config.dim) for layer in early}
        if config.exit_adapter != "none":
            parts["adapter"] = {layer: exit_adapter(config, layer) for layer in early}
        if config.exit_head == "own":
            parts["head"] = {layer: LMHead(config) for layer in early}
        reduced_head = ReducedHead(config) if early and config.exit_head == "reduced" else None
        parts["gate"] = {layer: Gate(config.dim, config.gate_width) for layer in config.gates}
        with torch.device(trunk) if trunk else nullcontext():
            lm_head = LMHead(config)
        self.exits = nn.ModuleDict()
        for layer in config.exits:
            own = {name: modules[layer] for name, modules in parts.items() if layer in modules}
            head = reduced_head if reduced_head is not None and layer in early else lm_head
            self.exits[str(layer)] = Exit(own, {"norm": self.norm, "head": head})
        self.reduced_head = reduced_head
        self.lm_head = lm_head
        self.set_rotary_tables()
        for part in self.parts():
            part.apply(self._initialise)
        for adapter in parts.get("adapter", {}).values():
            start_as_identity(adapter)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def set_rotary_tables(self) -> None:
        """Compute the rotary tables, which no file holds."""
        for prefix in ("", "local_") if self.config.local_rope_theta else ("",):
            for name, table in zip(("cos", "sin"), rotary_tables(self.config, bool(prefix)), strict=True):
                self.register_buffer(prefix + name, table, persistent=False)

    def rotary(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        """The rotary tables of a layer. Shape: two of (max_positions, P/2)."""
        assert isinstance(block, Block | RoutedBlock)
        return (self.local_cos, self.local_sin) if block.attention.local else (self.cos, self.sin)

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

    def run_layers(
        self, hidden: Tensor, first: int, last: int, active: Tensor | None = None, drop: Sequence[float] = ()
    ) -> Tensor:
        """Run layers first..last (from 1, both included).

        A token with `active` False is frozen: its hidden state passes through unchanged, and each layer's
        keys and values for it come from that frozen state, which is state propagation (CALM, arXiv
        2207.07061, section 3.1). `drop` holds a probability a layer of the whole model: a sequence skips the
        layer with it (LayerSkip, arXiv 2404.16710). Shape: hidden (B, S, D), active (B, S) bool -> (B, S, D).
        """
        for layer in range(first, last + 1):
            after = self._after(layer, hidden, drop[layer - 1] if drop else 0.0)
            hidden = after if active is None else torch.where(active[..., None], after, hidden)
        return hidden

    def _after(self, layer: int, hidden: Tensor, drop: float) -> Tensor:
        """The hidden state after one layer, for the sequences that do not skip it."""
        if drop == 0.0:
            return self._run(layer, hidden)
        kept = (
            (torch.rand(len(hidden)) >= drop).nonzero().flatten().to(hidden.device)
        )  # on the CPU: its state is in the checkpoint
        return hidden.index_copy(0, kept, self._run(layer, hidden[kept]))

    def _run(self, layer: int, hidden: Tensor) -> Tensor:
        return self._through(self.layers[layer - 1], hidden)

    def _through(self, block: nn.Module, hidden: Tensor) -> Tensor:
        cos, sin = (table[: hidden.shape[1]] for table in self.rotary(block))
        if self.recompute_activations and isinstance(block, Block):
            return cast(Tensor, checkpoint(block, hidden, cos, sin, use_reentrant=False))
        return cast(Tensor, block(hidden, cos, sin))

    def exit_states(self, input_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, hidden state) at each exit, shallow first. Shape: (B, S) -> (B, S, D) each."""
        hidden = self.embed(input_ids)
        for first, last in self.config.segments:
            hidden = self.run_layers(hidden, first, last)
            yield last, hidden

    def exit(self, layer: int) -> Exit:
        """The exit after `layer`."""
        return cast(Exit, self.exits[str(layer)])

    @property
    def early_exits(self) -> dict[int, Exit]:
        """All exits but the last, by layer."""
        return {layer: self.exit(layer) for layer in self.config.exits[:-1]}

    def exit_hidden(self, hidden: Tensor, layer: int) -> Tensor:
        """What the exit's head and gate read.

        Shape: (..., D) -> (..., D); (B, S, D) from position 0 where the exit has a block.
        """
        leave = self.exit(layer)
        if leave.block is not None:
            hidden = self._through(leave.block, hidden)
        return cast(Tensor, leave(hidden))

    def parts(self) -> Iterator[nn.Module]:
        """Every part once, the exits' kind by kind: the order in which a seed draws weights, and an optimizer
        numbers them.
        """
        exits = self.early_exits.values()
        norms, adapters, heads, gates = (
            [leave.own[kind] for leave in exits if kind in leave.own] for kind in Exit.PARTS
        )
        yield from (self.embed, self.layers, self.norm, *norms, *adapters, *heads)
        yield from (part for part in (self.reduced_head, *gates, self.lm_head) if part is not None)

    def exit_state(self) -> dict[str, Tensor]:
        """What belongs to the exits alone, by the names of the state dictionary."""
        parts = {"exits": self.exits, "reduced_head": self.reduced_head}
        return {
            f"{part}.{name}": value
            for part, module in parts.items()
            if module is not None
            for name, value in module.state_dict().items()
        }

    def predictor_loss(self) -> Tensor | None:
        """Mean loss of the routed blocks' predictors in the last forward pass of training; None without
        routed blocks.
        """
        losses = [
            block.predictor_loss
            for block in self.layers
            if isinstance(block, RoutedBlock) and block.predictor_loss is not None
        ]
        return torch.stack(losses).mean() if losses else None


def grown(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """A decoder with another's weights, and what those lack as a seed draws it: exits of its own.

    The matrices of the layers, the embedding and the LM head are not copied.
    """
    model = Decoder(config, trunk="meta")
    fresh = model.state_dict()
    own = model.exit_state().keys()
    kept = {
        name: value.clone() if name in own or value.ndim < 2 else value
        for name, value in weights.items()
        if name in fresh and fresh[name].shape == value.shape
    }
    model.load_state_dict(kept, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model
