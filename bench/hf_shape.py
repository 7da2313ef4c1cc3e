"""A Hugging Face directory of a Llama's shape: random weights in bf16, written tensor by tensor in shards.

    python bench/hf_shape.py runs/scale/1b --shape 1b
    python bench/hf_shape.py runs/scale/8b --shape 8b

1b: Llama-3.2-1B, 2.5 GB; 8b: Llama-3.1-8B, 16 GB, of which --layers N takes some. Each matrix is of other
numbers; they are multiples of 2**-10 up to 1/8, so that the making takes no longer than the writing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ease_train.data.tokens import train_tokenizer
from ease_train.training.config import TokenizerConfig
from ease_train.training.tensors import Tensors, write_tensors

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
LAYERS_A_SHARD = 8


def shapes_of(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each shard."""
    dim, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    outer = {"model.embed_tokens.weight": (words, dim), "model.norm.weight": (dim,)}
    yield outer if config["tie_word_embeddings"] else {**outer, "lm_head.weight": (words, dim)}
    of_a_layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (inner, dim),
        "mlp.up_proj": (inner, dim),
        "mlp.down_proj": (dim, inner),
    }
    layers = range(config["num_hidden_layers"])
    for first in layers[::LAYERS_A_SHARD]:
        yield {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in layers[first : first + LAYERS_A_SHARD]
            for name, shape in of_a_layer.items()
        }


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Ones for a norm, and else numbers of the name's own."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    dice = torch.Generator().manual_seed(sum(name.encode()) + len(name))
    made = torch.empty(shape, dtype=torch.bfloat16)
    for rows in made.split(1024):
        rows.copy_(torch.randint(-128, 128, rows.shape, generator=dice, dtype=torch.int8)).mul_(2.0**-10)
    return made


def small_tokenizer() -> Tokenizer:
    """One of 300 words; which words there are changes no time."""
    return train_tokenizer(["the weights are random " * 50], TokenizerConfig(kind="bpe", bpe_vocab_size=300))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the shape has.")
def main(folder: Path, shape: str, layers: int | None) -> None:
    """Write FOLDER."""
    config = {**SHARED, **SHAPES[shape]}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    folder.mkdir(parents=True)
    shards = list(shapes_of(config))
    places = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        described = {name: (torch.bfloat16, size) for name, size in shapes.items()}
        made = Tensors(described, lambda name, shapes=shapes: random_tensor(name, shapes[name]))  # type: ignore[misc]
        write_tensors(folder / file, made, {"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": places}  # transformers wants both
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    click.echo(folder)


if __name__ == "__main__":
    main()
