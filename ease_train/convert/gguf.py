"""GGUF files, llama.cpp's format: metadata and tensors as llama.cpp reads them, with no other loader in
between.

    file = GGUFFile(Path("model.gguf"))
    file.config                                        # the values of a config.json
    file.tensors["layers.0.attention.q_proj.weight"]   # packed rows under our name, with their ggml type
    file.read()                                     # the whole model, dequantised tensor by tensor

Every key of `<architecture>.*` and `tokenizer.*` is used, known to change nothing, or refused by name; so is
every tensor.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ease_common.errors import ModelImportError
from ease_train.convert.directory_text import read_template
from ease_train.convert.families import family_named, known
from ease_train.convert.family import LLAMA3_SCALING, ROTATED, by_pairs, inner_name, places_of
from ease_train.convert.grid import Grid, packed
from ease_train.convert.source_model import SourceModel, Weights, model_config
from ease_train.convert.text_format import TextFormat
from ease_train.convert.vocabularies import (
    Split,
    TokenType,
    Vocabulary,
    byte_level,
    sentencepiece_bpe,
    split_of,
    unigram,
)
from ease_train.model.blocks import stretched
from ease_train.model.decoder import Decoder
from ease_train.training.config import ModelConfig

OUTER = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
IN_BLOCK: dict[str, tuple[str, ...]] = {
    "attn_norm": ("attention_norm",),
    "attn_q": ("attention.q_proj",),
    "attn_k": ("attention.k_proj",),
    "attn_v": ("attention.v_proj",),
    "attn_q_norm": ("attention.q_norm",),
    "attn_k_norm": ("attention.k_norm",),
    "attn_output": ("attention.o_proj",),
    "post_attention_norm": ("attention_out_norm",),
    "ffn_norm": ("mlp_norm",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_down": ("mlp.down_proj",),
    "post_ffw_norm": ("mlp_out_norm",),
}
ROPE_FACTORS = "rope_freqs.weight"

NEUTRAL: dict[str, Any] = {  # what llama.cpp computes otherwise with another value
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}
HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
NEUTRAL_TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.precompiled_charsmap": [],
    "tokenizer.ggml.suppress_tokens": [],
}
HARMLESS_TOKENIZER = (
    *(
        f"tokenizer.ggml.{name}_token_id"
        for name in ("seperator", "separator", "mask", "cls", "prefix", "suffix", "middle")
    ),
    *(f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    "tokenizer.ggml.token_type_count",
    "tokenizer.huggingface.json",
    "tokenizer.chat_templates",
)
SAMPLING = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# what llama.cpp takes for the end of an answer by its text: files name one such token of several
END_OF_TURN = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "[EOT]", "[EOS]"),
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001 - DeepSeek's
)


class Reader(GGUFReader):
    """gguf's reader, which would count to the length that a damaged file claims for an array."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            left = len(self.data) - orig_offs
            if length > left:
                raise ValueError(f"an array of {length} values in the {left} bytes that are left")
        return super()._get_field_parts(orig_offs, raw_type)


@dataclass
class Metadata:
    """A file's keys and values; which of them were asked for, by their names.

    Every reader raises ModelImportError.
    """

    reader: GGUFReader
    used: set[str] = field(default_factory=set)

    def __contains__(self, key: str) -> bool:
        return key in self.reader.fields

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, of this type; without a default it has to be there."""
        if key not in self:
            if default is None:
                raise ModelImportError(f"the file lacks {key}, without which the model is not known")
            return default
        self.used.add(key)
        try:
            found = self.reader.fields[key].contents()
        except UnicodeDecodeError as error:
            raise ModelImportError(f"{key} is no text: {error}") from None
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind or (isinstance(found, float) and not math.isfinite(found)):
            shown = repr(found)
            raise ModelImportError(f"{key} = {shown[:60]}, expected {_NAMES[kind]}")
        return found

    def per_layer(self, key: str, default: int | None = None) -> int:
        """A whole number that a file may give once for all layers, or once for each; they have to be the same
        in all.
        """
        found = [default] if key not in self else self.reader.fields[key].contents()
        if (
            isinstance(found, list)
            and found
            and all(number == found[0] for number in found)
            and type(found[0]) is int
        ):
            self.used.add(key)
            return int(found[0])
        if isinstance(found, list):
            raise ModelImportError(f"{key} = {found[:8]}: layers of different shapes cannot be imported")
        return int(self.value(key, int))

    def token(self, key: str, tokens: int) -> int | None:
        """A token's id, if the file names one."""
        if key not in self:
            return None
        number = int(self.value(key, int))
        if not 0 <= number < tokens:
            raise ModelImportError(f"{key} = {number}, expected a token from 0 to {tokens - 1}")
        return number


