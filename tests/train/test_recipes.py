"""Every recipe, at a size for tests: it trains, its loss falls, its checkpoint can be read and its exits
evaluated.
"""

from pathlib import Path

import pytest

from ease_common.errors import ConfigError
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import load_recipe, recipe_names
from ease_train.training.trainer import EvalEvent, StepEvent, Trainer, objective_at

TINY = {
    "dim": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "ffn_dim": 32,
    "max_positions": 32,
    "kind": "char",
    "steps": 12,
    "batch_size": 4,
    "sequence_length": 16,
    "warmup_steps": 2,
    "learning_rate": 0.02,
    "eval_every": 12,
    "eval_tokens": 64,
    "save_every": 12,
}


TUNING = {"ee-tuning", "kangaroo", "kangaroo-reduced-head", "layerskip-tuning"}


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - TUNING))  # those: test_tune.py, test_states.py
def test_a_recipe_trains(name: str, small_corpus: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    warmups = {
        "exit_warmup_steps": recipe.method.exit_warmup.steps,
        "routing_warmup_steps": recipe.method.routing.warmup_steps,
    }
    shorter = {name: 3 for name, steps in warmups.items() if steps}
    recipe = recipe.with_options({**TINY, **shorter})
    events = list(Trainer.begin(recipe, small_corpus).fit(tmp_path / "c"))
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert all(set(event.exit_losses) <= set(recipe.model.exits) for event in steps)
    last = recipe.model.num_layers
    assert steps[-1].exit_losses[last] < steps[0].exit_losses[last]
    perplexity = next(event for event in events if isinstance(event, EvalEvent)).perplexity
    assert set(perplexity) == set(recipe.model.exits)
    assert all(1 < value < 100 for value in perplexity.values())
    assert load_checkpoint(tmp_path / "c").recipe == Trainer.resume(tmp_path / "c").recipe


def weights(name: str, step: int) -> dict[int, float]:
    return dict(objective_at(step, load_recipe(name)).weights)


def test_the_recipes_ask_for_what_their_papers_do() -> None:
    assert weights("deep-supervision", 0) == pytest.approx({3: 0.25, 6: 0.25, 9: 0.25, 12: 0.25})
    assert weights("calm", 0) == pytest.approx({layer: layer / 42 for layer in (2, 4, 6, 8, 10, 12)})
    assert weights("alpha-curriculum", 0) == pytest.approx({4: 0.9, 12: 0.1})
    assert weights("alpha-curriculum", 2599) == pytest.approx({4: 0.3, 12: 0.7})
    assert weights("ee-llm", 0) == {12: 1.0}
    assert weights("ee-llm", 325) == pytest.approx({3: 0.05, 6: 0.1, 12: 1.0})
    assert weights("layerskip-gradual", 0) == {12: 1.0}
    assert set(weights("layerskip-gradual", 2599)) == set(range(2, 13))
    early = [set(weights("layerskip", step)) - {12} for step in range(10)]
    assert early == [{layer} for layer in range(2, 12)]
    assert objective_at(0, load_recipe("token-routed")).routing_threshold == 0.0
    assert objective_at(650, load_recipe("token-routed")).routing_threshold == 0.7
    assert objective_at(0, load_recipe("self-distillation")).distill.on
    assert objective_at(2599, load_recipe("layerskip")).drop[-1] == pytest.approx(0.1)
    assert objective_at(0, load_recipe("equilibrium")).gradient == "equilibrium"


def test_methods_differ_from_small_in_nothing_else() -> None:
    small = load_recipe("small")
    for name in set(recipe_names()) - {"demo", "small", "standard", *TUNING}:
        recipe = load_recipe(name)
        assert (recipe.model.dim, recipe.model.num_layers, recipe.tokenizer) == (
            small.model.dim,
            small.model.num_layers,
            small.tokenizer,
        )
        assert (
            recipe.train.__class__(**{**vars(recipe.train), "layer_weights": small.train.layer_weights})
            == small.train
        ), name


def test_a_recipe_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'extends = "{tmp_path}/b.toml"\n[train]\nsteps = 7\n', encoding="utf-8")
    (tmp_path / "b.toml").write_text(
        'extends = "small"\npaper = "p"\n[train]\nsteps = 8\nseed = 3\n', encoding="utf-8"
    )
    recipe = load_recipe(str(tmp_path / "a.toml"))
    assert (recipe.name, recipe.paper, recipe.train.steps, recipe.train.seed) == ("a", "p", 7, 3)
    assert recipe.model == load_recipe("small").model
    (tmp_path / "b.toml").write_text(f'extends = "{tmp_path}/a.toml"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="goes in a circle"):
        load_recipe(str(tmp_path / "a.toml"))
