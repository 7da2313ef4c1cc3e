"""The training loop: one page that yields what happens and renders nothing.

    trainer = Trainer.begin(recipe, source="kjv")
    for event in trainer.fit(Path("runs/demo/checkpoint")):
        print(event)

A step's data and learning rate depend on the step's number alone, so a resumed run goes on bit for bit on CPU
(with the same number of threads).
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ease_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ease_train.config import Recipe, TrainConfig
from ease_train.corpora import load_documents
from ease_train.errors import ConfigError, DivergenceError
from ease_train.losses import Objective, exit_loss, exit_losses
from ease_train.model import Decoder
from ease_train.parallel import Workers
from ease_train.schedules import drop_rates, exit_weights
from ease_train.tokens import END, cached_stream, pack, train_tokenizer


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step: losses in nats a token, by exit layer."""

    step: int
    loss: float
    exit_losses: dict[int, float]
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class EvalEvent:
    """Validation perplexity at each exit, by layer, and a greedy continuation of nothing where one was asked for."""

    step: int
    perplexity: dict[int, float]
    sample: str = ""


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint is on disk."""

    step: int
    path: Path


Event = StepEvent | EvalEvent | SaveEvent


def learning_rate(step: int, settings: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    low = settings.min_lr_ratio
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def create_optimizer(model: Decoder, settings: TrainConfig, layer_lr_scales: Mapping[int, float] | None = None) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with weight decay on matrices only.

    `layer_lr_scales` (layer from 1 -> share) is discriminative fine-tuning (Howard & Ruder 2018, arXiv 1801.06146): a group a
    share; embedding, norms outside the layers, exits and head have the full rate.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault(((layer_lr_scales or {}).get(layer, 1.0), decay), []).append(parameter)
    options = [
        {"params": parameters, "weight_decay": decay, "lr": settings.learning_rate * scale, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)


def train_exits_only(model: Decoder) -> None:
    """Freeze all but the early exits' norms, adapters and heads. Raises ConfigError when they have none of their own."""
    model.requires_grad_(False)
    own = (model.exit_norms, model.adapters, model.exit_heads)
    for modules in own:
        modules.requires_grad_(True)
    if not any(len(modules) for modules in own):
        raise ConfigError("method: trains = 'exits', but the exits have no norm, adapter or head of their own; set exit_adapter = 'mlp'")


def objective_at(step: int, recipe: Recipe) -> Objective:
    """What a step (from 0) minimises under a recipe's method."""
    method = recipe.method
    return Objective(
        exit_weights(step, recipe),
        method.distill_weight,
        method.distill_temperature,
        method.distill_hidden_weight,
        method.routing_threshold if step >= method.routing_warmup_steps else 0.0,
        method.exit_gradient,
        drop_rates(step, recipe),
        method.predictor_weight,
    )


