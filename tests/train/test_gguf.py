"""GGUF files: written here with llama.cpp's own library, read back as the model they were made of."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import quantize

import source_models
from ease_common.errors import ModelImportError
from ease_train.convert.gguf import GGUFFile, PackedTensor, rope_scaling
from ease_train.convert.huggingface import import_model

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
IN_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
IN_PHI = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
IN_NEOX = {
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
OWN_NAMES = {"gemma3": IN_GEMMA, "phi3": IN_PHI, "gptneox": IN_NEOX}
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
}
ARCHITECTURES = {
    "Llama": "llama",
    "Mistral": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "SmolLM3": "smollm3",
    "Gemma3Text": "gemma3",
    "Phi3": "phi3",
    "GPTNeoX": "gptneox",
}
FAMILIES = [
    *("llama2", "llama3", "linear", "smollm2", "mistral", "qwen2", "qwen2.5", "qwen3", "smollm3", "gemma3"),
    *("phi3", "pythia", "serial neox"),
]
Change = Callable[[gguf.GGUFWriter], None]


def gguf_name(name: str, arch: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    number, _, inner = module.partition(".layers.")[2].partition(".")
    names = NAMES | OWN_NAMES.get(arch, {})
    return f"blk.{number}.{names[inner]}.{kind}"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp keeps a rotated pair side by side."""
    pairs = weight.reshape(num_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(weight.shape))


def tensors_of(model: Any, arch: str) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names, in its order."""
    config = model.config
    heads = (
        {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if arch in ("llama", "smollm3")
        else {}
    )
    named = {gguf_name(name, arch): value.numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        named.pop("output.weight", None)
    found = {}
    for name, value in named.items():
        part = name.split(".")[-2]
        if arch == "gemma3" and value.ndim == 1:
            value = value + 1
        if arch == "gptneox" and part == "attn_qkv":  # head by head there, here one after another
            value = np.concatenate(value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:]), axis=1)
            value = value.reshape(-1, *value.shape[2:])
        found[name] = interleaved(value, heads[part]) if part in heads and name.endswith("weight") else value
    return found


def write_gguf(
    model: Any,
    path: Path,
    arch: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Change | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """The model as llama.cpp's converter writes it; `change` adds keys, `without` leaves some out."""
    config = model.config
    writer = Writer(path, arch, without)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    if arch == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(head_dim * config.rope_parameters["partial_rotary_factor"]))
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(
        config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
    )
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    if change:
        change(writer)
    for name, array in (tensors_of(model, arch) if tensors is None else tensors).items():
        if kind != GGMLQuantizationType.F32 and array.ndim == 2:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    return written(writer, path)


def written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Writer(gguf.GGUFWriter):
    """Leaves keys out, and takes the later of two values."""

    def __init__(self, path: Path, arch: str, without: tuple[str, ...]) -> None:
        self.without = without
        super().__init__(path, arch)

    def add_key_value(self, key: str, *rest: Any, **more: Any) -> None:
        self.kv_data[0].pop(key, None)
        if key not in self.without:
            super().add_key_value(key, *rest, **more)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = source_models.make_tokenizer(start=False)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(
        [TokenType.CONTROL if number < 3 else TokenType.NORMAL for number in range(len(words))]
    )
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(source_models.TEMPLATE)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """`rope_freqs.weight` by the rule of llama.cpp's converter."""
    factors = []
    old = rope["original_max_position_embeddings"]
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < old / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (old / wavelength - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def stretch(writer: gguf.GGUFWriter, factor: float, kind: str | None = "linear") -> None:
    writer.add_rope_scaling_factor(factor)
    if kind is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))


@pytest.fixture(scope="module")
def model() -> Any:
    return source_models.make_model("llama2")


