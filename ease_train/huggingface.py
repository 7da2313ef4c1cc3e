"""Hugging Face model directories: read into a checkpoint, and written back from one.

    checkpoint = import_model("HuggingFaceTB/SmolLM2-135M-Instruct", exits=(10, 20))      # a directory, a hub id or a .gguf file
    export_model(checkpoint, Path("smollm2-hf"))     # transformers loads it; what belongs to the exits lies in files beside
    export_exits(checkpoint, Path("smollm2-exits"))     # these files alone, small enough to share

Reading safetensors needs no transformers; a tokenizer that is not in the form of tokenizer.json does, and .gguf files.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ease_train.checkpoint import UNKNOWN_DATA, Checkpoint, filled
from ease_train.config import OF_THE_EXITS, ModelConfig, Recipe, TokenizerConfig, TrainConfig
from ease_train.conventions import Conventions
from ease_train.errors import CheckpointError, ForeignError
from ease_train.files import written_aside
from ease_train.foreign import ROTARY_BUFFER, Foreign, foreign_config, foreign_name, model_config
from ease_train.model import Decoder
from ease_train.renames import renamed

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXITS, EXIT_WEIGHTS = "ease.json", "ease_exits.safetensors"  # what transformers has no place for
REDUCED_HEAD = "reduced_head.known.weight"
NEEDED_OF_HUB = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
GENERATION = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "bos_token_id", "eos_token_id", "pad_token_id")
WITH_TRANSFORMERS = "needs transformers: pip install 'ease-lm[hf]'"


def import_model(source: str, exits: tuple[int, ...] = (), max_positions: int | None = None, with_exits: Path | None = None) -> Checkpoint:
    """A foreign model as a checkpoint with untrained exits, whose norms start as the final norm. Raises ForeignError, ConfigError.

    Without `exits` it has those in the folder `with_exits`, or those that `export_model` wrote beside it, if any.
    """
    if source.endswith(".gguf"):
        from ease_train.gguf import read_gguf

        foreign, folder = read_gguf(Path(source)), None
    else:
        folder = Path(source) if Path(source).is_dir() else download(source)
        foreign = read_directory(folder)
    if with_exits is None and not exits and folder is not None and (folder / EXITS).is_file():
        with_exits = folder
    if with_exits is not None:
        return adopt_with_exits(foreign, with_exits, max_positions, source)
    return adopt(foreign, exits, max_positions, source)


def download(name: str) -> Path:
    """A model's files from the hub, or from its cache. Raises ForeignError."""
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ForeignError(f"no model at {name}: expected a Hugging Face directory, a hub id like OWNER/NAME, or a .gguf file")
    try:
        return Path(snapshot_download(name, allow_patterns=list(NEEDED_OF_HUB)))
    except Exception as error:  # the hub's client lets through whatever its transport raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "is it spelt right, is it gated (hf auth login), is the hub in reach? A directory on this machine needs no hub"
        raise ForeignError(f"{name} did not come from the Hugging Face hub: {reason} ({remedy})") from None


def read_directory(folder: Path) -> Foreign:
    """A Hugging Face model directory; its weights are read one by one as they are asked for. Raises ForeignError."""
    config = read_json(folder / "config.json")
    if config is None:
        raise ForeignError(f"{folder} is no Hugging Face model: config.json is missing")
    if "recipe" in config:
        raise ForeignError(f"{folder} is a checkpoint of this project already; nothing to import")
    tokenizer = read_tokenizer(folder)
    return Foreign(config, Shards(folder), tokenizer, read_conventions(folder, config, tokenizer))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None when there is no such file. Raises ForeignError."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ForeignError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ForeignError(f"{path} holds no JSON object")
    return values


class Shards(Mapping[str, Tensor]):
    """The tensors of a directory's safetensors files as fp32, read when they are asked for. Raises ForeignError."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX)
        files = sorted(set(index.get("weight_map", {}).values())) if index else [WEIGHTS]
        if missing := [name for name in files if not (folder / name).is_file()]:
            hint = f" ({len(missing)} of {len(files)} shards)" if index else "; weights in another form (.bin, .pt) are not read"
            raise ForeignError(f"{folder} lacks {', '.join(missing)}{hint}")
        self.path_of: dict[str, Path] = {}
        for name in files:
            with _opened(folder / name) as file:
                self.path_of |= dict.fromkeys(file.keys(), folder / name)

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.path_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ForeignError(f"{self.path_of[name].name}: {name} is stored as {tensor.dtype}; quantised weights cannot be imported")
        return tensor.to(torch.float32, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.path_of)

    def __len__(self) -> int:
        return len(self.path_of)


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ForeignError(f"{path} is no safetensors file: {error}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises ForeignError."""
    if not (folder / "tokenizer.json").is_file():
        return _converted_tokenizer(folder)
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more special
        raise ForeignError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None


