"""The original EASE's four models, with its constructor arguments: thin classes over `Decoder`.

What they share with the original: an exit after every layer, one output head for all of them, no final norm,
multi-head attention. `forward(x)` gives the last layer's logits, `forward_all_layers(x)` one (B, S, V) tensor
a layer.

    model = DEEDTransformer(vocab_size=1000, dim=64, num_layers=3)
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_common.errors import ConfigError
from ease_train.methods.losses import Objective, exit_loss
from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig


def original_config(
    vocab_size: int, dim: int, num_layers: int, num_heads: int, **more: object
) -> ModelConfig:
    """The original's architecture as a configuration."""
    shape = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
    }
    exits = list(range(1, num_layers + 1))
    fixed = {"exits": exits, "exit_norm": "shared", "final_norm": False, "tie_embeddings": False}
    return ModelConfig.from_dict({**shape, **fixed, **more}, "the original's model")


class LayeredDecoder(Decoder):
    """A decoder with an exit after every layer: what the original's API asks of a model."""

    def forward_all_layers(self, input_ids: Tensor) -> list[Tensor]:
        """Logits of every layer. Shape: (B, S) int64 -> num_layers of (B, S, V)."""
        return [
            self.exit(layer).head(self.exit_hidden(hidden, layer))
            for layer, hidden in self.exit_states(input_ids)
        ]

    def forward_train(self, input_ids: Tensor, exit_layer: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at `exit_layer`, logits of the last layer, and the exit's confidence, its largest
        probability.

        Shape: (B, S) int64 -> (B, S, V), (B, S, V), (B, S).
        """
        if exit_layer not in self.config.exits:
            raise ConfigError(
                f"exit_layer = {exit_layer}, expected a layer from 1 to {self.config.num_layers}"
            )
        logits = self.forward_all_layers(input_ids)
        shallow = logits[exit_layer - 1]
        return shallow, logits[-1], F.softmax(shallow, dim=-1).max(dim=-1).values


class StandardTransformer(LayeredDecoder):
    """The plain model. Every layer can be read, whatever it was trained for."""

    def __init__(
        self, vocab_size: int = 1000, dim: int = 64, num_layers: int = 3, num_heads: int = 4
    ) -> None:
        super().__init__(original_config(vocab_size, dim, num_layers, num_heads))


class DEEDTransformer(StandardTransformer):
    """Deep supervision with a shared head (Tang et al.

    2023, arXiv 2311.08623): the same layers, trained at several exits.
    """


class TokenRoutedTransformer(StandardTransformer):
    """One exit, and each token trained on the path it takes.

    model = TokenRoutedTransformer(vocab_size=1000, dim=64, num_layers=3, exit_layer=1, routing_threshold=0.7)
    for epoch in range(20):
        loss = model.routed_loss(x, y, epoch)       # joint for the first five epochs, then routed
    """

    def __init__(
        self,
        vocab_size: int = 1000,
        dim: int = 64,
        num_layers: int = 3,
        exit_layer: int = 1,
        routing_threshold: float = 0.95,
        num_heads: int = 4,
    ) -> None:
        super().__init__(vocab_size, dim, num_layers, num_heads)
        if not 1 <= exit_layer < num_layers:
            raise ConfigError(
                f"exit_layer = {exit_layer}, expected a layer from 1 to {num_layers - 1}: one before the last"
            )
        self.exit_layer = exit_layer
        self.routing_threshold = routing_threshold

    def forward_train(
        self, input_ids: Tensor, exit_layer: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward_train(input_ids, self.exit_layer if exit_layer is None else exit_layer)

    def routed_loss(
        self, input_ids: Tensor, targets: Tensor, epoch: int, warmup_epochs: int = 5, alpha: float = 0.7
    ) -> Tensor:
        """alpha CE(exit) + (1 - alpha) CE(last) while `epoch` < `warmup_epochs`; then each token's loss on
        its own path only.

        Shape: (B, S) int64 twice -> scalar.
        """
        last = self.config.num_layers
        if epoch < warmup_epochs:
            objective = Objective(weights={self.exit_layer: alpha, last: 1 - alpha})
        else:
            objective = Objective(
                weights={self.exit_layer: 1.0, last: 1.0}, routing_threshold=self.routing_threshold
            )
        return exit_loss(self, input_ids, targets, objective)[0]

    @torch.no_grad()
    def routed_logits(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The logits each token gets, and which took the exit.

        Shape: (B, S) int64 -> (B, S, V), (B, S) bool.
        """
        shallow, deep, confidence = self.forward_train(input_ids)
        leaves = confidence >= self.routing_threshold
        return torch.where(leaves[..., None], shallow, deep), leaves


class MoDTransformer(LayeredDecoder):
    """Every second block routed (Raposo et al.

    2024, arXiv 2404.02258): layers 2, 4, .. take the `capacity` share of the tokens.

    In `train()` by the router's top scores over the sequence, in `eval()` by the causal predictor.
    `auxiliary_loss()` is the predictor's, of the last forward pass in training; add it to the loss
    (`exit_loss` does).
    """

    def __init__(
        self,
        vocab_size: int = 1000,
        dim: int = 64,
        num_layers: int = 3,
        capacity: float = 0.125,
        num_heads: int = 4,
    ) -> None:
        routed = list(range(2, num_layers + 1, 2))
        super().__init__(
            original_config(vocab_size, dim, num_layers, num_heads, routed_layers=routed, capacity=capacity)
        )

    def auxiliary_loss(self) -> Tensor:
        """Mean binary cross-entropy of the predictors; 0 where no block is routed."""
        loss = self.predictor_loss()
        return self.lm_head.weight.new_zeros(()) if loss is None else loss
