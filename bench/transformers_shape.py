"""What transformers takes for the shapes of llama_shape.py on a GPU: random weights, fp16, greedy, eager.

    python bench/transformers_shape.py --shape 1b --json transformers-1b.json

Tokens a second of decoding: the time of PROMPT + NEW tokens less that of PROMPT + 1, medians of rounds.
"""

import json
import statistics
import time
from pathlib import Path

import click
import torch
from engine import NEW, PROMPT, ROUNDS
from llama_shape import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM


def model_of(shape: str, device: str) -> LlamaForCausalLM:
    """A Llama of this shape with random weights."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["ffn_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.half().eval()  # type: ignore[no-any-return]


def seconds(model: LlamaForCausalLM, num_rows: int, new: int) -> float:
    """One generation of `new` tokens a row, to the last one on the host."""
    ids = torch.randint(0, model.config.vocab_size, (num_rows, PROMPT), device=model.device)
    began = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
    ).cpu()
    return time.perf_counter() - began


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="135m", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(shape: str, device: str, json_file: Path | None) -> None:
    """Measure greedy decoding at 1, 8 and 32 rows."""
    model = model_of(shape, device)
    seconds(model, 1, 2)
    rows = []
    for num_rows in (1, 8, 32):
        each = [seconds(model, num_rows, NEW) - seconds(model, num_rows, 1) for _ in range(ROUNDS)]
        speed = num_rows * (NEW - 1) / statistics.median(each)
        rows.append({"rows": num_rows, "tokens_per_second": speed})
        click.echo(f"{shape}, {num_rows} rows: {speed:.0f} tokens/s")
    if json_file:
        json_file.write_text(json.dumps({"shape": shape, "device": device, "scaling": rows}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