_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
}


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as its file keeps it: `data` holds one packed row each for the outer dimensions of `shape`.

    `heads` is the number of heads whose rotated pairs lie side by side there (llama.cpp's order), 0 where
    rows are in our order.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[Any]
    heads: int = 0

    def rows(self) -> NDArray[Any]:
        """The packed rows in our order, first halves of the rotated pairs before second ones."""
        if not self.heads:
            return self.data
        paired = self.data.reshape(self.heads, -1, 2, *self.data.shape[1:])
        return paired.swapaxes(1, 2).reshape(self.data.shape)

    def floats(self) -> Tensor:
        """The weights as fp32, in `shape`. Raises ModelImportError for a type that gguf cannot dequantise."""
        try:
            values = gguf.dequantize(self.rows(), self.kind)
        except (NotImplementedError, ValueError) as error:
            reason = str(error).strip() or type(error).__name__
            raise ModelImportError(
                f"{self.name} is stored as {self.kind.name}, which gguf cannot dequantise: {reason}"
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shape)

    def grid(self) -> Grid | None:
        """The matrix's own whole numbers and scales, whose values are those of `floats`; None for a type
        that has no such form of 4 or 8 bits here.
        """
        if self.kind not in GRIDS:
            return None
        num_bytes = GGML_QUANT_SIZES[self.kind][1]
        blocks = np.ascontiguousarray(self.rows()).reshape(-1, num_bytes)
        bits, block, read = GRIDS[self.kind]
        numbers, scales, offsets = read(blocks)
        rows = self.shape[0]
        return Grid(
            self.kind.name,
            bits,
            block,
            packed(numbers.reshape(rows, -1, block), bits),
            scales.reshape(rows, -1),
            None if offsets is None else offsets.reshape(rows, -1),
        )


Numbers = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32] | None]


