"""Every recipe the whole way, at a third of its depth: a few steps, export, verify against torch, generate,
score under a policy.
"""

from pathlib import Path

import pytest

from ease_eval.measure.perplexity import score_documents
from ease_export.build import export_bundle
from ease_export.verify import TOLERANCE, verify_bundle
from ease_runtime.llm import LLM, Options
from ease_runtime.policies import FULL_DEPTH
from ease_train.training.config import Recipe, load_recipe, recipe_names
from ease_train.training.trainer import Trainer

TINY = {"dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 32, "max_positions": 48, "kind": "char"}
TINY |= {
    "steps": 4,
    "batch_size": 4,
    "sequence_length": 16,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_tokens": 64,
    "save_every": 4,
}
IN_FAST_SUITE = {"deed", "token-routed"}  # exporting all takes minutes
NAMES = sorted(set(recipe_names()) - {"ee-tuning"})  # that one tunes a model that is there


def shallower(recipe: Recipe) -> Recipe:
    """The method on fewer layers, for fewer graphs: layer l becomes max(2, ceil(l / 3))."""
    values = recipe.to_dict()

    def new(layer: int | str) -> int:
        return max(2, -(-int(layer) // 3))

    model = values["model"]
    train = values["train"]
    method = values["method"]
    model |= {name: sorted({new(layer) for layer in model[name]}) for name in ("exits", "routed_layers")}
    model["num_layers"] = new(model["num_layers"])
    train["layer_weights"] = {new(layer): weight for layer, weight in train["layer_weights"].items()}
    method["layer_lr_scales"] = {new(layer): scale for layer, scale in method["layer_lr_scales"].items()}
    return Recipe.from_dict(values, recipe.name)


@pytest.mark.parametrize(
    "name", [n if n in IN_FAST_SUITE else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_recipe_trains_exports_runs_and_is_scored(name: str, corpus_file: Path, tmp_path: Path) -> None:
    recipe = shallower(load_recipe(name))
    warmups = {
        "exit_warmup_steps": recipe.method.exit_warmup.steps,
        "routing_warmup_steps": recipe.method.routing.warmup_steps,
    }
    shorter = {name: 2 for name, steps in warmups.items() if steps}
    for _ in Trainer.begin(recipe.with_options({**TINY, **shorter}), str(corpus_file)).fit(
        tmp_path / "checkpoint"
    ):
        pass
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    report = verify_bundle(tmp_path / "bundle", tmp_path / "checkpoint", 30)
    assert max(d.relative for d in report.differences) <= TOLERANCE
    assert report.agreed == 30
    llm = LLM(tmp_path / "bundle")
    early = len(llm.stack.exit_layers) - 1
    events = list(llm.generate("And the king", Options(max_tokens=20, threshold=(0.0,) if early else None)))
    assert len(events) == 20 or events[-1].finish_reason == "stop"
    if early:
        assert {e.depth for e in events} == {llm.stack.exit_layers[0]}
    off, chosen = score_documents(
        llm.engine,
        [llm.encode("And the river was with the sea.")],
        [FULL_DEPTH, llm.policy(Options(threshold=(0.05,) * early or None))],
        "recompute",
    )
    assert 1 < off.perplexity < 100
    assert chosen.mean_depth <= off.mean_depth
