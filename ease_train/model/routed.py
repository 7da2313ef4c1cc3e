"""A Mixture-of-Depths block: most tokens go around it (Raposo et al. 2024, arXiv 2404.02258).

In training the block takes the `capacity` share of a sequence with the highest router scores (expert choice),
which looks at later tokens. At inference (`eval()`) a causal rule decides, the same for a whole text and
token by token: a token goes in when the predictor, trained beside the model on the same choice without
touching it, says so; or, with the rule `threshold`, when its score reaches the running mean of the score that
the `capacity` share of a batch reached in training (after Expert Threshold routing, arXiv 2603.11535). Tokens
that go around have no keys and values in the block.

Shapes: B batch, S sequence, D width, K routed tokens, P width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.model.blocks import Attention, Block
from ease_train.model.exits import TokenScore
from ease_train.training.config import ModelConfig

EMA_WEIGHT = 0.01  # of the newest batch in the threshold; the first hundred weigh the same


class RoutedBlock(nn.Module):
    """x + router(x) * (block(x) - x) for the tokens that go in, x for the others.

    Shape: (B, S, D) -> (B, S, D).

    `predictor_loss` is that of the last forward pass in training: the binary cross-entropy of the predictor
    against the router's choice, on inputs whose gradient is stopped; None where a threshold decides.
    """

    threshold: Tensor
    num_batches: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.block = Block(config, layer)
        self.router = TokenScore(config.dim, bias=False)
        self.predictor = (
            TokenScore(config.dim, max(8, config.dim // 4)) if config.routing_rule == "predictor" else None
        )
        if self.predictor is None:
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("num_batches", torch.zeros(()))
        self.capacity = config.capacity
        self.predictor_loss: Tensor | None = None

    @property
    def attention(self) -> Attention:
        """Its block's."""
        return self.block.attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._expert_choice(x, cos, sin) if self.training else self._causal(x, cos, sin)

    def goes_in(self, x: Tensor) -> Tensor:
        """The causal rule: the predictor's logit is above 0, or the score reaches the threshold.

        Shape: (B, S, D) -> (B, S) bool.
        """
        return (
            torch.ge(self.router(x), self.threshold)
            if self.predictor is None
            else torch.gt(self.predictor(x), 0)
        )

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the top `capacity` share of each sequence, in order, and their scores.

        Shape: (B, S, D) -> two of (B, K).
        """
        scores = self.router(x)
        count = max(1, round(self.capacity * x.shape[1]))
        positions = scores.topk(count, dim=1).indices.sort(dim=1).values
        return positions, scores.gather(1, positions)

    def _expert_choice(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        positions, scores = self.chosen(x)
        index = positions[..., None].expand(-1, -1, x.shape[-1])  # (B, K, D)
        picked = x.gather(1, index)
        change = self.block(picked, cos[positions][:, None], sin[positions][:, None]) - picked
        if self.predictor is None:
            self._follow(self.router(x.detach()))
        else:
            target = torch.zeros(x.shape[:2], device=x.device).scatter(1, positions, 1.0)
            self.predictor_loss = F.binary_cross_entropy_with_logits(
                self.predictor(x.detach()).float(), target
            )
        return x.scatter_add(1, index, (scores[..., None] * change).to(x.dtype))

    @torch.no_grad()
    def _follow(self, scores: Tensor) -> None:
        """Move the threshold towards the score that the `capacity` share of these tokens reaches.

        Shape: (B, S).
        """
        self.num_batches += 1
        reached = torch.quantile(scores.float(), 1 - self.capacity)
        self.threshold.lerp_(reached, (1 / self.num_batches).clamp(min=EMA_WEIGHT))

    def _causal(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        inside = self.goes_in(x)
        change = self.block(x, cos, sin, inside) - x
        return torch.where(inside[..., None], x + self.router(x)[..., None] * change, x)
