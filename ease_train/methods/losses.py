"""The weighted sum of exit losses, without ever holding the logits of more than one chunk of one exit.

Joint training of all exits on a weighted sum of their cross-entropies is BranchyNet's (Teerapittayanon et al.
2016, arXiv 1709.01686) and, for decoders, CALM's (Schuster et al. 2022, arXiv 2207.07061).

A reduced head (FR-Spec, Zhao et al. 2025, arXiv 2502.14856) knows M tokens; to its cross-entropy and its
divergence from the last layer all others are one token more, so that it learns how likely it is that the text
goes on with something it cannot say.

Shapes: N tokens (batch times sequence), D width, V vocabulary (M + 1 for a reduced head), E exits that are
trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_train.methods.gradients import split_gradient
from ease_train.methods.method import Distill
from ease_train.model.blocks import wide, widened
from ease_train.model.decoder import Decoder
from ease_train.training.states import States

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MB


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What one step minimises: the weights of the exits, and what is asked of them beside their
    cross-entropy.

    weights             layer (from 1) -> weight; exits with weight 0 are left out
    distill             an early exit's loss is CE + lambda T^2 KL(last || exit) + mu |h_last - h_exit|^2,
                        with lambda its `weight`, T its `temperature` and mu its `hidden_weight` (a mean over
                        the width, after the exits' norms; the last exit's side gets no gradient); CE is with
                        the token that its `labels` name
    routing_threshold   above 0, a token trains only the first exit whose top probability reaches it, else
                        the last, each with weight 1
    gradient            what the layers see of it: `joint`, `equilibrium`, `detached` (gradients.py)
    drop                layer dropout, one probability a layer (LayerSkip)
    predictor_weight    weight of the Mixture-of-Depths predictors' loss
    """

    weights: Mapping[int, float]
    distill: Distill = field(default_factory=Distill)
    routing_threshold: float = 0.0
    gradient: str = "joint"
    drop: tuple[float, ...] = ()
    predictor_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _Teacher:
    """The last exit, which learns nothing here: what its head reads (N, D), and the head's weight (V, D).

    `log_sums` (N), of its exponentiated logits divided by the temperature, spare it most of its work before a
    reduced head.
    """

    hidden: Tensor
    weight: Tensor
    temperature: float
    ids: Tensor | None  # the tokens that its pupils know; None: all
    log_sums: Tensor | None = None

    def probabilities(self, rows: slice) -> Tensor:
        """Of all tokens, or of those that the pupils know and of the rest. Shape: (n, V), or (n, M + 1)."""
        if self.ids is None or self.log_sums is None:
            found = torch.softmax((self.hidden[rows] @ self.wide_weight.T).float() / self.temperature, dim=-1)
            if self.ids is None:
                return found
            known = found[:, self.ids]
        else:
            logits = (self.hidden[rows] @ self.known_weight.T).float()
            known = (logits / self.temperature - self.log_sums[rows, None]).exp_()
        return torch.cat((known, (1.0 - known.sum(dim=-1, keepdim=True)).clamp_(min=0.0)), dim=-1)

    @cached_property
    def known_weight(self) -> Tensor:
        """The head's rows for those tokens. Shape: (M, D)."""
        return wide(self.weight[self.ids])

    @cached_property
    def wide_weight(self) -> Tensor:
        """The head's weight, no narrower than fp32. Shape: (V, D)."""
        return wide(self.weight)


@dataclass(frozen=True, kw_only=True)
class _ChunkedLoss:
    """The chunked loss's constants: for each exit, its head among the given ones and its weights; and the
    teacher, if any.
    """

    heads: tuple[int, ...]
    ids: tuple[Tensor | None, ...]  # by exit, the tokens that its head knows; None: all
    weights: tuple[float, ...]
    distill: tuple[float, ...]
    temperature: float
    threshold: float
    teacher: _Teacher | None