class Trainer:
    """Holds a run: model, optimizer, packed data, and the number of the next step."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", workers: Workers | None = None, cache: Path | None = None) -> None:
        self.checkpoint, self.recipe, self.settings = checkpoint, checkpoint.recipe, checkpoint.recipe.train
        self.device, self.workers, self.cache = torch.device(device), workers or Workers(), cache
        self.model = checkpoint.model.to(self.device)
        if self.recipe.method.trains == "exits":
            train_exits_only(self.model)
        self.optimizer = create_optimizer(self.model, self.settings, self.recipe.method.layer_lr_scales)
        if checkpoint.train_state is not None:
            self.optimizer.load_state_dict(checkpoint.train_state["optimizer"])
            torch.set_rng_state(checkpoint.train_state["rng"])
        if not self.workers.first:  # layer dropout must not drop the same sequences in every process
            torch.manual_seed(hash((self.settings.seed, self.workers.rank, checkpoint.step)))
        self.model.recompute_activations = self.settings.recompute_activations
        self.sequences_a_step = self.settings.batch_size * self.settings.accumulate * self.workers.count
        length = self.settings.sequence_length
        self.blocks = pack(self._stream("train"), length, self.sequences_a_step, f"{checkpoint.data} (train)")
        blocks = pack(self._stream("validation"), length, 1, f"{checkpoint.data} (validation)")
        self.validation = blocks[: max(1, self.settings.eval_tokens // length)]

    @classmethod
    def begin(cls, recipe: Recipe, source: str, device: str = "cpu", cache: Path | None = None) -> Self:
        """A new run: trains the tokenizer, builds the model; keeps tokens in `cache`. Raises DataError, ConfigError."""
        workers, device = Workers.join(device)
        tokenizer = train_tokenizer(load_documents(source, "train"), recipe.tokenizer)
        tokenizer = Tokenizer.from_str(workers.share(tokenizer.to_str())) if workers.count > 1 else tokenizer
        if recipe.model.vocab_size == 0:
            recipe = replace(recipe, model=replace(recipe.model, vocab_size=tokenizer.get_vocab_size()))
        torch.manual_seed(recipe.train.seed)
        return cls(Checkpoint(recipe, Decoder(recipe.model), tokenizer, 0, source), device, workers, cache)

    @classmethod
    def resume(cls, path: Path, device: str = "cpu", cache: Path | None = None) -> Self:
        """Go on with the run saved at `path`. Raises CheckpointError."""
        workers, device = Workers.join(device)
        return cls(load_checkpoint(path, resume=True), device, workers, cache)

    def fit(self, out: Path) -> Iterator[Event]:
        """Train to the last step, or until patience ends; yield every step, evaluation and checkpoint. Raises DivergenceError."""
        while self.checkpoint.step < self.settings.steps and not self.out_of_patience():
            yield self.log(self.train_step(self.next_batch()))
            step, last = self.checkpoint.step, self.checkpoint.step == self.settings.steps
            if step % self.settings.eval_every == 0 or last:
                yield self.log(self.evaluate())
            last = last or self.out_of_patience()
            if step % self.settings.save_every == 0 or last:
                yield self.save(out)

    def next_batch(self) -> NDArray[np.int32]:
        """The blocks of the step to come: each epoch in an order of its own, an incomplete step left out."""
        per_epoch = len(self.blocks) // self.sequences_a_step
        epoch, place = divmod(self.checkpoint.step, per_epoch)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.blocks))
        return self.blocks[order[place * self.sequences_a_step :][: self.sequences_a_step]]

    def train_step(self, batch: NDArray[np.int32]) -> StepEvent:
        """Forward, backward, clip, step."""
        began = time.perf_counter()
        rate = learning_rate(self.checkpoint.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        loss, by_exit = self._backward(np.split(batch, self.workers.count)[self.workers.rank])
        self.workers.mean_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            what = f"the loss is {loss}, its gradient's norm {norm.item()}, at step {self.checkpoint.step + 1}"
            remedy = f"try a lower learning_rate than {self.settings.learning_rate}"
            raise DivergenceError(f"{what}; the last checkpoint is kept; {remedy}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.checkpoint.step += 1
        speed = len(batch) * self.settings.sequence_length / (time.perf_counter() - began)
        return StepEvent(self.checkpoint.step, loss, by_exit, rate, norm.item(), speed)

    def _backward(self, batch: NDArray[np.int32]) -> tuple[float, dict[int, float]]:
        """Add up the gradients of a step's batches; their mean losses. Shape: (accumulate * batch_size, sequence_length + 1)."""
        objective, share = objective_at(self.checkpoint.step, self.recipe), 1 / self.settings.accumulate
        self.model.train()
        total, by_exit = 0.0, dict.fromkeys(self.recipe.model.exits, 0.0)
        for part in np.split(batch, self.settings.accumulate):
            with self._autocast():
                loss, losses = exit_loss(self.model, *self._tensors(part), objective)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.item() * share
            by_exit |= {layer: by_exit[layer] + value * share for layer, value in losses.items()}
        means = self.workers.mean([total, *(by_exit[layer] for layer in losses)], self.device)
        return means[0], dict(zip(losses, means[1:], strict=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def evaluate(self) -> EvalEvent:
        """Validation perplexity of every exit, a mean over tokens."""
        totals: dict[int, float] = {}
        self.model.eval()
        for start in range(0, len(self.validation), self.settings.batch_size):
            batch = self.validation[start : start + self.settings.batch_size]
            with self._autocast():
                losses = exit_losses(self.model, *self._tensors(batch))
            for layer, loss in losses.items():
                totals[layer] = totals.get(layer, 0.0) + loss * len(batch)
        perplexity = {layer: math.exp(total / len(self.validation)) for layer, total in totals.items()}
        return EvalEvent(self.checkpoint.step, perplexity, self.sample(self.settings.sample_tokens))

    @torch.no_grad()
    def sample(self, num_tokens: int) -> str:
        """A greedy continuation of the token that begins a document, at full depth; each token runs the whole text so far."""
        ids = torch.tensor([[self.checkpoint.tokenizer.token_to_id(END)]], device=self.device)
        self.model.eval()
        for _ in range(min(num_tokens, self.recipe.model.max_positions - 1)):
            ids = torch.cat((ids, self.model(ids)[:, -1:].argmax(dim=-1)), dim=1)
        return str(self.checkpoint.tokenizer.decode(ids[0, 1:].tolist()))

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were all worse than the best before them, at the last exit."""
        evaluations = [line["perplexity"] for line in self.checkpoint.metrics if "perplexity" in line]
        values = [found[str(self.recipe.model.num_layers)] for found in evaluations]
        patience = self.settings.patience
        return 0 < patience < len(values) and min(values[-patience:]) >= min(values[:-patience])

    def save(self, out: Path) -> SaveEvent:
        """Write the checkpoint with all that a resumed run needs."""
        self.checkpoint.train_state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if self.workers.first:
            save_checkpoint(self.checkpoint, out)
        self.workers.wait()
        return SaveEvent(self.checkpoint.step, out)

    def log(self, event: Event) -> Event:
        """Keep an event for metrics.jsonl: every evaluation, and one step in `log_every`."""
        if isinstance(event, EvalEvent) or event.step % self.settings.log_every == 0:
            self.checkpoint.metrics.append(json.loads(json.dumps(asdict(event))))  # as it will be read back
        return event

    def _stream(self, split: str) -> NDArray[np.int32]:
        return cached_stream(self.checkpoint.tokenizer, load_documents(self.checkpoint.data, split), self.cache)

    def _tensors(self, batch: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(batch.astype(np.int64)).to(self.device)
        return ids[:, :-1], ids[:, 1:]
