"""Gates, a second stage: on a frozen model, learn at each early exit whether the last layer would say the
same token.

    trainer = GateTrainer(load_checkpoint(path), GateConfig(steps=200))
    for event in trainer.fit():
        print(event)
    save_checkpoint(trainer.checkpoint, out)

CALM's meta-classifier (Schuster et al. 2022, arXiv 2207.07061, section 3.4): the label is 1 where the exit's
most likely token is the last layer's (never where a reduced head does not know that one), the two classes
weigh the same. What comes out is then made a probability on the validation split by Platt scaling: a
temperature (Guo et al. 2017, arXiv 1706.04599) and a shift of the bias, since balancing moved the prior.

Shapes: B batch, S sequence, N tokens, D width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from ease_common.errors import ConfigError
from ease_train.data.tokens import pack
from ease_train.methods.losses import top_tokens
from ease_train.methods.method import GateConfig
from ease_train.model.decoder import Decoder, grown
from ease_train.model.exits import Gate
from ease_train.training.checkpoint import Checkpoint
from ease_train.training.parallel import usable_device
from ease_train.training.states import StateCache, States
from ease_train.training.trainer import StatesEvent, known_data, token_stream

BINS = 10  # of the calibration error


@dataclass(frozen=True)
class GateStep:
    """One optimizer step: class-balanced cross-entropy in nats, by exit layer."""

    step: int
    losses: dict[int, float]


@dataclass(frozen=True)
class GateQuality:
    """A gate on the validation split, after calibration.

    agreement is the share of tokens on which exit and last layer agree, auc the chance that a token of them
    has the higher probability of two, ece the mean distance of probability and share over ten bins, brier the
    mean squared error.
    """

    agreement: float
    auc: float
    ece: float
    brier: float
    temperature: float


@dataclass(frozen=True)
class GateReport:
    """Every gate's quality, by exit layer."""

    gates: dict[int, GateQuality]