class _ExitLoss(torch.autograd.Function):
    """sum_i w_i CE(h_i W_i^T, y) + d_i T^2 KL(softmax(h_E W_E^T / T) || softmax(h_i W_i^T / T)), a mean over
    tokens.

    Loss and gradients are computed chunk by chunk in the forward pass; the gradient of a head's weight is one
    (V, D) buffer whatever the number of exits that share it. The mean's 1/N comes in with the backward pass,
    so that fp16 need not hold it.
    """

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, plan: _ChunkedLoss, num_heads: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads = tensors[:num_heads]
        hiddens = tensors[num_heads:]
        needed = ctx.needs_input_grad[3:]  # a frozen head or exit costs no gradient
        grad_heads, grads = (
            [torch.zeros_like(t) if n else None for t, n in zip(ts, ns, strict=True)]
            for ts, ns in ((heads, needed[:num_heads]), (hiddens, needed[num_heads:]))
        )
        sums = torch.zeros(
            2, len(hiddens), dtype=torch.float32, device=targets.device
        )  # weighted; cross-entropy alone
        taught = plan.teacher is not None and any(plan.distill)
        held = (
            4 if taught else 1
        )  # arrays of the size of a chunk's logits: teacher, student, their divergence
        size = max(1, CHUNK_ELEMENTS // (held * max(len(head) for head in heads)))
        for start in range(0, targets.shape[1], size):
            rows = slice(start, start + size)
            teacher = plan.teacher.probabilities(rows) if plan.teacher is not None and taught else None
            waiting = torch.ones_like(targets[0, rows], dtype=torch.bool, device=targets.device)
            for i, hidden in enumerate(hiddens):
                weight = heads[plan.heads[i]]
                head = plan.heads[i]
                logits = (hidden[rows] @ weight.T).float()  # turned into their gradient below, in place
                row_weights, waiting = _row_weights(logits, plan, i, waiting)
                losses, distances = _chunk(
                    logits,
                    _places(targets[i, rows], plan.ids[i]),
                    row_weights,
                    plan.distill[i],
                    plan,
                    teacher,
                )
                sums[0, i] += (losses * row_weights).sum() + distances
                sums[1, i] += losses.sum()
                grad = logits.to(weight.dtype)
                if (into := grads[i]) is not None:
                    into[rows] = (grad @ weight).to(into.dtype)
                if (total := grad_heads[head]) is not None:
                    _add_product(total, grad.T, hidden[rows].to(weight.dtype))
        ctx.save_for_backward(*grad_heads, *grads)
        ctx.num_tokens = targets.shape[1]
        total_loss = (sums[0] / ctx.num_tokens).sum()
        means = sums[1] / ctx.num_tokens
        ctx.mark_non_differentiable(means)
        return total_loss, means

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0] / ctx.num_tokens
        return (None, None, None, *(None if g is None else g.mul_(scale) for g in ctx.saved_tensors))


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, the product in autocast's precision."""
    if torch.is_autocast_enabled(into.device.type):
        into += left @ right
    else:
        into.addmm_(left, right)


def _places(targets: Tensor, ids: Tensor | None) -> Tensor:
    """Each target's row in a head: in a reduced one M, the rest's, where it is none of `ids`.

    Shape: (n), (M) -> (n) int64.
    """
    if ids is None:
        return targets
    places = torch.searchsorted(ids, targets).clamp(max=len(ids) - 1)
    return torch.where(ids[places] == targets, places, len(ids))


def _row_weights(
    logits: Tensor, plan: _ChunkedLoss, exit_number: int, waiting: Tensor
) -> tuple[Tensor, Tensor]:
    """Each token's weight at an exit, and who still waits for one.

    Shape: (n, V), (n) bool -> (n), (n) bool.
    """
    if plan.threshold == 0.0:
        return torch.full_like(logits[:, 0], plan.weights[exit_number]), waiting
    leaves = waiting
    if exit_number < len(plan.weights) - 1:
        said = logits if plan.ids[exit_number] is None else logits[:, :-1]  # the rest is many tokens
        top = (said.max(dim=-1).values - logits.logsumexp(dim=-1)).exp()
        leaves = waiting & (top >= plan.threshold)
    return leaves.float(), waiting & ~leaves


