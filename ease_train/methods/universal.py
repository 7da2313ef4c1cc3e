"""The original EASE's training API: one configuration, one trainer, for every model that can be read at every
layer.

    config = UniversalConfig(layer_weights={1: 0.7, 2: 0, 3: 0.3}, routing_threshold=0.9, exit_layer=1)
    model = DEEDTransformer(vocab_size=1000, dim=64, num_layers=3)
    trainer = UniversalTrainer(config, vocab_size=1000)
    optimizer = trainer.create_optimizer(model, base_lr=1e-3)
    loss, weights = trainer.train_epoch(model, train_batches, optimizer)
    stats = trainer.evaluate(model, val_batches)

Layers are numbered from 1; batches are lists of (x, y), two LongTensors of shape (B, S). A token takes the
shallow exit when its largest probability is at least `routing_threshold`, so 1.0 lets none leave in practice,
and 0, only here, turns routing off.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_common.errors import ConfigError, DataError
from ease_common.settings import AT_LEAST_0
from ease_train.methods.losses import Objective, exit_loss
from ease_train.methods.originals import LayeredDecoder
from ease_train.methods.schedules import AlphaSchedule, normalized, with_alpha

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class UniversalConfig:
    """Which layers are trained with what weight, and where a token may leave.

    layer_weights      layer -> weight of its loss; 0 leaves the layer out; all 0 trains the last layer alone
    exit_layer         the shallow exit
    routing_threshold  in [0, 1]; 0: no routing
    normalize_weights  divide by their sum
    alpha_schedule     replaces layer 1's weight by alpha and the last one's by 1 - alpha, by epoch
    layer_lr_scales    layer -> learning rate as a share of the base (discriminative fine-tuning)

    Raises ConfigError for what cannot be; warns for what means nothing.
    """

    layer_weights: Mapping[int, float]
    exit_layer: int = 1
    routing_threshold: float = 0.95
    normalize_weights: bool = False
    alpha_schedule: AlphaSchedule | None = None
    layer_lr_scales: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, values in (
            ("layer_weights", self.layer_weights),
            ("layer_lr_scales", self.layer_lr_scales or {}),
        ):
            if strange := {
                layer: value for layer, value in values.items() if layer < 1 or value not in AT_LEAST_0
            }:
                raise ConfigError(f"{name} = {strange}, expected layers from 1 and numbers of at least 0")
        if not self.layer_weights:
            raise ConfigError(
                "layer_weights is empty, expected a weight for each layer, like {1: 0.7, 2: 0, 3: 0.3}"
            )
        if not 0 <= self.routing_threshold <= 1:
            raise ConfigError(f"routing_threshold = {self.routing_threshold}, expected a number from 0 to 1")
        if self.exit_layer < 1:
            raise ConfigError(f"exit_layer = {self.exit_layer}, expected a layer from 1")
        for doubt in self.doubts():
            warnings.warn(doubt, UserWarning, stacklevel=3)

    def doubts(self) -> list[str]:
        """What this configuration asks for and does not get."""
        found = []
        last = max(self.layer_weights)
        if not any(self.layer_weights.values()) and self.alpha_schedule is None:
            found.append(f"all layer_weights are 0: only the last layer, {last}, is trained")
        if self.routing_threshold > 0 and self.exit_layer >= last:
            found.append(
                f"exit_layer = {self.exit_layer} is the last layer: routing_threshold = "
                f"{self.routing_threshold} has no effect"
            )
        elif (
            self.routing_threshold > 0
            and self.alpha_schedule is None
            and not self.layer_weights.get(self.exit_layer)
        ):
            found.append(
                f"routing_threshold = {self.routing_threshold} sends tokens out at layer "
                f"{self.exit_layer}, whose weight is 0"
            )
        if self.routing_threshold == 1:
            found.append(
                "routing_threshold = 1 lets a token leave only when a probability rounds to 1; 0 turns "
                "routing off"
            )
        if (
            self.normalize_weights
            and self.alpha_schedule is None
            and math.isclose(sum(self.layer_weights.values()), 1.0)
        ):
            found.append("normalize_weights has no effect: the layer_weights sum to 1")
        return found

    def weights_at(self, epoch: int, max_epochs: int, num_layers: int | None = None) -> dict[int, float]:
        """The layer weights of an epoch: the schedule, then the last layer alone if all are 0, then the
        normalisation.

        The last layer is that of the model, `num_layers`; by default the last of `layer_weights`.
        """
        last = num_layers or max(self.layer_weights)
        weights = {layer: float(weight) for layer, weight in self.layer_weights.items()}
        if self.alpha_schedule is not None:
            weights = with_alpha(
                {1: 0.0, **weights, last: 0.0}, self.alpha_schedule.get_alpha(epoch, max_epochs)
            )
        if not any(weights.values()):
            weights[last] = 1.0
        return normalized(weights) if self.normalize_weights else weights


def _presets() -> dict[str, UniversalConfig]:
    thirds = {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}
    standard = UniversalConfig({1: 0, 2: 0, 3: 1}, routing_threshold=0)
    deep = UniversalConfig(thirds, routing_threshold=0)
    deep_routed = UniversalConfig(thirds, routing_threshold=0.7)
    auxiliary = UniversalConfig({1: 0.5, 2: 0, 3: 0.5})
    asymmetric = UniversalConfig({1: 0.7, 2: 0, 3: 0.3})
    return {
        "standard_llm": standard,
        "deep_supervision": deep,
        "lpt": deep,
        "deep_supervision_routing": deep_routed,
        "lpt_routing": deep_routed,
        "auxiliary_loss": auxiliary,
        "standard_routing": auxiliary,
        "asymmetric": asymmetric,
        "asymmetric_best": asymmetric,
        "asymmetric_with_l2": UniversalConfig({1: 0.7, 2: 1, 3: 0.3}),
        "deep_focus": UniversalConfig({1: 0.3, 2: 0, 3: 0.7}),
    }


PRESETS: dict[str, UniversalConfig] = _presets()
"""The original's presets, for three layers, under both generations of their names."""