def windowed(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(10)
    writer.add_uint32("gemma3.attention.sliding_window_pattern", 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_the_model_that_was_written(family: str, tmp_path: Path) -> None:
    theirs = source_models.make_model(family, **({"query_pre_attn_scalar": 16} if family == "gemma3" else {}))
    arch = ARCHITECTURES[source_models.FAMILIES[family][0]]
    tensors = tensors_of(theirs, arch)
    if family == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(theirs.config.rope_parameters, theirs.config.head_dim)
    changes: dict[str, Change] = {
        "linear": lambda writer: stretch(writer, 2.0),
        "gemma3": windowed,
        "phi3": lambda writer: writer.add_sliding_window(10),
    }
    change = changes.get(family)
    write_gguf(theirs, tmp_path / "model.gguf", arch, tensors=tensors, change=change)
    ours = import_model(str(tmp_path / "model.gguf"), (2,)).model
    if (name := "model.layers.1.self_attn.k_proj.weight") in theirs.state_dict():
        assert torch.equal(ours.layers[1].attention.k_proj.weight, theirs.state_dict()[name])
    ids = torch.arange(3, 99)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours(ids)
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-4


def test_packed_weights_are_read_near_what_they_were(tmp_path: Path) -> None:
    wide = source_models.make_model("llama2", hidden_size=96)
    checkpoint = import_model(
        str(write_gguf(wide, tmp_path / "model.gguf", kind=GGMLQuantizationType.Q8_0)), (2,)
    )
    reference = wide.state_dict()["model.layers.2.self_attn.k_proj.weight"]
    found = checkpoint.model.state_dict()["layers.2.attention.k_proj.weight"]
    assert (found - reference).abs().max() <= 0.01 * reference.abs().max()
    assert checkpoint.recipe.model.exits == (2, 4)


def readable_types() -> Iterator[GGMLQuantizationType]:
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        except ValueError:  # a type of numpy's own, which is not kept in bytes
            pass
        yield kind


@pytest.mark.parametrize("kind", list(readable_types()), ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes are not always numbers
def test_every_type_of_block_is_what_gguf_makes_of_it(kind: GGMLQuantizationType) -> None:
    rows, (block, size) = 8, gguf.GGML_QUANT_SIZES[kind]
    bytes_ = np.random.default_rng(0).integers(0, 256, (rows, 2 * size), dtype=np.uint8)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    data = bytes_.view(plain[kind]) if kind in plain else bytes_
    expected = gguf.dequantize(data, kind)
    found = PackedTensor("name", kind, (rows, 2 * block), data).floats().numpy()
    np.testing.assert_array_equal(found, expected)
    turned = PackedTensor("name", kind, (rows, 2 * block), data, heads=2).floats().numpy()
    np.testing.assert_array_equal(turned, expected[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_tokens_and_conventions_come_along(model: Any, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_pad_token_id(1)

    checkpoint = import_model(str(write_gguf(model, tmp_path / "model.gguf", change=change)))
    found = checkpoint.text_format
    assert (found.start_id, found.stop_ids, found.chat_template) == (None, (1,), source_models.TEMPLATE)
    expected = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "temperature": 0.5, "top_k": 20}
    assert found.generation == expected
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    text = "And the king went up to the city"
    assert checkpoint.tokenizer.encode(text).ids == source_models.make_tokenizer(start=False).encode(text).ids
    assert checkpoint.tokenizer.encode("a<|eot|>b").ids[1] == 2


@pytest.mark.parametrize(
    ("change", "stops"),
    [
        (lambda writer: writer.add_eot_token_id(2), (1, 2)),
        (lambda writer: writer.add_uint32("tokenizer.ggml.eom_token_id", 2), (1, 2)),
        (lambda writer: rename(writer, 7, "<|eot_id|>"), (1, 7)),
    ],
    ids=["eot", "eom", "by its text"],
)
def test_every_token_that_ends_a_turn_is_a_stop(
    model: Any, tmp_path: Path, change: Change, stops: tuple[int, ...]
) -> None:
    checkpoint = import_model(str(write_gguf(model, tmp_path / "model.gguf", change=change)))
    assert checkpoint.text_format.stop_ids == stops
    assert checkpoint.tokenizer.encode(checkpoint.tokenizer.id_to_token(stops[-1])).ids == [stops[-1]]


def rename(writer: gguf.GGUFWriter, number: int, text: str) -> None:
    words = list(writer.kv_data[0]["tokenizer.ggml.tokens"].value)
    words[number] = text
    writer.add_token_list(words)


@pytest.mark.parametrize(("said", "start"), [(None, 0), (True, 0), (False, None)])
def test_a_start_token_is_the_files_word_or_its_kinds_habit(
    model: Any, tmp_path: Path, said: bool | None, start: int | None
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_pre("llama-bpe")
        if said is not None:
            writer.add_add_bos_token(said)

    assert (
        import_model(str(write_gguf(model, tmp_path / "m.gguf", change=change))).text_format.start_id == start
    )


def test_what_was_used_is_listed(model: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    write_gguf(model, tmp_path / "model.gguf", change=lambda writer: writer.add_name("a name"))
    import_model(str(tmp_path / "model.gguf"), report=lines.append)
    tensors, used, rest = lines
    assert tensors == "tensors used: all 39 (39 F32)"
    assert used.startswith("metadata used: general.architecture, llama.context_length")
    assert rest == "metadata that changes nothing here: general.name"


def less(model: Any, *names: str, **more: np.ndarray) -> dict[str, np.ndarray]:
    kept = {name: value for name, value in tensors_of(model, "llama").items() if name not in names}
    return {**kept, **more}


REFUSED: dict[str, tuple[str, Change]] = {
    "experts": (r"llama.expert_count = 4, expected 0", lambda writer: writer.add_expert_count(4)),
    "unknown key": (
        r"llama.new_trick = '3' is not known here",
        lambda writer: writer.add_uint32("llama.new_trick", 3),
    ),
    "unknown tokenizer key": (
        r"tokenizer.ggml.odd = 'x' is not known",
        lambda writer: writer.add_string("tokenizer.ggml.odd", "x"),
    ),
    "yarn": (r"rope.scaling.type = 'yarn' cannot be imported", lambda writer: stretch(writer, 4.0, "yarn")),
    "partial": (
        r"rope.dimension_count = 4, expected the width of a head, 8",
        lambda writer: writer.add_rope_dimension_count(4),
    ),
    "parts": (
        r"one of 3 parts; join them: llama-gguf-split",
        lambda writer: writer.add_uint16("split.count", 3),
    ),
    "adapter": (r"general.type = 'adapter', expected a model", lambda writer: writer.add_type("adapter")),
    "uneven": (
        r"head_count_kv = \[2, 2, 6, 6\]: layers of different",
        lambda writer: writer.add_head_count_kv([2, 2, 6, 6]),
    ),
    "layers": (
        r"block_count = 1000000000, but the file holds 39",
        lambda writer: writer.add_block_count(10**9),
    ),
    "no heads": (r"head_count = 0, expected at least 1", lambda writer: writer.add_head_count(0)),
    "rows": (
        r"vocab_size = 400, but token_embd.weight has 320 rows",
        lambda writer: writer.add_vocab_size(400),
    ),
    "words": (
        r"321 tokens, but token_embd.weight 320 rows",
        lambda writer: writer.add_token_list([str(i) for i in range(321)]),
    ),
    "types": (r"token_type has 2 values for 320 tokens", lambda writer: writer.add_token_types([1, 1])),
    "pre": (
        r"tokenizer.ggml.pre = 'qwen': .*did you mean 'qwen2'",
        lambda writer: writer.add_tokenizer_pre("qwen"),
    ),
    "kind of tokenizer": (
        r"tokenizer.ggml.model = 'bert' cannot",
        lambda writer: writer.add_tokenizer_model("bert"),
    ),
    "twice": (r"the token '<s>' twice", lambda writer: rename(writer, 9, "<s>")),
    "far token": (
        r"eot_token_id = 900, expected a token from 0 to 319",
        lambda writer: writer.add_eot_token_id(900),
    ),
    "end token": (r"add_eos_token is true", lambda writer: writer.add_add_eos_token(True)),
    "merges": (r"merges holds 'ab', expected two", lambda writer: writer.add_token_merges(["ab"])),
    "strange merges": (
        r"the vocabulary cannot be read: ",
        lambda writer: writer.add_token_merges(["qq qqq"]),
    ),
    "kind of value": (
        r"llama.context_length = 'many', expected a whole number",
        lambda w: w.add_string("llama.context_length", "many"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_or_read_otherwise_is_refused(model: Any, tmp_path: Path, case: str) -> None:
    message, change = REFUSED[case]
    path = write_gguf(model, tmp_path / "model.gguf", change=change)
    with pytest.raises(ModelImportError, match=message) as error:
        import_model(str(path))
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tokenizer.ggml.pre", "lacks tokenizer.ggml.pre"),
        ("tokenizer.ggml.token_type", "lacks tokenizer.ggml.token_type"),
        ("llama.attention.layer_norm_rms_epsilon", "lacks llama.attention.layer_norm_rms_epsilon"),
        ("general.architecture", "of the type 'unknown'"),
    ],
)
def test_a_key_that_is_missing_is_named(model: Any, tmp_path: Path, key: str, message: str) -> None:
    path = write_gguf(model, tmp_path / "model.gguf", without=(key,))
    with pytest.raises(ModelImportError, match=message):
        import_model(str(path))


def test_tensors_that_lack_or_are_too_many_are_named(model: Any, tmp_path: Path) -> None:
    one = np.ones((4, 6, 8), np.float32)
    cases = {
        "lacks 1 tensors that the model needs, the first is blk.1.ffn_up.weight": less(
            model, "blk.1.ffn_up.weight"
        ),
        "lacks the tensor token_embd.weight": less(model, "token_embd.weight"),
        "1 tensors .* no place for, the first is blk.0.ffn_gate_exps.weight": less(
            model, **{"blk.0.ffn_gate_exps.weight": one}
        ),
        "no place for, the first is blk.0.attn_q.bias": less(model, **{"blk.0.attn_q.bias": one[0, 0]}),
        "rope_freqs.weight has 8 values, expected 4": less(model, **{"rope_freqs.weight": one[0, 0]}),
        "not Llama 3's, nor linear": less(model, **{"rope_freqs.weight": np.array([1, 9, 2, 5], np.float32)}),
        "attn_k.weight has 6 rows, expected 6 heads of 8": less(model, **{"blk.2.attn_k.weight": one[0]}),
        r"output_norm.weight has the shape|norm.weight has the shape \[8\]": less(
            model, **{"output_norm.weight": one[0, 0]}
        ),
    }
    for number, (message, tensors) in enumerate(cases.items()):
        path = write_gguf(model, tmp_path / f"{number}.gguf", tensors=tensors)
        with pytest.raises(ModelImportError, match=message):
            import_model(str(path))


def test_two_stretches_of_the_rotary_embedding_are_refused(model: Any, tmp_path: Path) -> None:
    tensors = less(
        model,
        **{
            "rope_freqs.weight": llama3_factors(
                {**source_models.ROPE3, "original_max_position_embeddings": 32}, 8
            )
        },
    )
    path = write_gguf(
        model, tmp_path / "model.gguf", tensors=tensors, change=lambda writer: stretch(writer, 2.0, None)
    )
    with pytest.raises(ModelImportError, match=r"both rope_freqs.weight and llama.rope.scaling.factor = 2.0"):
        import_model(str(path))


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("theta", [500.0, 1e4, 5e5])
@pytest.mark.parametrize(
    "settings",
    [(32.0, 1.0, 4.0, 8192.0), (8.0, 1.0, 4.0, 8192.0), (8.0, 1.0, 4.0, 64.0), (3.0, 1.0, 2.5, 500.0)],
)
def test_the_settings_of_llama_3_are_found_in_their_factors(
    settings: tuple[float, ...], theta: float, head_dim: int
) -> None:
    """All that is asked of them is that they say the same of each rotated pair, since POSITIONS shows in some
    pairs only.
    """
    rope = dict(
        zip(
            ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            settings,
            strict=True,
        )
    )
    factors = llama3_factors({**rope, "rope_theta": theta}, head_dim)
    try:
        found = rope_scaling(torch.from_numpy(factors).double(), theta)
    except ModelImportError:
        assert (
            settings[2] != 4.0 or factors.max() < settings[0]
        )  # too few pairs to tell another HIGH, or FACTOR
        return
    if found["rope_type"] == "llama3":
        np.testing.assert_allclose(
            llama3_factors({**found, "rope_theta": theta}, head_dim), factors, rtol=1e-4
        )
    else:
        assert set(factors) == {found.get("factor", 1.0)}
    if head_dim >= 64 and settings[2] == 4.0 and theta > 1e3:
        assert tuple(found[name] for name in rope) == settings


def test_what_cannot_be_read_is_one_clear_line(model: Any, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf")
    write_gguf(model, tmp_path / "other.gguf", arch="mamba")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.gguf").write_bytes(b"no such thing" * 10)
    endless = struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"x", 9, 0, 2**40)
    (tmp_path / "endless.gguf").write_bytes(endless + bytes(8))
    messages = {
        "other": "of the type 'mamba'; expected one of",
        "cut": "can be read",
        "no": "is no GGUF file",
        "gone": "no file at",
        "endless": "an array of 1099511627776 values in the",
    }
    for name, message in messages.items():
        with pytest.raises(ModelImportError, match=message) as error:
            import_model(str(tmp_path / f"{name}.gguf"))
        assert len(str(error.value).splitlines()) == 1


def test_a_type_of_block_that_gguf_cannot_dequantise(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(model, tmp_path / "model.gguf")

    def refuse(*_: Any) -> np.ndarray:
        raise NotImplementedError("Quantization for Q1_X is not yet implemented")

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(
        ModelImportError, match=r"stored as F32, which gguf cannot dequantise: Quantization for Q1_X"
    ):
        import_model(str(tmp_path / "model.gguf"))


def test_a_file_is_described_without_dequantising_it(tmp_path: Path) -> None:
    wide = source_models.make_model("llama2", hidden_size=96)
    file = GGUFFile(write_gguf(wide, tmp_path / "model.gguf", kind=GGMLQuantizationType.Q4_0))
    tensor = file.tensors["layers.0.attention.q_proj.weight"]
    assert (tensor.name, tensor.kind.name, tensor.shape) == ("blk.0.attn_q.weight", "Q4_0", (96, 96))
    assert (tensor.data.shape, tensor.heads) == ((96, 3 * 18), 6)
    assert file.config["num_hidden_layers"] == 4
