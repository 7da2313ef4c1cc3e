"""Hugging Face model directories: read into a checkpoint, and written back from one.

    # a directory, a hub id or a .gguf file
    checkpoint = import_model("HuggingFaceTB/SmolLM2-135M-Instruct", exits=(10, 20))
    # the same, written weight by weight as a checkpoint
    import_model("HuggingFaceTB/SmolLM2-135M-Instruct", exits=(10, 20), out=Path("smollm2"))
    # transformers loads it; what belongs to the exits lies in files beside
    export_model(checkpoint, Path("smollm2-hf"))
    export_exits(checkpoint, Path("smollm2-exits"))     # these files alone, small enough to share

Reading safetensors and .gguf files needs no transformers (the latter need the package gguf); a tokenizer that
is not in the form of tokenizer.json does.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from ease_common.errors import CheckpointError, ModelImportError, SettingWarning
from ease_common.files import written_aside
from ease_common.hub import hub_failure, is_hub_id
from ease_train.convert.adapter import Adapter
from ease_train.convert.directory_text import read_named_tokenizer, read_text_format, start_id
from ease_train.convert.families import family_of
from ease_train.convert.family import Family
from ease_train.convert.files import opened_tensors, read_json
from ease_train.convert.source_model import SourceModel, Weights, filled_in, model_config, source_config
from ease_train.data.tokens import tokens_without_row
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import (
    EMBEDDING,
    LM_HEAD,
    UNKNOWN_DATA,
    Checkpoint,
    check_fit,
    filled,
    not_finite,
    save_checkpoint,
    untied,
)
from ease_train.training.config import OF_THE_EXITS, ModelConfig, Recipe, TokenizerConfig, TrainConfig
from ease_train.training.renames import renamed
from ease_train.training.tensors import Tensors, write_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OF_AN_ADAPTER = "it is an adapter of peft; import the model it belongs to, with --adapter DIRECTORY"
EXITS, EXIT_WEIGHTS = "ease.json", "ease_exits.safetensors"  # what transformers has no place for
REDUCED_HEAD = "reduced_head.known.weight"
NEEDED_OF_HUB = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model")


def import_model(
    source: str,
    exits: tuple[int, ...] = (),
    max_positions: int | None = None,
    with_exits: Path | None = None,
    report: Callable[[str], object] | None = None,
    adapter: Path | None = None,
    out: Path | None = None,
) -> Checkpoint:
    """Another project's model as a checkpoint with untrained exits, whose norms start as the final norm; the
    low-rank changes of an `adapter` of peft's are merged.

    Raises ModelImportError, ConfigError.

    Without `exits` it has those in the folder `with_exits`, or those that `export_model` wrote beside it, if
    any. `report` is called with each line of what of a .gguf file was used. Matrices are mapped where they
    are as in the source's files. With `out` the checkpoint is written there weight by weight, so that memory
    for one is enough, and comes back without weights (on "meta"); then CheckpointError is raised, too.
    """
    checkpoint, weights = _found(source, exits, max_positions, with_exits, report, adapter)
    if out is not None:
        save_checkpoint(checkpoint, out, weights.tensors())
        return checkpoint
    return replace(checkpoint, model=filled(checkpoint.recipe.model, dict(weights), "the model's files"))


def _found(
    source: str,
    exits: tuple[int, ...],
    max_positions: int | None,
    with_exits: Path | None,
    report: Callable[[str], object] | None,
    adapter: Path | None,
) -> tuple[Checkpoint, "Converted"]:
    """The checkpoint without weights, and these."""
    if source.endswith(".gguf") and adapter is not None:
        raise ModelImportError(
            f"an adapter goes by the names of weights in transformers: give a directory, not {source}"
        )
    if source.endswith(".gguf"):
        source_model = read_gguf_file(Path(source))
        folder = None
        if report is not None:
            for line in source_model.report:
                report(line)
    else:
        folder = Path(source) if Path(source).is_dir() else download(source)
        source_model = read_directory(folder, adapter)
        source = source if adapter is None else f"{source} with the adapter {adapter}"
    if with_exits is None and not exits and folder is not None and (folder / EXITS).is_file():
        with_exits = folder
    if with_exits is not None:
        return adopt_with_exits(source_model, with_exits, max_positions, source)
    return adopt(source_model, exits, max_positions, source)


def read_gguf_file(path: Path) -> SourceModel:
    """The model of a .gguf file. Raises ModelImportError."""
    if not path.is_file():
        raise ModelImportError(f"no file at {path}")
    try:
        from ease_train.convert.gguf import read_gguf
    except ImportError:
        raise ModelImportError(f"reading {path.name} needs gguf: pip install 'ease-lm[hf]'") from None
    return read_gguf(path)


def download(name: str) -> Path:
    """A model's files from the hub, or from its cache. Raises ModelImportError."""
    from huggingface_hub import snapshot_download

    if not is_hub_id(name):
        raise ModelImportError(
            f"no model at {name}: expected a Hugging Face directory, a hub id like OWNER/NAME, or a "
            ".gguf file"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(NEEDED_OF_HUB)))
    except Exception as error:  # the hub's client lets through whatever its transport raises
        said = hub_failure(error, "A directory on this machine needs no hub")
        raise ModelImportError(f"{name} did not come from the Hugging Face hub: {said}") from None


