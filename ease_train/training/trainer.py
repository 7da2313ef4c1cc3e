"""The training loop: one page that yields what happens and renders nothing.

    trainer = Trainer.begin(recipe, source="kjv")
    for event in trainer.fit(Path("runs/demo/checkpoint")):
        print(event)

A step's data, learning rate and random numbers depend on the step's number alone, so a resumed run goes on
bit for bit on CPU (with the same number of threads).
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ease_common.errors import ConfigError, DataError, DivergenceError
from ease_common.own import load_own
from ease_train.data.corpora import load_documents, sum_of
from ease_train.data.tokens import cached_stream, check_rows, num_ids, pack, train_tokenizer
from ease_train.methods.losses import Objective, exit_figures, exit_loss, state_loss
from ease_train.methods.schedules import drop_rates, exit_weights
from ease_train.model.blocks import is_narrow
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import (
    UNKNOWN_DATA,
    Checkpoint,
    filled,
    load_checkpoint,
    save_checkpoint,
    without_tied,
)
from ease_train.training.config import ModelConfig, Recipe
from ease_train.training.lora import add_low_rank, merged
from ease_train.training.optimizer import (
    create_optimizer,
    learning_rate,
    parameters,
    take_masters,
    train_exits_only,
)
from ease_train.training.parallel import Workers, load_optimizer, whole
from ease_train.training.resuming import ResumeOptions
from ease_train.training.states import StateCache, States
from ease_train.training.tensors import Tensors


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
    """Validation perplexity at each exit, by layer, and a greedy continuation of nothing where one was asked
    for.

    A reduced head's perplexity is over the tokens that it knows. `agreement` is the share of tokens on which
    an exit's most likely token is the last exit's.
    """

    step: int
    perplexity: dict[int, float]
    sample: str = ""
    agreement: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StatesEvent:
    """So many blocks of `num_blocks` have their hidden states in `path`, where all take `num_bytes`."""

    done: int
    num_blocks: int
    num_bytes: int
    path: Path


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint is on disk; its model is that of `model_step`, with patience the best evaluated so far."""

    step: int
    path: Path
    model_step: int


Event = StepEvent | EvalEvent | SaveEvent | StatesEvent

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def objective_at(step: int, recipe: Recipe) -> Objective:
    """What a step (from 0) minimises under a recipe's method."""
    method = recipe.method
    return Objective(
        weights=exit_weights(step, recipe),
        distill=method.distill,
        routing_threshold=method.routing.threshold if step >= method.routing.warmup_steps else 0.0,
        gradient=method.exit_gradient,
        drop=drop_rates(step, recipe),
        predictor_weight=method.predictor_weight,
    )


def weights_may_rest(recipe: Recipe) -> bool:
    """Whether some step leaves weights without a gradient: an exit that is not trained, always or at times,
    or a gate.
    """
    method = recipe.method
    model = recipe.model
    moving = (
        method.curriculum.on or method.exit_warmup.on or method.alpha.on or method.objective or method.loss
    )
    return bool(moving or model.gates) or set(exit_weights(0, recipe)) != set(model.exits)


def check_warm_ups(recipe: Recipe) -> None:
    """Raise ConfigError when a warm-up is longer than the run, which would then train something else."""
    train = recipe.train
    method = recipe.method
    lengths = {
        "train: warmup_steps": train.warmup_steps,
        "method.exit_warmup: steps": method.exit_warmup.steps,
        "method.routing: warmup_steps": method.routing.warmup_steps,
    }
    for name, length in lengths.items():
        if length > train.steps:
            raise ConfigError(f"{name} = {length}, expected at most steps = {train.steps}; set both")


def known_data(checkpoint: Checkpoint) -> str:
    """What a checkpoint was trained on. Raises ConfigError for an imported one, which does not say."""
    if checkpoint.data == UNKNOWN_DATA:
        raise ConfigError(
            "this checkpoint was imported, and what it was trained on is unknown; name the text to train "
            "on with --data"
        )
    return checkpoint.data


def layers_rest(recipe: Recipe) -> bool:
    """Whether a run's layers see every block alike in every epoch, so that their hidden states can
    be kept.
    """
    method = recipe.method
    return method.trains != "all" and not (
        method.layer_dropout.on or method.routing.on or method.objective or method.loss
    )