class UniversalTrainer:
    """Trains and evaluates a model by a `UniversalConfig`."""

    def __init__(self, config: UniversalConfig, vocab_size: int, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    def create_optimizer(self, model: LayeredDecoder, base_lr: float) -> torch.optim.AdamW:
        """AdamW; with `layer_lr_scales` each layer named there at base_lr times its scale, everything else at
        base_lr.
        """
        scales = self.config.layer_lr_scales or {}
        self._check_layers(model, scales, "layer_lr_scales")
        layers = {layer: list(model.layers[layer - 1].parameters()) for layer in scales}
        scaled = {id(parameter) for parameters in layers.values() for parameter in parameters}
        rest: dict[str, Any] = {
            "params": [p for p in model.parameters() if id(p) not in scaled],
            "lr": base_lr,
        }
        return torch.optim.AdamW(
            [rest, *({"params": layers[layer], "lr": base_lr * scale} for layer, scale in scales.items())]
        )

    def compute_loss(
        self, model: LayeredDecoder, x: Tensor, y: Tensor, weights: Mapping[int, float] | None = None
    ) -> Tensor:
        """sum of weight_i CE(head(h_i), y) over the layers with a weight above 0.

        Shape: (B, S) int64 twice -> scalar.
        """
        self._check_layers(model, self.config.layer_weights, "layer_weights")
        weights = self.config.weights_at(0, 1, model.config.num_layers) if weights is None else dict(weights)
        self._check_layers(model, weights, "weights")
        if not any(weight > 0 for weight in weights.values()):
            weights = {model.config.num_layers: 1.0}
        return exit_loss(model, x.to(self.device), y.to(self.device), Objective(weights=weights))[0]

    def train_epoch(
        self,
        model: LayeredDecoder,
        batches: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        grad_clip: float = 1.0,
        epoch: int = 0,
        max_epochs: int = 1,
    ) -> tuple[float, dict[int, float]]:
        """One pass over the batches: the mean loss, and the layer weights that were used.

        Raises DataError without batches.
        """
        self._check_layers(model, self.config.layer_weights, "layer_weights")
        weights = self.config.weights_at(epoch, max_epochs, model.config.num_layers)
        model.to(self.device).train()
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = self.compute_loss(model, x, y, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(self._some(losses)), weights

    @torch.no_grad()
    def evaluate(self, model: LayeredDecoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Quality under routing, with both paths run (no time is saved here; the runtime saves it).

        ppl: exp of the mean over batches of the batch's mean cross-entropy of the routed logits. acc: share
        of tokens whose most likely next token is right. shallow_ratio: share of tokens that leave.
        compute_cost: layers used, as a share of all: (shallow * exit_layer + deep * num_layers) / (tokens *
        num_layers).
        """
        if self.config.routing_threshold > 0:
            self._check_layers(model, [self.config.exit_layer], "exit_layer")
        model.to(self.device).eval()
        losses = []
        right = 0
        shallow = 0
        tokens = 0
        for x, y in batches:
            logits, leaves = self._routed(model, x.to(self.device))
            targets = y.to(self.device)
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).item())
            right += int((logits.argmax(dim=-1) == targets).sum())
            shallow = shallow + int(leaves.sum())
            tokens = tokens + targets.numel()
        ppl = math.exp(sum(losses) / len(self._some(losses)))
        layers = model.config.num_layers
        cost = (shallow * self.config.exit_layer + (tokens - shallow) * layers) / (tokens * layers)
        return {"ppl": ppl, "acc": right / tokens, "shallow_ratio": shallow / tokens, "compute_cost": cost}

    def _routed(self, model: LayeredDecoder, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits a token gets, and who leaves. Shape: (B, S) int64 -> (B, S, V), (B, S) bool."""
        if self.config.routing_threshold == 0 or self.config.exit_layer == model.config.num_layers:
            return model(x), torch.zeros_like(x, dtype=torch.bool)
        shallow, deep, confidence = model.forward_train(x, self.config.exit_layer)
        leaves = confidence >= self.config.routing_threshold
        return torch.where(leaves[..., None], shallow, deep), leaves

    def _check_layers(self, model: LayeredDecoder, layers: Iterable[int], name: str) -> None:
        if model.config.vocab_size != self.vocab_size:
            raise ConfigError(
                f"the trainer's vocab_size = {self.vocab_size}, expected the model's: "
                f"{model.config.vocab_size}"
            )
        strange = [layer for layer in layers if not 1 <= layer <= model.config.num_layers]
        if strange:
            raise ConfigError(
                f"{name} names layers {strange}, expected layers from 1 to {model.config.num_layers}"
            )

    @staticmethod
    def _some(losses: list[float]) -> list[float]:
        if not losses:
            raise DataError("no batches, expected at least one (x, y)")
        return losses