def _chunk(
    logits: Tensor, places: Tensor, scales: Tensor, distill: float, plan: _ChunkedLoss, teacher: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropies (n), and the summed, scaled divergence from the teacher; `logits` becomes the gradient
    of both.
    """
    everyone = torch.arange(len(places), device=places.device)
    losses = logits.logsumexp(dim=-1) - logits[everyone, places]
    distance = torch.zeros((), device=logits.device)
    extra = None
    if teacher is not None and distill > 0:
        student = torch.log_softmax(logits / plan.temperature, dim=-1)
        distance = distill * plan.temperature**2 * F.kl_div(student, teacher, reduction="sum")
        extra = student.exp_().sub_(teacher).mul_(distill * plan.temperature)
    torch.softmax(logits, dim=-1, out=logits)
    logits[everyone, places] -= 1.0
    logits.mul_(scales[:, None])
    if extra is not None:
        logits.add_(extra)
    return losses, distance


def exit_loss(
    model: Decoder, input_ids: Tensor, targets: Tensor, objective: Objective
) -> tuple[Tensor, dict[int, float]]:
    """The training loss, and the plain cross-entropy of each exit that is trained, in nats a token.

    No layer runs past the last exit that is needed. Shape: input_ids and targets (B, S) int64 -> scalar with
    gradient, {layer: loss}.
    """
    rows = _exit_rows(model, input_ids, objective)
    last = model.config.num_layers
    teacher = None
    labels = targets.flatten()
    if objective.distill.on:
        teacher = _Teacher(
            hidden=rows[last].detach(),
            weight=model.lm_head.weight.detach(),
            temperature=objective.distill.temperature,
            ids=_early_ids(model),
        )
        labels = (
            top_tokens(model, last, teacher.hidden) if objective.distill.labels == "last-exit" else labels
        )
    total, losses = _rows_loss(model, rows, (labels, targets.flatten()), objective, teacher)
    if model.training and (predictor := model.predictor_loss()) is not None:
        total = total + objective.predictor_weight * predictor
    return total, losses


def state_loss(
    model: Decoder, input_ids: Tensor, targets: Tensor, objective: Objective, states: States
) -> tuple[Tensor, dict[int, float]]:
    """`exit_loss` of the early exits, from what the frozen layers made of `input_ids` before, which need not
    run again.
    """
    wanted = [layer for layer in states.hidden if objective.weights.get(layer, 0.0) > 0]
    rows = {layer: model.exit_hidden(states.hidden[layer], layer).flatten(0, 1) for layer in wanted}
    teacher = _Teacher(
        hidden=states.last.flatten(0, 1),
        weight=model.lm_head.weight.detach(),
        temperature=objective.distill.temperature,
        ids=_early_ids(model),
        log_sums=states.log_sums.flatten(),
    )
    labels = states.top if objective.distill.labels == "last-exit" else targets
    return _rows_loss(
        model,
        rows,
        (labels.flatten(), targets.flatten()),
        objective,
        teacher if objective.distill.on else None,
    )


def _early_ids(model: Decoder) -> Tensor | None:
    """The tokens that the early exits know; None: all."""
    return model.exit(model.config.exits[0]).head.ids


def _rows_loss(
    model: Decoder,
    rows: Mapping[int, Tensor],
    labels: tuple[Tensor, Tensor],
    objective: Objective,
    teacher: _Teacher | None,
) -> tuple[Tensor, dict[int, float]]:
    """The loss of exits whose heads read `rows` {layer: (N, D)}; labels of the early ones and of the last
    (N).
    """
    layers = list(rows)
    last = model.config.num_layers
    weights = tuple(objective.weights.get(layer, 0.0) for layer in layers)
    heads = [model.exit(layer).head for layer in layers]
    unique = list(dict.fromkeys(heads))
    matrices = [wide(head.weight) for head in unique]
    plan = _ChunkedLoss(
        heads=tuple(unique.index(head) for head in heads),
        ids=tuple(head.ids for head in heads),
        weights=weights,
        distill=tuple(
            objective.distill.weight * weight * (layer != last)
            for layer, weight in zip(layers, weights, strict=True)
        ),
        temperature=objective.distill.temperature,
        threshold=objective.routing_threshold,
        teacher=teacher,
    )
    wanted = torch.stack([labels[layer == last] for layer in layers])  # (E, N)
    total, losses = _ExitLoss.apply(wanted, plan, len(matrices), *matrices, *rows.values())  # type: ignore[no-untyped-call]
    if objective.distill.hidden_weight and teacher is not None:
        early = [
            (rows[layer], weight) for layer, weight in zip(layers, weights, strict=True) if layer != last
        ]
        distances = [weight * F.mse_loss(hidden, teacher.hidden) for hidden, weight in early]
        total = total + objective.distill.hidden_weight * sum(distances, torch.zeros_like(total))
    return total, dict(zip(layers, losses.tolist(), strict=True))


def _exit_rows(model: Decoder, input_ids: Tensor, objective: Objective) -> dict[int, Tensor]:
    """What the heads of the needed exits read, shallow first. Shape: (B, S) -> {layer: (N, D)}."""
    wanted = {layer for layer, weight in objective.weights.items() if weight > 0}
    if objective.distill.on:
        wanted.add(model.config.num_layers)
    rows: dict[int, Tensor] = {}
    hidden = model.embed(input_ids)
    for first, last in model.config.segments:
        hidden = model.run_layers(hidden, first, last, drop=objective.drop)
        if last in wanted:
            branch, hidden = split_gradient(hidden, len(wanted) - len(rows), objective.gradient)
            rows[last] = model.exit_hidden(branch, last).flatten(0, 1)
        if len(rows) == len(wanted):
            break
    return rows


@dataclass(frozen=True)
class ExitMetrics:
    """An exit on some text: mean cross-entropy in nats a token, and the share of tokens on which it says what
    the last layer says.
    """

    loss: float
    agreement: float


@torch.no_grad()
def exit_figures(
    model: Decoder, input_ids: Tensor, targets: Tensor, states: States | None = None
) -> dict[int, ExitMetrics]:
    """Every exit's figures. With `states` the layers need not run.

    Shape: (B, S) int64 twice -> {layer: figures}.
    """
    flat = targets.flatten()
    losses = {}
    tops = {}
    last = model.config.num_layers
    for layer, hidden in states.hidden.items() if states else model.exit_states(input_ids):
        losses[layer], tops[layer] = _loss_and_top(
            model, layer, model.exit_hidden(hidden, layer).flatten(0, 1), flat
        )
    if states is not None:
        losses[last], tops[last] = states.losses.mean().item(), states.top.flatten()
    return {
        layer: ExitMetrics(loss, (tops[layer] == tops[last]).float().mean().item())
        for layer, loss in losses.items()
    }


def _loss_and_top(model: Decoder, layer: int, rows: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """An exit's mean cross-entropy, and its most likely tokens. Shape: (N, D), (N) -> (), (N)."""
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    head = widened(model.exit(layer).head)
    total = 0.0
    tops = []
    for start in range(0, len(targets), size):
        logits = head(rows[start : start + size]).float()
        total += F.cross_entropy(logits, targets[start : start + size], reduction="sum").item()
        tops.append(logits.argmax(dim=-1))
    return total / len(targets), torch.cat(tops)


@torch.no_grad()
def top_tokens(model: Decoder, layer: int, hidden: Tensor) -> Tensor:
    """An exit's most likely tokens, without ever holding all logits. Shape: (N, D) -> (N) int64."""
    size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    head = widened(model.exit(layer).head)
    return torch.cat([head(rows).argmax(dim=-1) for rows in torch.split(hidden, size)])


def exit_losses(model: Decoder, input_ids: Tensor, targets: Tensor) -> dict[int, float]:
    """The losses alone of `exit_figures`."""
    return {layer: figures.loss for layer, figures in exit_figures(model, input_ids, targets).items()}
