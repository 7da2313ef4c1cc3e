"""GGUF files: written here with llama.cpp's own library, read back as the model they were made of."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize

import foreign_models
from ease_train.errors import ForeignError
from ease_train.huggingface import import_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[inner]}.weight"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp keeps a rotated pair side by side."""
    pairs = weight.reshape(num_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(weight.shape))


def write_gguf(model: Any, path: Path, arch: str = "llama", kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        theirs, array = gguf_name(name), value.numpy()
        if (part := theirs.split(".")[-2]) in heads:
            array = interleaved(array, heads[part])
        if kind != gguf.GGMLQuantizationType.F32 and array.ndim == 2:
            writer.add_tensor(theirs, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = foreign_models.make_tokenizer(start=False)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if number < 3 else gguf.TokenType.NORMAL for number in range(len(words))])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(foreign_models.TEMPLATE)


@pytest.fixture(scope="module")
def model() -> Any:
    return foreign_models.make_model("llama2")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0])
def test_a_gguf_file_is_the_model_it_was_made_of(model: Any, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    wide = (
        foreign_models.make_model("smollm2")
        if kind == gguf.GGMLQuantizationType.F32
        else foreign_models.make_model("llama2", hidden_size=96)
    )
    write_gguf(wide, tmp_path / "model.gguf", kind=kind)
    checkpoint = import_model(str(tmp_path / "model.gguf"), (2,))
    ours = checkpoint.model.state_dict()
    tolerance = 0.0 if kind == gguf.GGMLQuantizationType.F32 else 0.01
    for name, theirs in {
        "embed.weight": "model.embed_tokens.weight",
        "layers.2.attention.k_proj.weight": "model.layers.2.self_attn.k_proj.weight",
    }.items():
        reference = wide.state_dict()[theirs]
        assert (ours[name] - reference).abs().max() <= tolerance * reference.abs().max()
    assert (checkpoint.recipe.model.exits, checkpoint.recipe.model.num_kv_heads) == ((2, 4), wide.config.num_key_value_heads)
    found = checkpoint.conventions
    assert (found.start_id, found.stop_ids, found.chat_template) == (None, (1,), foreign_models.TEMPLATE)
    text = "And the king went up to the city"
    assert checkpoint.tokenizer.encode(text).ids == foreign_models.make_tokenizer(start=False).encode(text).ids


def test_what_cannot_be_read_is_one_clear_line(model: Any, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf")
    write_gguf(model, tmp_path / "other.gguf", arch="mamba")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.gguf").write_bytes(b"no such thing" * 10)
    messages = {"other": "of the type 'mamba'; expected one of", "cut": "can be read", "no": "is no GGUF file", "gone": "no file at"}
    for name, message in messages.items():
        with pytest.raises(ForeignError, match=message) as error:
            import_model(str(tmp_path / f"{name}.gguf"))
        assert len(str(error.value).splitlines()) == 1


def test_a_type_of_block_that_gguf_cannot_dequantise(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(model, tmp_path / "model.gguf")

    def refuse(*_: Any) -> np.ndarray:
        raise NotImplementedError("Quantization for Q1_X is not yet implemented")

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(ForeignError, match=r"cannot be read by transformers: Quantization for Q1_X"):
        import_model(str(tmp_path / "model.gguf"))


def test_what_is_read_computes_the_same(model: Any, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, import_model(str(tmp_path / "model.gguf")).model(ids)
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-4
