"""A loss and a method of the user's own, named in a recipe: those of
docs/contributing/method.md, as they stand there.
"""

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from ease_common.errors import ConfigError, SettingWarning
from ease_train.methods.losses import exit_losses
from ease_train.training.checkpoint import load_checkpoint
from ease_train.training.config import Recipe
from ease_train.training.trainer import EvalEvent, StepEvent, Trainer

Maker = Callable[..., Recipe]
PAGE = Path(__file__).parents[2] / "docs" / "contributing" / "method.md"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that holds the page's example."""
    name = f"mine_{tmp_path.name}"
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def page_recipe(make_recipe: Maker, mine: str) -> Recipe:
    """The tiny recipe with the page's own tables."""
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return make_recipe(method=tomllib.loads(text.replace('"mine:', f'"{mine}:'))["method"])


def test_a_method_and_a_loss_of_ones_own_train(
    make_recipe: Maker, small_corpus: str, tmp_path: Path, mine: str
) -> None:
    recipe = page_recipe(make_recipe, mine)
    trainer = Trainer.begin(recipe, small_corpus)
    events = list(trainer.fit(tmp_path / "c"))
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [set(event.exit_losses) for event in steps] == [{2, 3, 4}, {4}] * 6
    weights = recipe.train.layer_weights
    for event in steps:
        layers = event.exit_losses
        assert event.loss == pytest.approx(
            sum(weights[layer] * loss for layer, loss in layers.items()), rel=1e-5
        )
    assert [event.perplexity[4] for event in events if isinstance(event, EvalEvent)][-1] > 1
    assert load_checkpoint(tmp_path / "c").recipe.method == recipe.method
    assert list(Trainer.resume(tmp_path / "c").fit(tmp_path / "c")) == []


def test_a_loss_of_ones_own_is_what_is_minimised(make_recipe: Maker, small_corpus: str, mine: str) -> None:
    own = Trainer.begin(page_recipe(make_recipe, mine), small_corpus)
    model = own.model
    batch = own.next_batch()
    ids = own._ask(lambda _, inputs, targets: (inputs, targets), batch)
    plain = exit_losses(model, *ids)
    smoothed = own.train_step(batch).exit_losses
    rows = math.log(
        own.recipe.model.vocab_size
    )  # an untrained model is near uniform, where smoothing changes little
    assert smoothed.keys() == plain.keys()
    assert all(0 < abs(smoothed[layer] - plain[layer]) < 0.1 * rows for layer in plain)


def test_settings_of_ones_own(make_recipe: Maker, mine: str, small_corpus: str) -> None:
    """The command line sets one and leaves the others; the loss sees it."""
    recipe = page_recipe(make_recipe, mine)
    changed = recipe.with_options({"own": {"smoothing": 0.5}})
    assert changed.method.own == {"every": 2.0, "smoothing": 0.5}
    found = []
    for one in (recipe, changed):
        trainer = Trainer.begin(one, small_corpus)
        found.append(trainer.train_step(trainer.next_batch()).loss)
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match=r"own = 'much' is not of the type float"):
        make_recipe(method={"loss": f"{mine}:loss", "own": {"smoothing": "much"}})
    with pytest.warns(
        SettingWarning, match="method: own sets smoothing, which has no effect without objective"
    ):
        make_recipe(method={"own": {"smoothing": 0.5}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss", "method: loss 'loss' cannot be loaded (ModuleNotFoundError: No module named 'loss')"),
        (
            "nowhere:loss",
            "method: loss 'nowhere:loss' cannot be loaded (ModuleNotFoundError: No module named 'nowhere')",
        ),
        ("math:pi", "method: loss 'math:pi' is float, expected a function"),
        (
            "math:los",
            "method: loss 'math:los' cannot be loaded (AttributeError: module 'math' has no attribute 'los')",
        ),
    ],
)
def test_a_name_that_leads_nowhere(make_recipe: Maker, small_corpus: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer.begin(make_recipe(method={"loss": name}), small_corpus)
    assert str(error.value).removesuffix("; give MODULE:NAME, with MODULE.py in this directory") == message