def read_directory(folder: Path, adapter: Path | None = None) -> SourceModel:
    """A Hugging Face model directory; its weights are read one by one, and merged with an adapter's changes,
    as they are asked for.

    Raises ModelImportError.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelImportError(f"{folder} is no Hugging Face model: config.json is missing{_other(folder)}")
    if "recipe" in config:
        raise ModelImportError(f"{folder} is a checkpoint of this project already; nothing to import")
    sizes = model_config(
        config, exits=(), max_positions=1, tied=False
    )  # refused in our words, before transformers reads the same file
    tokenizer, names = read_named_tokenizer(folder)
    weights = Shards(folder, family_of(config), sizes, None if adapter is None else Adapter(adapter))
    return SourceModel(config, weights, tokenizer, read_text_format(folder, config, tokenizer, names))


def _other(folder: Path) -> str:
    """What a directory without a config.json may be, and what to do about it."""
    if (folder / "adapter_config.json").is_file():
        return f"; {OF_AN_ADAPTER}"
    if list(folder.glob("consolidated*")) or (folder / "params.json").is_file():
        return (
            "; these are weights in their maker's own form: take the same model in that of transformers from "
            "the hub, or convert it with its convert_..._weights_to_hf.py"
        )
    return ""


class Shards(Weights):
    """The weights of a directory's safetensors files, which are mapped. Raises ModelImportError.

    As transformers has it, `model.safetensors` goes before an index, and names may lack the prefix of the
    decoder.
    """

    def __init__(
        self, folder: Path, family: Family, sizes: ModelConfig, adapter: Adapter | None = None
    ) -> None:
        self.family = family
        self.sizes = sizes
        self.adapter = adapter
        paths = [folder / name for name in _weight_files(folder)]
        self.files = {path: opened_tensors(path) for path in paths}
        stored = {name: path for path, file in self.files.items() for name in file.keys()}  # noqa: SIM118 - no mapping
        prefix, _, embedding = self.called(EMBEDDING).partition(".")
        bare = embedding in stored
        head = self.called(LM_HEAD)
        self.places = dict[str, tuple[Path, str]]()
        strange = list[str]()
        for name, path in stored.items():
            whole = f"{prefix}.{name}" if bare and name != head else name
            ours = family.held(whole)
            self.places |= dict.fromkeys(ours, (path, name))
            if not ours and not name.endswith(family.ignored):
                strange.append(name)
        self.strange = tuple(strange)
        if adapter is not None:
            adapter.check({self.called(name) for name in self.places})

    def called(self, name: str) -> str:
        found = self.family.stored(name)
        return name if found is None else found[0]

    def _stored(self, name: str) -> Tensor:
        path, stored = self.places[name]
        found: Tensor = self.files[path].get_tensor(stored)
        return found

    def dtype(self, name: str) -> torch.dtype:
        changed = self.adapter is not None and self.called(name) in self.adapter.pairs
        return torch.float32 if changed else self.family.dtype(self._stored(name).dtype, name)

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self.places[name]
        tensor = self._stored(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelImportError(
                f"{path.name}: {stored} is stored as {tensor.dtype}; quantised weights cannot be imported"
            )
        if self.adapter is not None:
            tensor = self.adapter.merged(self.called(name), tensor)
        try:
            return self.family.taken(tensor, name, self.sizes)
        except ModelImportError as error:
            raise ModelImportError(f"{stored}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _weight_files(folder: Path) -> list[str]:
    """The names of a directory's safetensors files, which are all there. Raises ModelImportError."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = read_json(folder / INDEX)
    if index is None:
        raise ModelImportError(f"{folder} lacks {WEIGHTS}{_instead(folder)}")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelImportError(f"{folder / INDEX} is damaged: weight_map should name a file for each tensor")
    files = sorted(set(places.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise ModelImportError(
            f"{folder / INDEX} names {outside[0]!r}, which is no file of its own directory"
        )
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ModelImportError(f"{folder} lacks {', '.join(missing)} ({len(missing)} of {len(files)} shards)")
    return files


def _instead(folder: Path) -> str:
    """What a directory without weights that can be read holds in their place, and what to do about it."""
    if (folder / "adapter_config.json").is_file():
        return f": {OF_AN_ADAPTER}"
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f" and {INDEX}; is {others[0]} meant? Give it the first name"
    remedy = (
        "transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(OTHER) writes them so"
    )
    return f"; weights in another form (.bin, .pt) are not read: {remedy}"


def adopt(
    source_model: SourceModel, exits: tuple[int, ...], max_positions: int | None, source: str
) -> tuple[Checkpoint, "Converted"]:
    """Another project's model as a checkpoint, and its weights. Raises ModelImportError, ConfigError."""
    return _checkpoint(source_model, read_config(source_model, exits, max_positions), {}, source)


def read_config(source_model: SourceModel, exits: tuple[int, ...], max_positions: int | None) -> ModelConfig:
    """A source model's configuration; where config.json and the tensors disagree, as transformers reads it.

    Raises ModelImportError, ConfigError.
    """
    num_layers = source_model.config.get("num_hidden_layers")
    if type(num_layers) is int and num_layers > len(source_model.weights):
        found = f"the model's files hold {len(source_model.weights)} tensors in all"
        raise ModelImportError(f"config.json has num_hidden_layers = {num_layers}, but {found}")
    return model_config(source_model.config, exits, max_positions, is_tied(source_model))


def is_tied(source_model: SourceModel) -> bool:
    """Whether embedding and LM head are one matrix: config.json says so, and the files hold no two that
    differ.
    """
    if filled_in(source_model.config, family_of(source_model.config))["tie_word_embeddings"] is not True:
        return False
    if not {EMBEDDING, LM_HEAD} <= source_model.weights.keys():
        return True
    return torch.equal(source_model.weights[EMBEDDING], source_model.weights[LM_HEAD])


def _checkpoint(
    source_model: SourceModel, config: ModelConfig, exit_weights: Mapping[str, Tensor], source: str
) -> tuple[Checkpoint, "Converted"]:
    recipe = Recipe(
        name="imported",
        description=f"the weights of {source}",
        paper="",
        model=config,
        tokenizer=TokenizerConfig(),
        train=TrainConfig(
            layer_weights={config.num_layers: 1.0}, sequence_length=min(256, config.max_positions)
        ),
    )
    start = source_model.text_format.start_id
    if start is not None and start >= config.vocab_size:
        token = source_model.tokenizer.id_to_token(start)
        raise ModelImportError(
            f"{token!r} (id {start}) stands before every text, but the embedding has {config.vocab_size} rows"
        )
    with torch.device("meta"):
        model = Decoder(config)
    weights = Converted(source_model.weights, model, exit_weights)
    if without := tokens_without_row(source_model.tokenizer, config.vocab_size):
        warnings.warn(without, SettingWarning, stacklevel=2)
    found = Checkpoint(
        recipe,
        model,
        source_model.tokenizer,
        0,
        UNKNOWN_DATA,
        text_format=source_model.text_format,
        grids=source_model.grids,
    )
    return found, weights


class Converted(Mapping[str, Tensor]):
    """A decoder's weights, of a source model's, each of which it uses, and of its exits' own. One of tied
    ones is left out. Each is read when it is asked for.

    `asked` are the source's names of ours, `starts` what an exit's norm starts as. Raises ModelImportError
    when some lack, or belong to nothing here; and for a weight that does not fit, or holds what is no finite
    number, when it is asked for.
    """

    def __init__(self, source: Weights, model: Decoder, exit_weights: Mapping[str, Tensor]) -> None:
        tied = model.config.tie_embeddings
        self.source = source
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}
        self.exit_weights = exit_weights
        self.lm_head = EMBEDDING if tied else LM_HEAD
        named = [name for name in self.shapes if family_part(name)]
        self.asked = {name: name for name in named}
        if tied:
            del self.asked[LM_HEAD]
            # one of them, or two that are equal
            self.asked[EMBEDDING] = EMBEDDING if EMBEDDING in source else LM_HEAD
        check_names(source, {*self.asked.values()}, {*named})
        self.starts = {
            name: f"norm.{name.rpartition('.')[2]}"
            for name in self.shapes
            if name.startswith("exits.") and ".norm." in name and name not in exit_weights
        }
        fallbacks = [*self.starts, *([REDUCED_HEAD] if self.reduced else [])]
        self.names = list(dict.fromkeys([*self.asked, *exit_weights, *fallbacks]))
        given = {name: self.shapes[name] for name in (*self.asked, *fallbacks, *([LM_HEAD] if tied else []))}
        try:
            check_fit(self.shapes, given | {n: w.shape for n, w in exit_weights.items()}, "the model's files")
        except CheckpointError as error:
            raise ModelImportError(str(error)) from None

    @property
    def reduced(self) -> bool:
        """Whether a reduced head has the rows of the LM head."""
        return REDUCED_HEAD in self.shapes and REDUCED_HEAD not in self.exit_weights

    def __getitem__(self, name: str) -> Tensor:
        if name in self.starts:
            return self[self.starts[name]].clone()
        if name == REDUCED_HEAD and self.reduced:
            return self[self.lm_head][self.exit_weights["reduced_head.ids"]]
        if name in self.exit_weights:
            return _checked(name, self.exit_weights[name], self.shapes[name])
        known = self.asked[name]
        return _checked(self.source.called(known), self.source[known], self.shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        """The type of a weight, which is not read for it."""
        if name in self.exit_weights:
            return self.exit_weights[name].dtype
        name = self.lm_head if name == REDUCED_HEAD else self.starts.get(name, name)
        return self.source.dtype(self.asked[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def tensors(self) -> Tensors:
        """All of them, to be written."""
        return Tensors({name: (self.dtype(name), self.shapes[name]) for name in self}, self.__getitem__)


def check_names(source: Weights, asked: Set[str], named: Set[str]) -> None:
    """Raise ModelImportError unless a source has the weights that are asked for, and none but those named."""
    if missing := sorted({source.called(name) for name in asked if name not in source}):
        untied = (
            f"; config.json ties no {missing[0]} to the embedding (tie_word_embeddings)"
            if missing[0] == source.called(LM_HEAD)
            else ""
        )
        raise ModelImportError(
            f"the model's files lack {len(missing)} weights, the first is {missing[0]}{untied}"
        )
    if strange := [*source.strange, *(source.called(name) for name in source if name not in named)]:
        found = f"the model's files hold {len(strange)} weights that this decoder has no place for"
        raise ModelImportError(f"{found}, the first is {strange[0]}")


def family_part(name: str) -> bool:
    """Whether a weight is the model's own, and none of the exits'."""
    return name.partition(".")[0] in ("embed", "layers", "norm", "lm_head")


def _checked(name: str, weight: Tensor, shape: torch.Size) -> Tensor:
    """A weight of the source that has this shape, and numbers that are finite. Raises ModelImportError."""
    if weight.shape != shape:
        raise ModelImportError(f"{name} has the shape {[*weight.shape]}, but config.json makes it {[*shape]}")
    if where := not_finite(weight):
        raise ModelImportError(
            f"{name} {where}: the model is damaged, and would say nothing; get its files again"
        )
    return weight


def adopt_with_exits(
    source_model: SourceModel, folder: Path, max_positions: int | None, source: str
) -> tuple[Checkpoint, Converted]:
    """Another project's model with the exits that `export_model` or `export_exits` wrote, and its weights.

    Raises ModelImportError, ConfigError.
    """
    values = (read_json(folder / EXITS) or {}).get("model")
    if values is None:
        raise ModelImportError(
            f"{folder} holds no exits: expected {EXITS} and {EXIT_WEIGHTS}, as `ease-train export-exits` "
            "writes them"
        )
    theirs = ModelConfig.from_dict(values, EXITS)
    config = read_config(source_model, theirs.exits, max_positions)
    config = replace(
        config, **{name: getattr(theirs, name) for name in (*OF_THE_EXITS, "gates", "gate_width")}
    )
    for name, value in asdict(replace(theirs, max_positions=config.max_positions)).items():
        if value != getattr(config, name):
            raise ModelImportError(
                f"the exits in {folder} belong to another model: {name} = {value}, but "
                f"{getattr(config, name)} in {source}"
            )
    with opened_tensors(folder / EXIT_WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    exit_weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in renamed(tensors).items()
    }
    return _checkpoint(source_model, config, exit_weights, source)


def exit_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What transformers has no place for.

    A reduced head whose rows are the LM head's is not among it: they are read there.
    """
    model = checkpoint.model
    own = model.exit_state()
    reduced = model.reduced_head
    if reduced is not None and torch.equal(
        reduced.known.weight.float(), model.lm_head.weight[reduced.ids].float()
    ):
        del own[REDUCED_HEAD]
    return own


def export_exits(checkpoint: Checkpoint, out: Path) -> None:
    """Write what belongs to the exits alone, in fp16, with the recipe and the last figures of their training.

    Raises ModelImportError.
    """
    if out.exists() and not (out / EXITS).is_file():
        raise ModelImportError(
            f"{out} is there already and was not written by export-exits; choose another name, or remove it"
        )
    figures = {
        name: line[name]
        for line in checkpoint.metrics
        for name in ("perplexity", "agreement", "gates")
        if name in line
    }
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in exit_tensors(checkpoint).items()
    }
    try:
        with written_aside(out) as folder:
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / EXIT_WEIGHTS)
            write_json(
                folder / EXITS, {**checkpoint.recipe.to_dict(), "step": checkpoint.step, "figures": figures}
            )
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelImportError(f"could not write {out}: {error}; nothing half is left there") from None


def export_model(checkpoint: Checkpoint, out: Path) -> None:
    """Write a checkpoint as a directory that transformers loads, its exits in files beside.

    Weights keep their types; the directory's is the embedding's.

    Raises ModelImportError.
    """
    if out.exists() and not (out / EXITS).is_file():
        raise ModelImportError(
            f"{out} is there already and was not written by export-hf; choose another name, or remove it"
        )
    model = checkpoint.recipe.model
    ours = untied(checkpoint.model)
    family, config = source_config(model)
    dtype = str(ours[EMBEDDING].dtype).removeprefix("torch.")
    exits = {name: value.contiguous() for name, value in exit_tensors(checkpoint).items()}
    stops = checkpoint.text_format.stop_ids
    generation = {"eos_token_id": list(stops), **checkpoint.text_format.generation}
    begin = generation.get("bos_token_id", checkpoint.text_format.start_id)
    pad = generation.get("pad_token_id")
    try:
        with written_aside(out) as folder:
            write_tensors(folder / WEIGHTS, given_tensors(family, ours, model), {"format": "pt"})
            save_file(exits, folder / EXIT_WEIGHTS)
            write_json(folder / EXITS, {"model": model.to_dict()})
            write_json(
                folder / "config.json",
                {
                    **config,
                    "dtype": dtype,
                    "torch_dtype": dtype,
                    "bos_token_id": begin,
                    "eos_token_id": stops[0] if stops else None,
                    "pad_token_id": pad,
                },
            )
            write_json(folder / "generation_config.json", generation)
            write_tokenizer(checkpoint, begin, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelImportError(f"could not write {out}: {error}; no half model is left there") from None


def given_tensors(family: Family, ours: Mapping[str, Tensor], config: ModelConfig) -> Tensors:
    """A family's tensors of our weights, each put together when it is written."""
    shapes = family.given({name: weight.to("meta") for name, weight in ours.items()}, config)

    def made(name: str) -> Tensor:
        return family.given({part: ours[part] for part in family.held(name)}, config)[name]

    return Tensors({name: (tensor.dtype, tensor.shape) for name, tensor in shapes.items()}, made)


def write_tokenizer(checkpoint: Checkpoint, begin: int | None, folder: Path) -> None:
    """The tokenizer's files, in the form that transformers' AutoTokenizer obeys."""
    text_format = checkpoint.text_format
    tokenizer = checkpoint.tokenizer
    special = {"bos_token": begin, "eos_token": text_format.stop_ids[0] if text_format.stop_ids else None}
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": text_format.start_id
        is not None,  # for llama.cpp's converter; transformers obeys the post-processor
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.id_to_token(token) for name, token in special.items() if token is not None},
        **text_format.special_tokens,
    }
    with_start(tokenizer, text_format.start_id).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", described)
    if text_format.chat_template is not None:
        (folder / "chat_template.jinja").write_text(text_format.chat_template, encoding="utf-8")


def with_start(tokenizer: Tokenizer, start: int | None) -> Tokenizer:
    """A tokenizer whose post-processor puts the token `start` before every text; the same one where it does
    already.
    """
    if start_id(tokenizer) == start:
        return tokenizer
    before = [] if start is None else [tokenizer.id_to_token(start)]
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.post_processor = TemplateProcessing(
        single=[*before, "$A"],
        pair=[*before, "$A", *(f"{token}:1" for token in before), "$B:1"],
        special_tokens=[(token, start) for token in before],
    )
    return changed


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