def _halves(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Columns of two bytes as the fp16 numbers that they are. Shape: (n, 2m) -> (n, m)."""
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _nibbles(blocks: NDArray[np.uint8], run: int) -> NDArray[np.uint8]:
    """Numbers of 4 bits: the lower halves of `run` bytes, then their upper halves.

    Shape: (n, m) -> (n, 2m).
    """
    parts = blocks.reshape(len(blocks), -1, 1, run) >> np.array([[0], [4]], np.uint8)
    return (parts & np.uint8(15)).reshape(len(blocks), -1)


def _q4_0(blocks: NDArray[np.uint8]) -> Numbers:
    return _nibbles(blocks[:, 2:], 16), _halves(blocks[:, :2]), None


def _q4_1(blocks: NDArray[np.uint8]) -> Numbers:
    return _nibbles(blocks[:, 4:], 16), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks: NDArray[np.uint8]) -> Numbers:
    scale, least = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))  # (n, 8)
    both = _halves(blocks[:, :4])
    return (
        _nibbles(blocks[:, 16:], 32),
        both[:, :1] * scale.astype(np.float32),
        -(both[:, 1:] * least.astype(np.float32)),
    )


def _q6_k(blocks: NDArray[np.uint8]) -> Numbers:
    low = _nibbles(blocks[:, :128], 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    numbers = low | (high & np.uint8(3)).reshape(len(blocks), -1) << np.uint8(4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return numbers + np.uint8(128 - 32), _halves(blocks[:, 208:]) * scales, None


def _q8_0(blocks: NDArray[np.uint8]) -> Numbers:
    return blocks[:, 2:] ^ np.uint8(128), _halves(blocks[:, :2]), None


# bits, block, and what reads packed blocks (n, bytes): numbers, scales and offsets, each (n, those in it)
GRIDS: dict[GGMLQuantizationType, tuple[int, int, Callable[[NDArray[np.uint8]], Numbers]]] = {
    GGMLQuantizationType.Q4_0: (4, 32, _q4_0),
    GGMLQuantizationType.Q4_1: (4, 32, _q4_1),
    GGMLQuantizationType.Q4_K: (4, 32, _q4_k),
    GGMLQuantizationType.Q6_K: (8, 16, _q6_k),
    GGMLQuantizationType.Q8_0: (8, 32, _q8_0),
}


class Dequantised(Weights):
    """The tensors of a file as fp32, each dequantised when it is asked for."""

    def __init__(self, tensors: Mapping[str, PackedTensor]) -> None:
        self.tensors = tensors

    def called(self, name: str) -> str:
        return self.tensors[name].name if name in self.tensors else name

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].floats()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read_gguf(path: Path) -> SourceModel:
    """The model of a .gguf file. Raises ModelImportError, one line that begins with the file's name."""
    try:
        return GGUFFile(path).read()
    except ModelImportError as error:
        line = str(error)
        raise ModelImportError(line if line.startswith(str(path)) else f"{path}: {line}") from None


class GGUFFile:
    """A file's model: `config` (the values of a config.json) and `tensors`, packed, by our names.

    Raises ModelImportError.
    """

    def __init__(self, path: Path) -> None:
        self.reader = _opened(path)
        self.metadata = Metadata(self.reader)
        self.architecture = self.metadata.value("general.architecture", str, "unknown")
        kinds = {family.gguf: kind for kind in known() if (family := family_named(kind)).gguf}
        if self.architecture not in kinds:
            expected = ", ".join(kinds)
            raise ModelImportError(
                f"{path} holds a model of the type '{self.architecture}'; expected one of: {expected}"
            )
        self.kind = kinds[self.architecture]
        self.family = family_named(self.kind)
        self._check_whole()
        self.stored = {tensor.name: tensor for tensor in self.reader.tensors}
        self.config = self._config()
        self.tensors = self._tensors()

    def read(self) -> SourceModel:
        """The whole model.

        Raises ModelImportError for a tokenizer that is not known, and for keys that are not.
        """
        tokenizer, text_format = self.tokenizer_and_text_format()
        self._check_keys()
        grids = {name: grid for name, tensor in self.tensors.items() if (grid := tensor.grid()) is not None}
        weights = Dequantised(self.tensors)
        return SourceModel(self.config, weights, tokenizer, text_format, self.report(), grids)

    def report(self) -> tuple[str, ...]:
        """What of the file was used, line by line."""
        kinds = Counter(tensor.tensor_type.name for tensor in self.reader.tensors)
        types = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
        keys = [key for key in self.reader.fields if not key.startswith("GGUF.")]
        without = [key for key in keys if key not in self.metadata.used]
        return (
            f"tensors used: all {len(self.reader.tensors)} ({types})",
            f"metadata used: {', '.join(key for key in keys if key in self.metadata.used)}",
            f"metadata that changes nothing here: {', '.join(without) or 'none'}",
        )

    def _check_whole(self) -> None:
        kind = self.metadata.value("general.type", str, "model")
        parts = self.metadata.value("split.count", int, 1)
        if kind != "model":
            raise ModelImportError(f"general.type = '{kind}', expected a model")
        if parts > 1:
            raise ModelImportError(
                f"this is one of {parts} parts; join them: llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        if self.reader.byte_order != "I":
            raise ModelImportError(
                "the file's bytes are in the other order than this machine's; convert the model again on "
                "this one"
            )

    def _config(self) -> dict[str, Any]:
        arch = self.architecture
        read = self.metadata
        heads = read.per_layer(f"{arch}.attention.head_count")
        width = read.value(f"{arch}.embedding_length", int)
        for name, number in {"attention.head_count": heads, "embedding_length": width}.items():
            if number < 1:
                raise ModelImportError(f"{arch}.{name} = {number}, expected at least 1")
        head_dim = read.value(f"{arch}.attention.key_length", int, width // heads)
        rotated = read.value(f"{arch}.rope.dimension_count", int, head_dim)
        found = {"attention.value_length": read.value(f"{arch}.attention.value_length", int, head_dim)}
        if not self.family.partial:
            found["rope.dimension_count"] = rotated
        for name, number in found.items():
            if number != head_dim:
                raise ModelImportError(f"{arch}.{name} = {number}, expected the width of a head, {head_dim}")
        window = read.value(f"{arch}.attention.sliding_window", int, 0)
        positions = read.value(f"{arch}.context_length", int)
        cut = window > 0 and not self.family.gguf_windows
        values = {
            "model_type": self.kind,
            "vocab_size": self._vocab_size(),
            "hidden_size": width,
            "num_hidden_layers": read.value(f"{arch}.block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": read.per_layer(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": read.per_layer(f"{arch}.feed_forward_length"),
            "max_position_embeddings": min(positions, window) if cut else positions,
            "sliding_window": window if window > 0 and not cut else None,
            "tie_word_embeddings": "output.weight" not in self.stored,
            "rope_parameters": self._rope(head_dim) | {"partial_rotary_factor": rotated / head_dim},
        }
        eps = self.family.names.get("norm_eps", "rms_norm_eps") or ""
        kind = "layer_norm_rms_epsilon" if eps == "rms_norm_eps" else "layer_norm_epsilon"
        values[eps] = read.value(f"{arch}.attention.{kind}", float)
        return values | self.family.gguf_fields(values, lambda key, *rest: read.value(f"{arch}.{key}", *rest))

    def _vocab_size(self) -> int:
        if "token_embd.weight" not in self.stored:
            raise ModelImportError("the file lacks the tensor token_embd.weight")
        rows = int(self.stored["token_embd.weight"].shape[-1])
        if (said := self.metadata.value(f"{self.architecture}.vocab_size", int, rows)) != rows:
            raise ModelImportError(
                f"{self.architecture}.vocab_size = {said}, but token_embd.weight has {rows} rows"
            )
        return rows

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """The rotary embedding as a config.json of transformers 5 has it."""
        arch = self.architecture
        read = self.metadata
        theta = read.value(f"{arch}.rope.freq_base", float, 10000.0)
        kind = read.value(
            f"{arch}.rope.scaling.type", str, "linear"
        )  # as in llama.cpp: a factor alone is linear
        old = read.value(f"{arch}.rope.scale_linear", float, 0.0)
        factor = read.value(f"{arch}.rope.scaling.factor", float, old) or 1.0
        if kind not in ("none", "linear"):
            raise ModelImportError(
                f"{arch}.rope.scaling.type = '{kind}' cannot be imported; expected none or linear"
            )
        linear = kind == "linear" and factor != 1.0
        if ROPE_FACTORS not in self.stored or not self.family.paired:
            scaling = {"rope_type": "linear", "factor": factor} if linear else {"rope_type": "default"}
            return {**scaling, "rope_theta": theta}
        if linear:
            raise ModelImportError(
                f"both {ROPE_FACTORS} and {arch}.rope.scaling.factor = {factor} stretch the rotary "
                "embedding; expected one"
            )
        stored = self.stored[ROPE_FACTORS]
        packed_factors = PackedTensor(ROPE_FACTORS, stored.tensor_type, (int(stored.shape[0]),), stored.data)
        factors = packed_factors.floats().double()
        if len(factors) != head_dim // 2:
            raise ModelImportError(
                f"{ROPE_FACTORS} has {len(factors)} values, expected {head_dim // 2}, one for each "
                "rotated pair"
            )
        return {**rope_scaling(factors, theta), "rope_theta": theta}

    def _tensors(self) -> dict[str, PackedTensor]:
        """The tensors by our names: each that the model needs, and none beside."""
        layers = self.config["num_hidden_layers"]
        if layers > len(self.stored):
            raise ModelImportError(
                f"{self.architecture}.block_count = {layers}, but the file holds {len(self.stored)} "
                "tensors in all"
            )
        sizes = model_config(self.config, (), 1, tied=False)
        with torch.device("meta"):
            expected = Decoder(sizes).state_dict()
        places = {name: self._place(name) for name in expected}
        optional = {"output.weight"} | ({ROPE_FACTORS} if self.family.paired else set())
        theirs = list(dict.fromkeys(name for name, _ in places.values()))
        if missing := [name for name in theirs if name not in self.stored and name not in optional]:
            raise ModelImportError(
                f"the file lacks {len(missing)} tensors that the model needs, the first is {missing[0]}"
            )
        if strange := [name for name in self.stored if name not in theirs and name not in optional]:
            raise ModelImportError(
                f"the file holds {len(strange)} tensors that this decoder has no place for, the first is "
                f"{strange[0]}"
            )
        firsts = dict[str, int]()  # rows of each tensor that are taken
        found = {}
        for name, (stored, _) in sorted(places.items(), key=lambda item: item[1]):
            if stored in self.stored:
                rows = len(expected[name])
                first = firsts.get(stored, 0)
                firsts[stored] = first + rows
                found[name] = self._packed(name, stored, first, rows, sizes)
        return {name: found[name] for name in expected if name in found}

    def _place(self, name: str) -> tuple[str, int]:
        """The tensor that holds one of our weights, and which of its parts it is."""
        module, _, kind = name.rpartition(".")
        outer = {ours: theirs for theirs, ours in OUTER.items()}
        if module in outer:
            return f"{outer[module]}.{kind}", 0
        _, number, inner = module.split(".", 2)
        theirs, place = self._in_block[inner]
        return f"blk.{number}.{theirs}.{kind}", place

    @cached_property
    def _in_layer(self) -> dict[str, tuple[str, ...]]:
        """What each tensor of a layer holds, by its name in the file."""
        return {**IN_BLOCK, **self.family.gguf_in_layer}

    @cached_property
    def _in_block(self) -> dict[str, tuple[str, int]]:
        return places_of(self._in_layer)

    def _packed(self, ours: str, name: str, first: int, rows: int, sizes: ModelConfig) -> PackedTensor:
        """Rows of a tensor: all that it has, unless it holds several of our weights."""
        stored = self.stored[name]
        shape = tuple(int(size) for size in reversed(stored.shape))
        inner = inner_name(ours)
        data = stored.data
        fused = inner in self._in_block and len(self._in_layer[self._in_block[inner][0]]) > 1
        if fused:
            data, shape = data[first : first + rows], (rows, *shape[1:])
        if inner not in ROTATED:
            return PackedTensor(name, stored.tensor_type, shape, data)
        heads = sizes.num_heads if inner == ROTATED[0] else sizes.num_kv_heads
        if shape[0] != heads * sizes.head_dim:
            raise ModelImportError(f"{name} has {shape[0]} rows, expected {heads} heads of {sizes.head_dim}")
        if sizes.rotary_dim:
            data = data[by_pairs(torch.arange(len(data)), sizes).numpy()]
        paired = self.family.paired and ours.endswith("weight")
        return PackedTensor(name, stored.tensor_type, shape, data, heads if paired else 0)

    def tokenizer_and_text_format(self) -> tuple[Tokenizer, TextFormat]:
        """The tokenizer, and how texts begin and end. Raises ModelImportError for what is not known."""
        read = self.metadata
        model = self.metadata.value("tokenizer.ggml.model", str)
        if model not in ("gpt2", "llama", "t5"):
            raise ModelImportError(
                f"tokenizer.ggml.model = '{model}' cannot be imported; expected gpt2, llama or t5"
            )
        tokens = read.value("tokenizer.ggml.tokens", list)
        if len(tokens) > self.config["vocab_size"]:
            raise ModelImportError(
                f"the file has {len(tokens)} tokens, but token_embd.weight {self.config['vocab_size']} rows"
            )
        named = ("bos", "eos", "eot", "eom", "unknown", "padding")
        ids = {name: read.token(f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in named}
        vocabulary = self._vocabulary(tokens, model)
        split = Split((), starts=model == "llama")
        if model == "gpt2":
            split = split_of(read.value("tokenizer.ggml.pre", str))
        if read.value("tokenizer.ggml.add_eos_token", bool, model == "t5"):
            raise ModelImportError(
                "tokenizer.ggml.add_eos_token is true (or left to t5's default): a token after every "
                "prompt is not known here"
            )
        starts = read.value("tokenizer.ggml.add_bos_token", bool, split.starts)
        if starts and ids["bos"] is None:
            raise ModelImportError(
                "the file lacks tokenizer.ggml.bos_token_id, and a start token stands before every text"
            )
        by_text = (number for number, token in enumerate(tokens) if token in END_OF_TURN)
        stops = tuple(
            dict.fromkeys(
                token for token in (ids["eos"], ids["eot"], ids["eom"], *by_text) if token is not None
            )
        )
        by_name = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        special_tokens = {
            theirs: tokens[token] for ours, theirs in by_name.items() if (token := ids[ours]) is not None
        }
        template = self._chat_template()
        generation = self._generation(ids)
        text_format = TextFormat(ids["bos"] if starts else None, stops, template, generation, special_tokens)
        return self._tokenizer(model, vocabulary, split, ids["unknown"]), text_format

    def _vocabulary(self, tokens: list[str], model: str) -> Vocabulary:
        types = self.metadata.value("tokenizer.ggml.token_type", list)
        unscored = [0.0] * len(tokens) if model == "gpt2" else None
        scores = self.metadata.value("tokenizer.ggml.scores", list, unscored)
        for name, values in {"token_type": types, "scores": scores}.items():
            if len(values) != len(tokens):
                raise ModelImportError(
                    f"tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens"
                )
        special = {
            number for number, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        }
        special |= {number for number, token in enumerate(tokens) if token in END_OF_TURN}
        return Vocabulary(tokens, types, scores, frozenset(special))

    def _tokenizer(self, model: str, vocabulary: Vocabulary, split: Split, unknown: int | None) -> Tokenizer:
        read = self.metadata
        prefix = read.value("tokenizer.ggml.add_space_prefix", bool, model == "llama")
        merge = read.value("tokenizer.ggml.remove_extra_whitespaces", bool, False)
        if model == "gpt2":
            return byte_level(vocabulary, read.value("tokenizer.ggml.merges", list), split)
        if unknown is None:
            raise ModelImportError(
                "the file lacks tokenizer.ggml.unknown_token_id, which its vocabulary needs"
            )
        if model == "llama":
            return sentencepiece_bpe(vocabulary, unknown, prefix)
        return unigram(vocabulary, unknown, prefix, merge)

    def _chat_template(self) -> str | None:
        key = "tokenizer.chat_template"
        return read_template(self.metadata.value(key, str)) if key in self.metadata else None

    def _generation(self, ids: Mapping[str, int | None]) -> dict[str, Any]:
        """What the makers sample with, and the tokens that frame texts, by transformers' names."""
        framing = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
        found: dict[str, Any] = {name: token for name, token in framing.items() if token is not None}
        for theirs, name in SAMPLING.items():
            if (key := f"general.sampling.{theirs}") in self.metadata:
                found[name] = self.metadata.value(key, int if theirs == "top_k" else float)
        return found

    def _check_keys(self) -> None:
        """Refuse keys of the model and of its tokenizer that were not used and may change what is
        computed.
        """
        arch = self.architecture
        read = self.metadata
        neutral = {f"{arch}.{name}": value for name, value in NEUTRAL.items()} | NEUTRAL_TOKENIZER
        harmless = {*(f"{arch}.{name}" for name in HARMLESS), *HARMLESS_TOKENIZER}
        if read.value("tokenizer.ggml.model", str) != "gpt2":
            harmless.add("tokenizer.ggml.pre")  # splits are byte-level BPE's
        for key in self.reader.fields:
            unused = (
                key.startswith((f"{arch}.", "tokenizer.")) and key not in read.used and key not in harmless
            )
            if not unused or key.startswith("tokenizer.chat_template."):
                continue
            value = self.reader.fields[key].contents()
            if key not in neutral:
                raise ModelImportError(
                    f"{key} = {str(value)[:60]!r} is not known here; what it changes would be lost"
                )
            if value != neutral[key]:
                raise ModelImportError(
                    f"{key} = {str(value)[:60]}, expected {neutral[key]}: this decoder computes nothing else"
                )


def _opened(path: Path) -> Reader:
    try:
        return Reader(path)
    except Exception as error:  # a damaged file: anything from numpy's or gguf's own checks
        raise ModelImportError(
            f"{path} is no GGUF file that can be read: {str(error).splitlines()[0]}"
        ) from None


def rope_scaling(factors: Tensor, theta: float) -> dict[str, Any]:
    """The settings that the factors of `rope_freqs.weight` were computed from: none, linear, or Llama 3's.

    Llama 3's are known up to a common measure of LOW, HIGH and POSITIONS, which LOW = 1 fixes. Shape: (P/2)
    float64. Raises ModelImportError for other factors.
    """
    factor = float(factors.max())
    if torch.equal(factors, torch.full_like(factors, factor)):
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {"rope_type": "default"}
    half = len(factors)
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    for settings in _llama3_candidates(factors, frequencies / (2 * math.pi)):
        if torch.allclose(
            frequencies / stretched(frequencies, (factor, *settings)), factors, rtol=1e-5, atol=0.0
        ):
            return {"rope_type": "llama3", **dict(zip(LLAMA3_SCALING, (factor, *settings), strict=True))}
    raise ModelImportError(
        f"{ROPE_FACTORS} holds factors from {float(factors.min())} to {factor} that are not Llama 3's, "
        "nor linear"
    )


def _llama3_candidates(factors: Tensor, turns: Tensor) -> Iterator[tuple[float, float, float]]:
    """(LOW, HIGH, POSITIONS) to try; `turns` are those that a pair makes in one position.

    Shape: two of (P/2).
    """
    factor = factors.max()
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-6) & (kept < 1 - 1e-6)
    if between.any():
        positions = float(((3 * kept + 1) / turns)[between].median())
    else:  # any number fits that is between the last pair left alone and the first one stretched
        positions = float((4 / turns[kept > 0.5].min() * (1 / turns[kept < 0.5].max())).sqrt())
    yield 1.0, 4.0, float(round(positions))
    yield 1.0, 4.0, positions
    if int(between.sum()) > 1:
        rise, start = np.polyfit(turns[between].numpy(), kept[between].numpy(), 1)
        span = -1 / start
        yield 1.0, 1.0 + round(span, 3), float(round(rise * span))
        yield 1.0, 1.0 + span, rise * span
