"""Numbers that change over a run: exit weights, curricula, layer dropout. Plain arithmetic, no torch.

Steps and epochs are numbered from 0, layers from 1. T is the number of steps, L that of layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ease_common.errors import ConfigError
from ease_common.settings import one_of
from ease_train.methods.method import Curriculum, ExitWarmup, MethodConfig
from ease_train.training.config import Recipe

SHAPES = ("constant", "linear", "cosine", "step")


@dataclass(frozen=True)
class AlphaSchedule:
    """The original EASE's alpha: the first layer's weight over the epochs; the last layer's is 1 - alpha.

    AlphaSchedule("linear", start=0.9, end=0.3).get_alpha(epoch=2, max_epochs=10)

    At progress p = epoch / (max_epochs - 1): `constant` start; `linear` start + (end - start) p; `cosine`
    end + (start - end)(1 + cos(pi p))/2; `step` moves by (end - start)/len(steps) at each epoch of `steps`.
    """

    schedule_type: str = "constant"
    start: float = 0.7
    end: float = 0.7
    steps: Sequence[int] = field(default=())

    def __post_init__(self) -> None:
        one_of("AlphaSchedule: schedule_type", self.schedule_type, SHAPES)
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"AlphaSchedule: {name} = {getattr(self, name)}, expected a number from 0 to 1"
                )
        if self.schedule_type == "step" and not self.steps:
            raise ConfigError(
                "AlphaSchedule: schedule_type = 'step' without steps; name the epochs at which alpha moves"
            )

    def get_alpha(self, epoch: int, max_epochs: int) -> float:
        """Alpha at an epoch of `max_epochs`, both counted as `range` does."""
        progress = min(1.0, epoch / (max_epochs - 1)) if max_epochs > 1 else 0.0
        if self.schedule_type == "linear":
            return self.start + (self.end - self.start) * progress
        if self.schedule_type == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
        if self.schedule_type == "step":
            return self.start + (self.end - self.start) * sum(epoch >= step for step in self.steps) / len(
                self.steps
            )
        return self.start


def with_alpha(weights: Mapping[int, float], alpha: float) -> dict[int, float]:
    """The first layer's weight set to alpha and the last one's to 1 - alpha; those between stay."""
    return {**weights, min(weights): alpha, max(weights): 1.0 - alpha}


def normalized(weights: Mapping[int, float]) -> dict[int, float]:
    """Weights divided by their sum."""
    total = sum(weights.values())
    return {layer: weight / total for layer, weight in weights.items()}


def ruled_weights(method: MethodConfig, given: Mapping[int, float], exits: Sequence[int]) -> dict[int, float]:
    """The weights that `weight.rule` gives the exits, before anything that changes over time.

    `depth`: w_i = i / sum of i (CALM, arXiv 2207.07061, eq. 5). `layerskip`: e(l) = e_scale * (0 + 1 + .. +
    l) for a layer l = 0..L-2, and e(L-1) = (L-1) + e_scale * (0 + .. + L-2) (arXiv 2404.16710, eq. 4).
    """
    if method.weight.rule == "uniform":
        return dict.fromkeys(exits, 1.0 / len(exits))
    if method.weight.rule == "depth":
        return {layer: layer / sum(exits) for layer in exits}
    if method.weight.rule == "layerskip":
        last = exits[-1] - 1  # the paper's L - 1
        weights = {layer: method.weight.scale * layer * (layer - 1) / 2 for layer in exits[:-1]}
        return {**weights, exits[-1]: last + method.weight.scale * last * (last - 1) / 2}
    return dict(given)


def warmed_up(weight: float, step: int, warmup: ExitWarmup) -> float:
    """An early exit's weight during EE-LLM's warm-up: w0 + r (w - w0), r = t/W or (1 + cos(pi (t/W + 1)))/2
    (arXiv 2312.04916).
    """
    if not warmup.on or step >= warmup.steps:
        return weight
    share = step / warmup.steps
    if warmup.schedule == "cosine":
        share = (1 + math.cos(math.pi * (share + 1))) / 2
    return warmup.start + share * (weight - warmup.start)


def enabled_exits(step: int, steps: int, curriculum: Curriculum, exits: Sequence[int]) -> list[int]:
    """The exits that a curriculum trains at a step (LayerSkip, arXiv 2404.16710, section 4.1.2); the last one
    always.

    `rotational`: every R-th exit, rotated by one each step. `gradual`: from the last to the first, one more
    every T/(2n) steps.
    """
    if not curriculum.on:
        return list(exits)
    early = exits[:-1]
    count = len(exits)
    if curriculum.kind == "rotational":
        chosen = [layer for i, layer in enumerate(early) if (i - step) % curriculum.every == 0]
    else:
        chosen = [layer for i, layer in enumerate(early) if step >= (count - 1 - i) * steps / (2 * count)]
    return [*chosen, exits[-1]]


def exit_weights(step: int, recipe: Recipe) -> dict[int, float]:
    """The weight of each exit's loss at a step, those that are not trained left out."""
    method = recipe.method
    exits = recipe.model.exits
    weights = {
        layer: weight
        for layer, weight in ruled_weights(method, recipe.train.layer_weights, exits).items()
        if weight > 0
    }
    if method.alpha.on:
        schedule = AlphaSchedule(
            method.alpha.schedule, method.alpha.start, method.alpha.end, method.alpha.steps
        )
        weights = with_alpha(
            {**dict.fromkeys((exits[0], exits[-1]), 0.0), **weights},
            schedule.get_alpha(step, recipe.train.steps),
        )
    weights = {
        layer: weight if layer == exits[-1] else warmed_up(weight, step, method.exit_warmup)
        for layer, weight in weights.items()
    }
    chosen = enabled_exits(step, recipe.train.steps, method.curriculum, exits)
    weights = {layer: weights[layer] for layer in chosen if weights.get(layer, 0.0) > 0}
    return normalized(weights) if method.normalize_weights else weights


def drop_rates(step: int, recipe: Recipe) -> tuple[float, ...]:
    """LayerSkip's layer dropout, one probability a layer; empty when there is none (arXiv 2404.16710, eq.

    1-2).

    p(l, t) = S(t) D(l) p_max with D(l) = exp(l ln2 / (L-1)) - 1, l from 0, and S(t) = 1 or exp(t ln2 / (T-1))
    - 1.
    """
    dropout = recipe.method.layer_dropout
    layers = recipe.model.num_layers
    steps = recipe.train.steps
    if not dropout.on:
        return ()
    in_time = 1.0 if dropout.schedule == "constant" else 2.0 ** (step / max(1, steps - 1)) - 1
    return tuple(
        in_time * (2.0 ** (layer / max(1, layers - 1)) - 1) * dropout.rate for layer in range(layers)
    )
