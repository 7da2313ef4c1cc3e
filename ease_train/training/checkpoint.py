"""The checkpoint directory: all that is needed to rebuild the model, and to go on training it.

    config.json         format_version, the recipe with every field, the recipe that the run began with, the
                        step, the data, the sha256 and number of its texts, the text_format, versions
    model.safetensors   the weights: what was trained here in fp32, the matrices of an imported model as they
                        came
    grids.safetensors   the same matrices in whole numbers, of a model that came from a file of 4 or 8 bits
    tokenizer.json
    chat_template.jinja for models that have one
    metrics.jsonl       one line a log step or evaluation
    metrics.csv         the same numbers as a table
    train_state/        optimizer, and the run's own weights where the model is the best so far; only for
                        resuming

Written aside, tensor by tensor, and renamed; read by mapping it: a model's matrices take memory that the
system can have back, in the type that they are kept in. Nothing is ever unpickled.
"""

import json
import pickle
import platform
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ease_common.errors import CheckpointError, without_panics
from ease_common.files import restore_interrupted, written_aside
from ease_common.tokenizers import whole_texts
from ease_train.convert.grid import Grid, load_grids, save_grids
from ease_train.convert.text_format import TextFormat
from ease_train.model.blocks import is_narrow
from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig, Recipe
from ease_train.training.logs import metrics_csv
from ease_train.training.renames import renamed
from ease_train.training.tensors import Tensors, mapped_tensors, write_tensors

FORMAT_VERSION = 2  # 1: renames.py
EMBEDDING, LM_HEAD = "embed.weight", "lm_head.weight"
UNKNOWN_DATA = "unknown"  # what another project's model was trained on
TEMPLATE_FILE = "chat_template.jinja"
GRIDS_FILE = "grids.safetensors"
STATE_FILE = Path("train_state") / "state.pt"
LOOKED_AT = 1 << 22  # numbers of a weight at once
Shape = tuple[int, ...]


@dataclass
class Checkpoint:
    """What a checkpoint directory holds.

    `train_state` is None when the checkpoint was loaded only to be used.

    `text_format` are by default those of a tokenizer trained here. `data_sha256` are the sums of the splits
    trained on (`sum_of`), by name, and `num_documents` their counts; none where they are unknown. `base` is
    the recipe as it was before the run's own options. `grids` are, by the names of the weights, the matrices
    of the file that the model was imported from; one that has been trained since is no longer the model's.
    """

    recipe: Recipe
    model: Decoder
    tokenizer: Tokenizer
    step: int
    data: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    train_state: dict[str, Any] | None = None
    text_format: TextFormat = None  # type: ignore[assignment]
    data_sha256: dict[str, str] = field(default_factory=dict)
    base: Recipe | None = None
    num_documents: dict[str, int] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text_format is None:
            self.text_format = TextFormat.of(self.tokenizer)