def _converted_tokenizer(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ForeignError(f"{folder} has no tokenizer.json, and converting another form {WITH_TRANSFORMERS}") from None
    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # whatever its many tokenizers raise
        raise ForeignError(f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from None


def read_conventions(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> Conventions:
    """How the model's texts begin and end, and its template: from the files beside its weights. Raises ForeignError."""
    named, generation = read_json(folder / "tokenizer_config.json") or {}, read_json(folder / "generation_config.json") or {}
    named = {**(read_json(folder / "special_tokens_map.json") or {}), **named}
    begin, end = (_token_id(named.get(name), tokenizer) for name in ("bos_token", "eos_token"))
    stops = [end, *_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    stop_ids = tuple(dict.fromkeys(token for token in stops if token is not None))
    kept = {name: generation[name] for name in GENERATION if generation.get(name) is not None}
    if begin is not None:
        kept["bos_token_id"] = begin
    return Conventions(_start_id(named, begin, tokenizer), stop_ids, _template(folder, named), kept)


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def _token_id(token: Any, tokenizer: Tokenizer) -> int | None:
    """The id of a special token, which is named by its text or by an object that holds the text."""
    text = token.get("content") if isinstance(token, dict) else token
    found: int | None = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return found


def _start_id(named: Mapping[str, Any], begin: int | None, tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text: as its configuration says, else as it does."""
    if (says := named.get("add_bos_token")) is not None:
        return begin if says else None
    ids = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    return ids[0] if len(ids) > len(plain) and ids[0] != plain[0] else None


def _template(folder: Path, named: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in the tokenizer's configuration, alone or as the one named 'default'."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = named.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def adopt(foreign: Foreign, exits: tuple[int, ...], max_positions: int | None, source: str) -> Checkpoint:
    """A foreign model as a checkpoint. Raises ForeignError, ConfigError."""
    config = model_config(foreign.config, exits, max_positions, tied="lm_head.weight" not in foreign.weights)
    return _checkpoint(foreign, config, {}, source)


def _checkpoint(foreign: Foreign, config: ModelConfig, exit_weights: Mapping[str, Tensor], source: str) -> Checkpoint:
    recipe = Recipe(
        name="imported",
        description=f"the weights of {source}",
        paper="",
        model=config,
        tokenizer=TokenizerConfig(),
        train=TrainConfig(layer_weights={config.num_layers: 1.0}, sequence_length=min(256, config.max_positions)),
    )
    model = converted(foreign.weights, config, exit_weights)
    return Checkpoint(recipe, model, foreign.tokenizer, 0, UNKNOWN_DATA, conventions=foreign.conventions)


def converted(foreign: Mapping[str, Tensor], config: ModelConfig, exit_weights: Mapping[str, Tensor]) -> Decoder:
    """A decoder with the foreign weights. Raises ForeignError when some lack, do not fit, or belong to nothing here."""
    with torch.device("meta"):
        names = list(Decoder(config).state_dict())
    theirs = {name: known for name in names if (known := foreign_name(name)) is not None}
    if config.tie_embeddings:
        del theirs["lm_head.weight"]
    if missing := sorted({*theirs.values()} - foreign.keys()):
        raise ForeignError(f"the model's files lack {len(missing)} weights, the first is {missing[0]}")
    strange = [name for name in foreign if name not in theirs.values() and not name.endswith(ROTARY_BUFFER) and name != "lm_head.weight"]
    if strange:
        raise ForeignError(f"the model's files hold {len(strange)} weights that this decoder has no place for, the first is {strange[0]}")
    weights = {name: foreign[known] for name, known in theirs.items()} | dict(exit_weights)
    if REDUCED_HEAD in names and REDUCED_HEAD not in weights:
        lm_head = weights["embed.weight" if config.tie_embeddings else "lm_head.weight"]
        weights[REDUCED_HEAD] = lm_head[weights["reduced_head.ids"]]
    for name in (f"exits.{layer}.norm.weight" for layer in config.exits):
        if name in names and name not in weights:
            weights[name] = weights["norm.weight"].clone()
    try:
        return filled(config, weights, "the model's files")
    except CheckpointError as error:
        raise ForeignError(str(error)) from None


def adopt_with_exits(foreign: Foreign, folder: Path, max_positions: int | None, source: str) -> Checkpoint:
    """A foreign model with the exits that `export_model` or `export_exits` wrote. Raises ForeignError, ConfigError."""
    values = (read_json(folder / EXITS) or {}).get("model")
    if values is None:
        raise ForeignError(f"{folder} holds no exits: expected {EXITS} and {EXIT_WEIGHTS}, as `ease-train export-exits` writes them")
    theirs = ModelConfig.from_dict(values, EXITS)
    config = model_config(foreign.config, theirs.exits, max_positions, tied="lm_head.weight" not in foreign.weights)
    config = replace(config, **{name: getattr(theirs, name) for name in (*OF_THE_EXITS, "gates", "gate_width")})
    for name, value in asdict(replace(theirs, max_positions=config.max_positions)).items():
        if value != getattr(config, name):
            raise ForeignError(f"the exits in {folder} belong to another model: {name} = {value}, but {getattr(config, name)} in {source}")
    with _opened(folder / EXIT_WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    exit_weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in renamed(tensors).items()}
    return _checkpoint(foreign, config, exit_weights, source)


def exit_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What transformers has no place for. A reduced head whose rows are the LM head's is not among it: they are read there."""
    model = checkpoint.model
    own, reduced = model.exit_state(), model.reduced_head
    if reduced is not None and torch.equal(reduced.known.weight, model.lm_head.weight[reduced.ids]):
        del own[REDUCED_HEAD]
    return own


def export_exits(checkpoint: Checkpoint, out: Path) -> None:
    """Write what belongs to the exits alone, in fp16, with the recipe and the last figures of their training. Raises ForeignError."""
    if out.exists() and not (out / EXITS).is_file():
        raise ForeignError(f"{out} is there already and was not written by export-exits; choose another name, or remove it")
    figures = {name: line[name] for line in checkpoint.metrics for name in ("perplexity", "agreement", "gates") if name in line}
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in exit_tensors(checkpoint).items()}
    try:
        with written_aside(out) as folder:
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / EXIT_WEIGHTS)
            write_json(folder / EXITS, {**checkpoint.recipe.to_dict(), "step": checkpoint.step, "figures": figures})
    except (OSError, safetensors.SafetensorError) as error:
        raise ForeignError(f"could not write {out}: {error}; nothing half is left there") from None


def export_model(checkpoint: Checkpoint, out: Path) -> None:
    """Write a checkpoint as a directory that transformers loads, its exits in files beside. Raises ForeignError."""
    if out.exists() and not (out / EXITS).is_file():
        raise ForeignError(f"{out} is there already and was not written by export-hf; choose another name, or remove it")
    model, ours = checkpoint.recipe.model, checkpoint.model.state_dict()
    config = foreign_config(model)
    if model.tie_embeddings:
        del ours["lm_head.weight"]
    theirs = {known: value.contiguous() for name, value in ours.items() if (known := foreign_name(name)) is not None}
    exits = {name: value.contiguous() for name, value in exit_tensors(checkpoint).items()}
    stops = checkpoint.conventions.stop_ids
    generation = {"eos_token_id": list(stops), **checkpoint.conventions.generation}
    begin = generation.get("bos_token_id", checkpoint.conventions.start_id)
    try:
        with written_aside(out) as folder:
            save_file(theirs, folder / WEIGHTS, metadata={"format": "pt"})
            save_file(exits, folder / EXIT_WEIGHTS)
            write_json(folder / EXITS, {"model": model.to_dict()})
            write_json(folder / "config.json", {**config, "bos_token_id": begin, "eos_token_id": stops[0] if stops else None})
            write_json(folder / "generation_config.json", generation)
            write_tokenizer(checkpoint, begin, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ForeignError(f"could not write {out}: {error}; no half model is left there") from None


def write_tokenizer(checkpoint: Checkpoint, begin: int | None, folder: Path) -> None:
    """The tokenizer's files, in the form that transformers' AutoTokenizer reads."""
    conventions, tokenizer = checkpoint.conventions, checkpoint.tokenizer
    special = {"bos_token": begin, "eos_token": conventions.stop_ids[0] if conventions.stop_ids else None}
    tokens = {name: tokenizer.id_to_token(token) for name, token in special.items() if token is not None}
    starts = conventions.start_id is not None
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": starts, **tokens})
    if conventions.chat_template is not None:
        (folder / "chat_template.jinja").write_text(conventions.chat_template, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
