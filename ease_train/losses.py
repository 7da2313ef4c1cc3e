"""The weighted sum of exit losses, without ever holding the logits of more than one chunk of one exit.

Joint training of all exits on a weighted sum of their cross-entropies is BranchyNet's (Teerapittayanon et al. 2016,
arXiv 1709.01686) and, for decoders, CALM's (Schuster et al. 2022, arXiv 2207.07061).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.model import Decoder

CHUNK_ROWS = 1024  # rows of logits held at once: 16 MB for a vocabulary of 4096


class _ExitCrossEntropy(torch.autograd.Function):
    """sum_i w_i * CE(h_i @ W^T, y): loss and gradients chunk by chunk in the forward pass.

    The gradient of the shared head's weight is one (V, D) buffer whatever the number of exits.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, targets: Tensor, exit_weights: tuple[float, ...], *hiddens: Tensor) -> tuple[Tensor, Tensor]:
        grad_weight = torch.zeros_like(weight)
        grads = [torch.empty_like(h) for h in hiddens]
        losses = torch.zeros(len(hiddens), dtype=torch.float32, device=weight.device)
        for i, (hidden, scale) in enumerate(zip(hiddens, exit_weights, strict=True)):
            for start in range(0, len(targets), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                grad = (hidden[rows] @ weight.T).float()  # logits; turned into their gradient below, in place
                losses[i] += F.cross_entropy(grad, targets[rows], reduction="sum") / len(targets)
                torch.softmax(grad, dim=-1, out=grad)
                grad[torch.arange(len(grad), device=grad.device), targets[rows]] -= 1.0
                grad = grad.mul_(scale / len(targets)).to(weight.dtype)
                grads[i][rows] = grad @ weight
                grad_weight.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(grad_weight, *grads)
        ctx.mark_non_differentiable(losses)
        return (losses * torch.tensor(exit_weights, device=losses.device)).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, *grads = ctx.saved_tensors
        return (grad_weight * grad_outputs[0], None, None, *(g * grad_outputs[0] for g in grads))


def exit_cross_entropy(
    model: Decoder, input_ids: Tensor, targets: Tensor, layer_weights: Mapping[int, float]
) -> tuple[Tensor, dict[int, float]]:
    """The training loss, sum over exits of weight times mean cross-entropy, and each exit's own loss in nats.

    Exits with weight 0 are left out, and no layer runs past the last exit that has a weight.
    Shape: input_ids and targets (B, S) int64 -> scalar with gradient, {layer: loss}.
    """
    wanted = {layer: weight for layer, weight in layer_weights.items() if weight > 0}
    states = {}
    for layer, hidden in model.exit_states(input_ids):
        if layer in wanted:
            states[layer] = model.exit_hidden(hidden, layer).flatten(0, 1)  # (B*S, D)
        if len(states) == len(wanted):
            break
    weights = tuple(wanted[layer] for layer in states)
    total, losses = _ExitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        model.lm_head.weight, targets.flatten(), weights, *states.values()
    )
    return total, dict(zip(states, losses.tolist(), strict=True))


@torch.no_grad()
def exit_losses(model: Decoder, input_ids: Tensor, targets: Tensor) -> dict[int, float]:
    """Mean cross-entropy at every exit, in nats a token. Shape: (B, S) int64 twice -> {layer: loss}."""
    flat, losses = targets.flatten(), {}
    for layer, hidden in model.exit_states(input_ids):
        rows = model.exit_hidden(hidden, layer).flatten(0, 1)
        total = sum(
            F.cross_entropy(
                model.lm_head(rows[start : start + CHUNK_ROWS]).float(), flat[start : start + CHUNK_ROWS], reduction="sum"
            ).item()
            for start in range(0, len(flat), CHUNK_ROWS)
        )
        losses[layer] = total / len(flat)
    return losses