@torch.no_grad()
def agreement(
    model: Decoder, input_ids: Tensor, states: States | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """What each early exit's gate reads, and whether the exit agrees with the last layer.

    With `states` the layers need not run.

    Shape: (B, S) -> {layer: (N, D), (N) bool}.
    """
    last = model.config.num_layers
    at_exits = states.hidden.items() if states else model.exit_states(input_ids)
    rows = {layer: model.exit_hidden(hidden, layer).flatten(0, 1) for layer, hidden in at_exits}
    said = {layer: top_tokens(model, layer, hidden) for layer, hidden in rows.items()}
    final = states.top.flatten() if states else said[last]
    return {layer: (rows[layer], said[layer] == final) for layer in rows if layer != last}


def balanced_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy in which both classes weigh one half; one class alone weighs 1.

    Shape: (N), (N) bool -> scalar.
    """
    losses = F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none")
    halves = [losses[chosen].mean() for chosen in (labels, ~labels) if chosen.any()]
    return torch.stack(halves).mean()


def platt_scaling(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Temperature T > 0 and shift b that make sigmoid((score + b) / T) most likely.

    Shape: (N), (N) bool -> T, b.
    """
    scores = scores.double()
    target = labels.double()
    log_slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_slope, offset], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(scores * log_slope.exp() + offset, target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    temperature = math.exp(-log_slope.item())
    return temperature, offset.item() * temperature


def quality(probabilities: Tensor, labels: Tensor, temperature: float) -> GateQuality:
    """A gate's figures. Shape: (N), (N) bool."""
    p = probabilities.double()
    y = labels.double()
    bins = (p * BINS).long().clamp(max=BINS - 1)
    gaps = [
        abs((p[bins == b].mean() - y[bins == b].mean()).item()) * (bins == b).double().mean().item()
        for b in sorted(set(bins.tolist()))
    ]
    return GateQuality(y.mean().item(), auc(p, labels), sum(gaps), ((p - y) ** 2).mean().item(), temperature)


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, ties counted half; 0.5 where there is one class. Shape: (N), (N) bool."""
    positive = scores[labels]
    negative = scores[~labels].sort().values
    if not len(positive) or not len(negative):
        return 0.5
    below = torch.searchsorted(negative, positive, right=False) + torch.searchsorted(
        negative, positive, right=True
    )
    return (below.double().mean() / (2 * len(negative))).item()


def blocks_of(
    text: Checkpoint, split: str, length: int, at_least: int, cache: Path | None
) -> NDArray[np.int32]:
    """A split of a checkpoint's data in blocks. Shape: (blocks, length + 1). Raises DataError."""
    return pack(token_stream(text, split, cache), length, at_least, f"{text.data} ({split})")


class GateTrainer:
    """Holds the frozen model with fresh gates at all early exits, and the data of the checkpoint or another
    source.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: GateConfig,
        source: str | None = None,
        device: str = "cpu",
        cache: Path | None = None,
    ) -> None:
        early = checkpoint.recipe.model.exits[:-1]
        if not early:
            raise ConfigError(
                f"the model has no early exit to put a gate at; exits = {list(checkpoint.recipe.model.exits)}"
            )
        config = replace(checkpoint.recipe.model, gates=early, gate_width=settings.gate_width)
        torch.manual_seed(settings.seed)
        kept = {name: value for name, value in checkpoint.model.state_dict().items() if ".gate." not in name}
        model = grown(config, kept)
        self.device = usable_device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.gates = {
            layer: cast(Gate, leave.gate).requires_grad_(True) for layer, leave in model.early_exits.items()
        }
        self.checkpoint = replace(
            checkpoint, recipe=replace(checkpoint.recipe, model=config), model=model, train_state=None
        )
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            [p for gate in self.gates.values() for p in gate.parameters()], lr=settings.learning_rate
        )
        length = checkpoint.recipe.train.sequence_length
        sums = {} if source else dict(checkpoint.data_sha256)
        text = replace(
            self.checkpoint, data=source or known_data(checkpoint), data_sha256=sums, num_documents={}
        )
        self.blocks = blocks_of(text, "train", length, settings.batch_size, cache)
        self.validation = blocks_of(text, "validation", length, 1, cache)[
            : max(1, settings.eval_tokens // length)
        ]
        self.states = self._state_caches(cache) if cache else {}

    def _state_caches(self, folder: Path) -> dict[str, StateCache]:
        recipe = self.checkpoint.recipe
        settings = (
            recipe.method.distill.temperature,
            recipe.train.precision,
        )  # those of tuning, which may have filled it
        splits = {"train": self.blocks, "validation": self.validation}
        return {split: StateCache(folder, self.model, blocks, *settings) for split, blocks in splits.items()}

    def fit(self) -> Iterator[GateStep | GateReport | StatesEvent]:
        """Train every gate, calibrate it, and report; the report also goes to the checkpoint's metrics.

        With a cache the layers' hidden states are computed before the first step.
        """
        for cache in self.states.values():
            yield from (
                StatesEvent(done, len(cache.blocks), cache.num_bytes, cache.path)
                for done in cache.fill(self._ask)
            )
        rng = np.random.default_rng(self.settings.seed)
        for step in range(self.settings.steps):
            yield self.train_step(step, rng.choice(len(self.blocks), self.settings.batch_size, replace=False))
        report = self.calibrate()
        self.checkpoint.metrics.append({"step": self.checkpoint.step, **asdict(report)})
        yield report

    def train_step(self, step: int, numbers: NDArray[np.int64]) -> GateStep:
        """One step of all gates at once, on the blocks of these numbers; the gates share nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * (1 - step / self.settings.steps)
        found = self._agreement("train", numbers)
        losses = {
            layer: balanced_loss(gate.score(found[layer][0]), found[layer][1])
            for layer, gate in self.gates.items()
        }
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return GateStep(step + 1, {layer: loss.item() for layer, loss in losses.items()})

    @torch.no_grad()
    def calibrate(self) -> GateReport:
        """Fit each gate's temperature and bias on one half of the validation blocks, and report on the other
        half.
        """
        halves = [
            self._scores(np.arange(half, len(self.validation), 2))
            for half in range(min(2, len(self.validation)))
        ]
        report = {}
        for layer, gate in self.gates.items():
            with torch.enable_grad():
                temperature, shift = platt_scaling(*halves[0][layer])
            gate.temperature.fill_(temperature)
            gate.score.out.bias.add_(shift)
            scores, labels = halves[-1][layer]
            report[layer] = quality(torch.sigmoid((scores + shift) / temperature), labels, temperature)
        return GateReport(report)

    def _scores(self, numbers: NDArray[np.int64]) -> dict[int, tuple[Tensor, Tensor]]:
        size = self.settings.batch_size
        parts = [self._agreement("validation", numbers[i : i + size]) for i in range(0, len(numbers), size)]
        return {
            layer: (
                torch.cat([gate.score(part[layer][0]) for part in parts]),
                torch.cat([part[layer][1] for part in parts]),
            )
            for layer, gate in self.gates.items()
        }

    def _agreement(self, split: str, numbers: NDArray[np.int64]) -> dict[int, tuple[Tensor, Tensor]]:
        blocks = self.blocks if split == "train" else self.validation
        states = self.states[split].of(numbers, self.device) if split in self.states else None
        found: dict[int, tuple[Tensor, Tensor]] = self._ask(
            lambda model, ids, _: agreement(model, ids, states), blocks[numbers]
        )
        return found

    def _ask(self, question: Callable[..., Any], blocks: NDArray[np.int32], *more: Any) -> Any:
        ids = torch.from_numpy(blocks.astype(np.int64)).to(self.device)
        return question(self.model, ids[:, :-1], ids[:, 1:], *more)
