"""Train a small model with exits on a text, and export it: python examples/train_and_export.py TEXT OUT"""

import sys
from dataclasses import replace
from pathlib import Path

from ease_export.build import export_bundle
from ease_train.training.config import load_recipe
from ease_train.training.trainer import EvalEvent, Trainer


def main(text: str, out: Path, steps: int) -> None:
    recipe = load_recipe("demo")
    model = replace(
        recipe.model, dim=64, num_layers=4, num_heads=2, num_kv_heads=1, exits=(2, 4), max_positions=128
    )
    train = replace(
        recipe.train,
        layer_weights={2: 0.3, 4: 1.0},
        steps=steps,
        sequence_length=64,
        warmup_steps=min(20, steps // 2),
        eval_every=max(1, steps // 2),
    )
    tokenizer = replace(recipe.tokenizer, bpe_vocab_size=400)
    trainer = Trainer.begin(replace(recipe, model=model, train=train, tokenizer=tokenizer), text)
    for event in trainer.fit(out / "checkpoint"):
        if isinstance(event, EvalEvent):
            perplexities = ", ".join(
                f"layer {layer} {value:.1f}" for layer, value in event.perplexity.items()
            )
            print(f"step {event.step}: perplexity {perplexities}")
    manifest = export_bundle(out / "checkpoint", out / "bundle")
    print(f"{out / 'bundle'}: {len(manifest.segments)} segments, exits after {manifest.exit_layers}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200)