def own_function(name: str, what: str) -> Callable[..., Any]:
    """The function that a recipe names. Raises ConfigError."""
    found = load_own(name, what, ConfigError)
    if not callable(found):
        raise ConfigError(f"{what} '{name}' is {type(found).__name__}, expected a function")
    made: Callable[..., Any] = found
    return made


def token_stream(checkpoint: Checkpoint, split: str, cache: Path | None) -> NDArray[np.int32]:
    """A split of a checkpoint's data as its model reads it, kept in `cache`. Shape: (tokens,).

    Notes the sum and number of its texts in the checkpoint. Raises DataError where another one is noted there
    already, or there is no text.
    """
    documents = load_documents(checkpoint.data, split)
    found = sum_of(documents)
    noted = checkpoint.data_sha256.get(split)
    if noted not in (None, found):
        raise DataError(
            f"{checkpoint.data} ({split}) holds other text than this checkpoint was trained on: its "
            f"sha256 is {found[:16]}…, "
            f"expected {noted[:16]}…; say with --data where that text is now, or train on another: "
            "ease-train tune CHECKPOINT --data TEXT"
        )
    checkpoint.data_sha256[split], checkpoint.num_documents[split] = found, len(documents)
    stream = cached_stream(
        checkpoint.tokenizer,
        documents,
        cache,
        checkpoint.text_format.separator,
        parse_special=checkpoint.recipe.train.parse_special,
    )
    check_rows(
        stream, checkpoint.tokenizer, checkpoint.recipe.model.vocab_size, f"{checkpoint.data} ({split})"
    )
    return stream


def token_counts(checkpoint: Checkpoint, cache: Path | None) -> Tensor:
    """How often each token stands in the training split: a reduced head's tokens are the most frequent.

    Shape: (V) int64.
    """
    counted = np.bincount(
        token_stream(checkpoint, "train", cache), minlength=checkpoint.recipe.model.vocab_size
    )
    return torch.from_numpy(counted)


@dataclass(frozen=True)
class ModelSnapshot:
    """The model of one step, whole, on the CPU."""

    step: int
    model: Decoder

    @classmethod
    def of(cls, step: int, config: ModelConfig, weights: Mapping[str, Tensor]) -> Self:
        """A copy of the weights, but for those in 16 bits, which nothing trains."""
        copies = {
            name: value.cpu() if is_narrow(value) else torch.empty_like(value, device="cpu").copy_(value)
            for name, value in weights.items()
        }
        return cls(step, filled(config, copies, f"step {step}"))