def save_checkpoint(checkpoint: Checkpoint, path: Path, weights: Tensors | None = None) -> None:
    """Write the directory, replacing an older one at `path` only when the new one is complete.

    `weights`, without the second of two that are tied, go before those of the model.
    Raises CheckpointError when the disk does not take it; what was at `path` is then still there.
    """
    try:
        with written_aside(path) as folder:
            config = {
                "format_version": FORMAT_VERSION,
                "step": checkpoint.step,
                "data": checkpoint.data,
                "data_sha256": checkpoint.data_sha256,
                "num_documents": checkpoint.num_documents,
                "conventions": checkpoint.text_format.to_dict(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "recipe": checkpoint.recipe.to_dict(),
            }
            if checkpoint.base is not None:
                config["base"] = checkpoint.base.to_dict()
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            tied = {LM_HEAD: EMBEDDING} if checkpoint.recipe.model.tie_embeddings else {}
            write_tensors(folder / "model.safetensors", weights or Tensors.of(untied(checkpoint.model)), tied)
            if checkpoint.grids:
                save_grids(checkpoint.grids, folder / GRIDS_FILE)
            checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
            if checkpoint.text_format.chat_template is not None:
                (folder / TEMPLATE_FILE).write_text(checkpoint.text_format.chat_template, encoding="utf-8")
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in checkpoint.metrics), encoding="utf-8"
            )
            (folder / "metrics.csv").write_text(metrics_csv(checkpoint.metrics), encoding="utf-8")
            if checkpoint.train_state is not None:
                (folder / STATE_FILE.parent).mkdir()
                torch.save(checkpoint.train_state, folder / STATE_FILE)
    except (
        OSError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:  # torch and safetensors wrap a full disk in their own
        kept = f"; the checkpoint of before is still at {path}" if path.exists() else ""
        raise CheckpointError(f"could not save step {checkpoint.step} to {path}: {error}{kept}") from None


def untied(model: Decoder) -> dict[str, Tensor]:
    """A model's weights by name, each once."""
    weights = model.state_dict()
    if model.config.tie_embeddings:
        del weights[LM_HEAD]
    return weights


def load_checkpoint(path: Path, *, resume: bool = False) -> Checkpoint:
    """Read a checkpoint, with the training state when `resume` is set. The model's matrices are mapped, in
    the type that they are kept in.

    Raises CheckpointError when it is missing, incomplete or newer than this version.
    """
    restore_interrupted(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; make one: ease-train fit demo --out {path}")
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        *([str(STATE_FILE)] if resume else []),
    ):
        if not (path / name).is_file():
            remedy = f"train it again: ease-train fit RECIPE --out {path}"
            raise CheckpointError(f"{path} is no complete checkpoint: {name} is missing; {remedy}")
    config = _read_config(path)
    try:
        recipe = Recipe.from_dict(config["recipe"], str(path / "config.json"))
        base = Recipe.from_dict(config["base"], str(path / "config.json")) if "base" in config else None
        model = load_weights(recipe.model, path / "model.safetensors")
        tokenizer = _load_tokenizer(path / "tokenizer.json")
        state = _load_state(path / STATE_FILE) if resume else None
        text_format = _read_text_format(config, path) or TextFormat.of(tokenizer)
        metrics = read_metrics(path)
        grids = load_grids(path / GRIDS_FILE) if (path / GRIDS_FILE).is_file() else {}
    except (
        KeyError,
        OSError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}"
        ) from None
    return Checkpoint(
        recipe,
        model,
        tokenizer,
        config["step"],
        config["data"],
        metrics,
        state,
        text_format,
        data_sha256=config.get("data_sha256", {}),
        num_documents=config.get("num_documents", {}),
        base=base,
        grids=grids,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What the run at `path` logged: a line a log step or evaluation.

    Raises OSError or ValueError for a missing or damaged file.
    """
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        version = config["format_version"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path / 'config.json'} is damaged; restore it, or train again") from None
    if version > FORMAT_VERSION:
        reads = f"this version of EASE reads up to {FORMAT_VERSION}; update: pip install --upgrade ease-lm"
        raise CheckpointError(f"{path} has format_version {version}, {reads}")
    return dict(config)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        with without_panics():
            return whole_texts(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{path.name}: {error}") from None


def _load_state(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path.name} is damaged")
    state = dict(torch.load(path, map_location="cpu", weights_only=True))
    return {**state, "weights": renamed(state["weights"])} if "weights" in state else state


def _read_text_format(config: dict[str, Any], path: Path) -> TextFormat | None:
    template = path / TEMPLATE_FILE
    source = template.read_text(encoding="utf-8") if template.is_file() else None
    return TextFormat.from_dict(config["conventions"], source) if "conventions" in config else None


def not_finite(weight: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """What to say of a weight that holds NaN or infinity, or would in another type: the first, and how many
    there are.

    None for a sound one.
    """
    if not (weight.is_floating_point() and weight.numel()):
        return None
    first, value, count = 0, 0.0, 0
    for number, part in enumerate(torch.split(weight.detach().flatten(), LOOKED_AT)):
        found = part.to(dtype or part.dtype)
        if torch.stack(found.aminmax()).isfinite().all():  # of the two, which NaN are where there is one
            continue
        places = (~found.isfinite()).nonzero().flatten()
        if not count:
            first, value = number * LOOKED_AT + int(places[0]), found[places[0]].item()
        count += len(places)
    if not count:
        return None
    place = [int(index) for index in np.unravel_index(first, tuple(weight.shape))]
    return f"holds {value} at {place} ({count} of {weight.numel()} numbers are not finite)"


def load_weights(config: ModelConfig, path: Path) -> Decoder:
    """A decoder over the weights of a file, which are mapped.

    Raises CheckpointError when they do not fit.
    """
    return filled(config, renamed(mapped_tensors(path)), path.name)


def filled(config: ModelConfig, weights: dict[str, Tensor], where: str) -> Decoder:
    """A decoder over these tensors, without the time and memory of weights of its own; all but matrices are
    widened to fp32.

    Raises CheckpointError when they do not fit.
    """
    with torch.device("meta"):
        model = Decoder(config)
    tied = {LM_HEAD, EMBEDDING} if config.tie_embeddings else set()
    if tied & weights.keys():
        weights |= dict.fromkeys(tied, weights[min(tied & weights.keys())])
    expected, given = (
        {name: value.shape for name, value in found.items()} for found in (model.state_dict(), weights)
    )
    check_fit(expected, given, where)
    wide = {name: value.float() for name, value in weights.items() if is_narrow(value) and value.ndim < 2}
    model.load_state_dict({**weights, **wide}, assign=True)
    if tied:
        model.lm_head.weight = model.embed.weight
    model.set_rotary_tables()
    return model


def check_fit(expected: Mapping[str, Shape], given: Mapping[str, Shape], where: str) -> None:
    """Raise CheckpointError unless weights have the names and shapes of a model's."""
    if strange := expected.keys() ^ given.keys():
        missing = sorted(strange & expected.keys())
        unexpected = sorted(strange & given.keys())
        raise CheckpointError(
            f"{where}: weights do not fit the model: missing {missing}, unexpected {unexpected}"
        )
    for name, shape in given.items():
        if shape != expected[name]:
            raise CheckpointError(f"{where}: {name} has the shape {[*shape]}, expected {[*expected[name]]}")


def with_exits(checkpoint: Checkpoint, layers: Iterable[int]) -> Checkpoint:
    """A checkpoint with these of its exits alone, the last layer's with them; it holds the same weights, but
    for those that were the others' own.

    Raises CheckpointError for layers that have no exit.
    """
    old = checkpoint.model.config
    if strange := sorted({*layers} - {*old.exits}):
        raise CheckpointError(
            f"there is no exit after layer {strange[0]}, expected some of: {', '.join(map(str, old.exits))}; "
            "ease-train tune makes new ones"
        )
    kept = {*layers, old.num_layers}
    if kept == {*old.exits}:
        return checkpoint
    config = replace(
        old, exits=tuple(sorted(kept)), gates=tuple(layer for layer in old.gates if layer in kept)
    )
    left_out = tuple(f"exits.{layer}." for layer in old.exits if layer not in kept)
    weights = {
        name: value for name, value in checkpoint.model.state_dict().items() if not name.startswith(left_out)
    }
    model = filled(config, weights, "the checkpoint")
    return replace(checkpoint, model=model)