class Trainer:
    """Holds a run: model, optimizer, packed data, the number of the next step, and with patience the best
    model so far.
    """

    def __init__(
        self, checkpoint: Checkpoint, workers: Workers | None = None, cache: Path | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.saved = checkpoint.step > 0  # whether the run has a checkpoint on the disk
        self.recipe = checkpoint.recipe
        self.settings = checkpoint.recipe.train
        self.workers = workers or Workers()
        self.cache = cache
        self.device = self.workers.device
        state = checkpoint.train_state
        method = self.recipe.method
        self.objective_at = (
            own_function(method.objective, "method: objective") if method.objective else objective_at
        )
        self.loss = own_function(method.loss, "method: loss") if method.loss else exit_loss
        self.best: ModelSnapshot | None = None
        if state is None:
            check_warm_ups(self.recipe)
        if state is not None and "weights" in state and ("best" in state or not self.recipe.method.lora.on):
            self.best = ModelSnapshot.of(checkpoint.step, self.recipe.model, checkpoint.model.state_dict())
        if self.recipe.method.lora.on:
            add_low_rank(checkpoint.model, self.recipe.method.lora.rank, self.recipe.method.lora.alpha)
        if state is not None and "weights" in state:
            checkpoint.model.load_state_dict(state["weights"])
            checkpoint.step = state["step"]
        self.model = checkpoint.model.to(self.device)
        if self.recipe.method.trains != "all":
            train_exits_only(self.model, heads=self.recipe.method.trains == "exits")
        take_masters(self.model, all_wide=self.workers.sharded)
        self.training_module = self.workers.distribute(self.model, weights_may_rest(self.recipe))
        self.optimizer = create_optimizer(self.model, self.settings, self.recipe.method.layer_lr_scales)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")
        if state is not None:
            load_optimizer(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        self.model.recompute_activations = self.settings.recompute_activations
        self.sequences_a_step = self.settings.batch_size * self.settings.accumulate * self.workers.count
        length = self.settings.sequence_length
        self.blocks = pack(
            token_stream(checkpoint, "train", cache),
            length,
            self.sequences_a_step,
            f"{checkpoint.data} (train)",
        )
        blocks = pack(
            token_stream(checkpoint, "validation", cache), length, 1, f"{checkpoint.data} (validation)"
        )
        self.validation = blocks[: max(1, self.settings.eval_tokens // length)]
        self.train_states, self.validation_states = self._state_caches()

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        source: str,
        device: str = "cpu",
        cache: Path | None = None,
        sharded: bool = False,
        *,
        base: Recipe | None = None,
    ) -> Self:
        """A new run: trains the tokenizer, builds the model; keeps tokens in `cache`.

        Raises DataError, ConfigError.

        `base` is the recipe before the run's own options, by which a run that goes on knows whether it was
        changed.
        """
        workers = Workers.join(device, sharded)
        tokenizer = train_tokenizer(load_documents(source, "train"), recipe.tokenizer)
        tokenizer = Tokenizer.from_str(workers.share(tokenizer.to_str())) if workers.count > 1 else tokenizer
        size = recipe.model.vocab_size
        needed = num_ids(tokenizer)
        if 0 < size < needed:
            raise ConfigError(
                f"model: vocab_size = {size}, expected 0 (the tokenizer's size) or at least that: {needed}"
            )
        if size == 0:
            recipe = replace(recipe, model=replace(recipe.model, vocab_size=needed))
        torch.manual_seed(recipe.train.seed)
        begun = Checkpoint(recipe, Decoder(recipe.model), tokenizer, 0, source, base=base)
        if begun.model.reduced_head is not None:
            begun.model.reduced_head.choose_tokens(token_counts(begun, cache), begun.model.lm_head.weight)
        return cls(begun, workers, cache)

    @classmethod
    def resume(
        cls,
        path: Path,
        device: str = "cpu",
        cache: Path | None = None,
        sharded: bool = False,
        *,
        asked: ResumeOptions | None = None,
    ) -> Self:
        """Go on with the run saved at `path`, with as many processes as there are now, and with what is
        `asked` of it.

        Raises CheckpointError, ConfigError, DataError.
        """
        workers = Workers.join(device, sharded)
        checkpoint = load_checkpoint(path, resume=True)
        return cls(asked.of(checkpoint, path) if asked else checkpoint, workers, cache)

    def fit(self, out: Path) -> Iterator[Event]:
        """Train to the last step, or until patience ends; yield every step, evaluation and checkpoint.

        Raises DivergenceError.

        Where the layers are frozen and there is a cache, their hidden states are computed before the first
        step.
        """
        yield from self.fill_states()
        while not self.ended:
            yield self.log(self.train_step(self.next_batch()))
            step = self.checkpoint.step
            last = self.checkpoint.step == self.settings.steps
            if step % self.settings.eval_every == 0 or last:
                yield self.log(self.evaluate())
                self.keep_best()
            last = last or self.out_of_patience()
            if step % self.settings.save_every == 0 or last:
                yield self.save(out)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        return self.checkpoint.step >= self.settings.steps or self.out_of_patience()

    def _state_caches(self) -> tuple[StateCache | None, StateCache | None]:
        """Where the hidden states of the training and validation blocks are kept, if they are."""
        if self.cache is None or self.workers.count > 1 or not layers_rest(self.recipe):
            return None, None
        settings = (self.recipe.method.distill.temperature, self.settings.precision)
        train, validation = (
            StateCache(self.cache, self.model, blocks, *settings) for blocks in (self.blocks, self.validation)
        )
        return train, validation

    def fill_states(self) -> Iterator[StatesEvent]:
        """Compute the hidden states that are not kept yet.

        Raises DataError when they do not fit on the disk.
        """
        self.model.eval()
        for cache in (self.train_states, self.validation_states):
            if cache is not None:
                yield from (
                    StatesEvent(done, len(cache.blocks), cache.num_bytes, cache.path)
                    for done in cache.fill(self._ask)
                )

    def next_batch(self) -> NDArray[np.int32]:
        """The blocks of the step to come."""
        return self.blocks[self.next_numbers()]

    def next_numbers(self) -> NDArray[np.int64]:
        """The numbers of those blocks: each epoch in an order of its own, an incomplete step left out."""
        per_epoch = len(self.blocks) // self.sequences_a_step
        epoch, place = divmod(self.checkpoint.step, per_epoch)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.blocks))
        return order[place * self.sequences_a_step :][: self.sequences_a_step]

    def train_step(self, batch: NDArray[np.int32]) -> StepEvent:
        """Forward, backward, clip, step."""
        began = time.perf_counter()
        rate = learning_rate(self.checkpoint.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        loss, by_exit = self._backward(np.split(batch, self.workers.count)[self.workers.rank])
        self.scaler.unscale_(self.optimizer)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters(self.model), self.settings.grad_clip)))
        overflows = (
            not math.isfinite(norm) and self.scaler.get_scale() > 1
        )  # fp16: the step is left out, the scale halved
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflows):
            what = f"the loss is {loss}, its gradient's norm {norm}, at step {self.checkpoint.step + 1}"
            remedy = f"try a lower learning_rate than {self.settings.learning_rate}"
            kept = "the last checkpoint is kept; " if self.saved else ""
            raise DivergenceError(f"{what}; {kept}{remedy}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.checkpoint.step += 1
        speed = len(batch) * self.settings.sequence_length / (time.perf_counter() - began)
        return StepEvent(self.checkpoint.step, loss, by_exit, rate, norm, speed)

    def _backward(self, batch: NDArray[np.int32]) -> tuple[float, dict[int, float]]:
        """Add up the gradients of a step's batches; their mean losses.

        Shape: (accumulate * batch_size, sequence_length + 1).
        """
        objective = self.objective_at(self.checkpoint.step, self.recipe)
        parts = np.split(batch, self.settings.accumulate)
        self.model.train()
        if objective.drop:  # not the same sequences in every process
            place = (self.settings.seed, self.checkpoint.step, self.workers.rank)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        total = 0.0
        by_exit = dict.fromkeys(self.recipe.model.exits, 0.0)
        numbers = self.next_numbers()
        for number, part in enumerate(parts, 1):
            with self.workers.hold_gradients(self.training_module, number < len(parts)):
                loss, losses = self._loss(part, np.split(numbers, len(parts))[number - 1], objective)
                self.scaler.scale(loss / len(parts)).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / len(parts)
            by_exit |= {layer: by_exit[layer] + value / len(parts) for layer, value in losses.items()}
        means = self.workers.mean([total, *(by_exit[layer] for layer in losses)])
        return means[0], dict(zip(losses, means[1:], strict=True))

    def _loss(
        self, part: NDArray[np.int32], numbers: NDArray[np.int64], objective: Objective
    ) -> tuple[Tensor, dict[int, float]]:
        """A batch's loss, from its hidden states where they are kept."""
        states = self._kept(self.train_states, numbers)
        loss, by_exit = (
            self._ask(self.loss, part, objective)
            if states is None
            else self._ask(state_loss, part, objective, states)
        )
        return loss, by_exit

    def _kept(self, cache: StateCache | None, numbers: NDArray[np.int64]) -> States | None:
        return cache.of(numbers, self.device) if cache is not None and cache.full else None

    def _ask(self, question: Callable[..., Any], batch: NDArray[np.int32], *more: Any) -> Any:
        """question(model, input_ids, targets, ...), in the run's precision.

        Shape: batch (n, sequence_length + 1).
        """
        ids = torch.from_numpy(batch.astype(np.int64)).to(self.device)
        with torch.autocast(
            self.device.type,
            AUTOCAST.get(self.settings.precision),
            enabled=self.settings.precision in AUTOCAST,
        ):
            return self.training_module(lambda model: question(model, ids[:, :-1], ids[:, 1:], *more))

    @torch.no_grad()
    def evaluate(self) -> EvalEvent:
        """Validation perplexity of every exit, and its agreement with the last one, means over tokens."""
        layers = self.recipe.model.exits
        totals = np.zeros((2, len(layers)))
        self.model.eval()
        for start in range(0, len(self.validation), self.settings.batch_size):
            numbers = np.arange(start, min(start + self.settings.batch_size, len(self.validation)))
            figures = self._ask(
                exit_figures, self.validation[numbers], self._kept(self.validation_states, numbers)
            )
            totals += [
                [figures[layer].loss * len(numbers) for layer in layers],
                [figures[layer].agreement * len(numbers) for layer in layers],
            ]
        means = self.workers.mean(
            (totals / len(self.validation)).flatten().tolist()
        )  # the same in every process
        perplexity = {layer: math.exp(loss) for layer, loss in zip(layers, means, strict=False)}
        agreement = dict(zip(layers[:-1], means[len(layers) :], strict=False))
        return EvalEvent(
            self.checkpoint.step, perplexity, self.sample(self.settings.sample_tokens), agreement
        )

    @torch.no_grad()
    def sample(self, num_tokens: int) -> str:
        """A greedy continuation of the token that begins a document, at full depth; each token runs the whole
        text so far.
        """
        ids = torch.tensor([[self.checkpoint.text_format.separator]], device=self.device)
        self.model.eval()
        for _ in range(min(num_tokens, self.recipe.model.max_positions - 1)):
            ids = torch.cat(
                (ids, self.training_module(lambda model, so_far=ids: model(so_far))[:, -1:].argmax(dim=-1)),
                dim=1,
            )
        return str(self.checkpoint.tokenizer.decode(ids[0, 1:].tolist()))

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were all no better than the best before them, at the last
        exit.
        """
        values = self._last_exit_perplexities()
        patience = self.settings.patience
        return 0 < patience < len(values) and min(values[-patience:]) >= min(values[:-patience])

    def keep_best(self) -> None:
        """With patience, keep the model if its evaluation, the last one, was better than all before."""
        values = self._last_exit_perplexities()
        if self.settings.patience and values[-1] < min(values[:-1], default=math.inf):
            weights = self._whole_weights()
            self.best = self._plain(weights) if self.workers.first else None

    def _last_exit_perplexities(self) -> list[float]:
        last = str(self.recipe.model.num_layers)
        return [line["perplexity"][last] for line in self.checkpoint.metrics if "perplexity" in line]

    def save(self, out: Path) -> SaveEvent:
        """Write the checkpoint with all that a resumed run needs: with patience the best model, and the run's
        own weights aside.
        """
        step = self.checkpoint.step
        state: dict[str, Any] = {
            "optimizer": self.workers.gathered(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
        }
        weights = self._whole_weights()
        if self.workers.first:
            saved = self.best or ModelSnapshot(step, self.model)
            state |= {"weights": weights, "step": step} if self.best or self.recipe.method.lora.on else {}
            state |= {"best": saved.step} if self.best else {}
            save_checkpoint(
                replace(self.checkpoint, step=saved.step, model=saved.model, train_state=state),
                out,
                None if self.best else self._merged(weights),
            )
        self.workers.wait()
        self.saved = True
        return SaveEvent(step, out, saved.step if self.workers.first else step)

    def _plain(self, weights: Mapping[str, Tensor]) -> ModelSnapshot:
        """A copy of the model as it is now, without low-rank updates beside its matrices."""
        plain = self._merged(weights)
        whole = {name: plain.made(name) for name in plain.described}
        return ModelSnapshot.of(self.checkpoint.step, self.recipe.model, whole)

    def _merged(self, weights: Mapping[str, Tensor]) -> Tensors:
        """The model's weights, with low-rank updates added to their matrices where there are some."""
        once = without_tied(weights, self.recipe.model)
        return merged(once, self.recipe.method.lora.alpha)

    def _whole_weights(self) -> dict[str, Tensor]:
        """The model's state dictionary, whole where the weights are in shards (every process must ask)."""
        state = (
            self.workers.gathered(self.training_module.state_dict())
            if self.workers.sharded
            else self.model.state_dict()
        )
        return {name.removeprefix("model."): value for name, value in state.items()}

    def log(self, event: StepEvent | EvalEvent) -> StepEvent | EvalEvent:
        """Keep an event for metrics.jsonl: every evaluation, and one step in `log_every`."""
        if isinstance(event, EvalEvent) or event.step % self.settings.log_every == 0:
            self.checkpoint.metrics.append(json.loads(json.dumps(asdict(event))))  # as it will be read back
        return event
