"""Recipes: names, types and values are checked, and a wrong one is named with what was expected."""

import json
import math
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ease_common.errors import ConfigError, SettingWarning
from ease_common.settings import Bounds, Section
from ease_train.methods.method import GateConfig
from ease_train.training.config import (
    OPTIONS,
    SECTIONS,
    ModelConfig,
    Recipe,
    TokenizerConfig,
    load_recipe,
    recipe_names,
)

Maker = Callable[..., Recipe]


def test_every_shipped_recipe_loads_and_names_its_paper() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        assert recipe.paper


def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), "json") == recipe


@pytest.mark.parametrize(
    ("table", "fields", "message"),
    [
        ("model", {"num_layer": 3}, "tiny, [model]: unknown field 'num_layer'; did you mean 'num_layers'?"),
        (
            "train",
            {"learning_rat": 1.0},
            "tiny, [train]: unknown field 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ("train", {"steps": "many"}, "tiny, [train]: steps = 'many' is not of the type int"),
        ("train", {"steps": True}, "tiny, [train]: steps = True is not of the type int"),
        (
            "train",
            {"layer_weights": {"two": 1.0}},
            "layer_weights = {'two': 1.0}: invalid literal for int() with base 10: 'two'",
        ),
        ("model", {"exits": [2, "x"]}, "exits = 'x' is not of the type int"),
        ("model", {"tie_embeddings": 1}, "tie_embeddings = 1 is not of the type bool"),
        ("model", {"exits": [2, 9]}, "exits = [2, 9], expected layers from 1 to 4"),
        ("model", {"exits": [0]}, "exits = [0], expected at least 1"),
        ("model", {"dim": 18, "num_heads": 4}, "dim = 18 does not give 4 heads of an even width"),
        ("model", {"num_heads": 4, "num_kv_heads": 3}, "num_heads = 4 is no multiple of num_kv_heads = 3"),
        ("model", {"num_layers": 0}, "num_layers = 0, expected at least 1"),
        ("model", {"routing_rule": "treshold"}, "routing_rule = 'treshold'; did you mean 'threshold'?"),
        ("model", {"exit_norm": "owned"}, "exit_norm = 'owned'; did you mean 'own'?"),
        ("tokenizer", {"kind": "bqe"}, "kind = 'bqe'; did you mean 'bpe'?"),
        ("train", {"steps": 0}, "steps = 0, expected at least 1"),
        (
            "train",
            {"layer_weights": {2: -1.0, 4: 1.0}},
            "layer_weights = {2: -1.0, 4: 1.0}, expected at least 0",
        ),
        ("train", {"layer_weights": {2: 0.0}}, "layer_weights are all 0; nothing would be trained"),
        (
            "train",
            {"layer_weights": {1: 1.0}},
            "layer_weights names layer 1, which is no exit; exits = [2, 3, 4]",
        ),
        ("train", {"sequence_length": 64}, "sequence_length = 64 is more than max_positions = 32"),
    ],
)
def test_wrong_field(make_recipe: Maker, table: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_recipe(**{table: fields})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NUMERIC = {int, float, tuple[int, ...], tuple[float, ...], dict[int, float]}


def numeric_settings() -> list[tuple[type[Section], tuple[str, ...]]]:
    """Every setting of every section, and of those within it, that holds numbers."""
    sections = (*SECTIONS.values(), GateConfig)
    return [
        (section, path) for section in sections for path, _, hint in section.settings() if hint in NUMERIC
    ]


def just_outside(bounds: Bounds, whole: bool) -> list[float]:
    """The nearest numbers that the bounds leave out, and those that none may hold."""
    if whole:
        return [int(bounds.low) - 1, *([int(bounds.high) + 1] if bounds.high != math.inf else [])]
    low = float(bounds.low) if bounds.open_low else math.nextafter(bounds.low, -math.inf)
    high = float(bounds.high) if bounds.open_high else math.nextafter(bounds.high, math.inf)
    return [low, high, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("section", "path"), numeric_settings())
def test_every_number_has_bounds_and_nothing_beyond_them_passes(
    section: type[Section], path: tuple[str, ...]
) -> None:
    field, hint = next((f, hint) for found, f, hint in section.settings() if found == path)
    bounds = field.metadata.get("allowed")
    assert isinstance(bounds, Bounds), f"{section.table}: {'.'.join(path)} has no bounds"
    for number in just_outside(bounds, whole=hint in (int, tuple[int, ...])):
        value = {1: number} if hint == dict[int, float] else number if hint in (int, float) else [number]
        values = {path[-1]: value} if len(path) == 1 else {path[0]: {path[1]: value}}
        with pytest.raises(ConfigError) as error:
            section.from_dict(values, "test")
        assert (
            str(error.value)
            == f"{'.'.join((section.table, *path[:-1]))}: {path[-1]} = {value}, expected {bounds}"
        )


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Bounds(0), "at least 0"),
        (Bounds(0, open_low=True), "more than 0"),
        (Bounds(0, 1), "a number from 0 to 1"),
        (Bounds(0, 1, open_high=True), "at least 0 and less than 1"),
        (Bounds(0, 1, open_low=True), "more than 0 and at most 1"),
    ],
)
def test_bounds_say_what_they_hold(bounds: Bounds, words: str) -> None:
    assert str(bounds) == words
    assert (0 in bounds, 0.5 in bounds) == ("more than" not in words, True)
    assert (1 in bounds, 2 in bounds) == ("less than" not in words, "1" not in words)


def test_bpe_needs_room_for_every_byte() -> None:
    with pytest.raises(ConfigError, match="bpe_vocab_size = 256, expected at least 257"):
        TokenizerConfig(kind="bpe", bpe_vocab_size=256)


def test_the_last_layer_is_always_an_exit() -> None:
    config = ModelConfig(num_layers=7, exits=(5, 2, 5))
    assert config.exits == (2, 5, 7)
    assert config.segments == ((1, 2), (3, 5), (6, 7))


def test_the_gated_unit_is_8_3_of_the_width_in_steps_of_64() -> None:
    assert ModelConfig(dim=256).ffn_dim == 704  # 682.7
    assert ModelConfig(dim=192).ffn_dim == 512  # 512 exactly
    assert ModelConfig(dim=256, ffn_dim=100).ffn_dim == 100


def test_options_replace_fields_of_any_table(recipe: Recipe) -> None:
    changed = recipe.with_options({"dim": 96, "kind": "bpe", "steps": 7})
    assert (changed.model.dim, changed.model.ffn_dim, changed.tokenizer.kind, changed.train.steps) == (
        96,
        256,
        "bpe",
        7,
    )
    assert changed.train.batch_size == recipe.train.batch_size
    with pytest.raises(ConfigError, match="unknown field 'stepz'; did you mean 'steps'"):
        recipe.with_options({"stepz": 7})


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        (resources.files("ease_train") / "recipes" / "demo.toml").read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    assert load_recipe(str(path)).train == load_recipe("demo").train
    assert load_recipe(str(path)).name == "mine"
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [("demmo", "unknown recipe 'demmo'; did you mean 'demo'?"), ("no.toml", "no recipe file at no.toml")],
)
def test_no_such_recipe(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(name)
    assert message in str(error.value)


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'modell'; did you mean 'model'\?"):
        Recipe.from_dict(tomllib.loads("[modell]\ndim = 3\n"), "x")


def test_a_method_with_the_flat_names_of_before_is_the_same(make_recipe: Maker, tmp_path: Path) -> None:
    flat = {"rotate_every": 3, "curriculum": "rotational", "labels": "last-exit", "distill_weight": 0.5}
    tables = {
        "curriculum": {"kind": "rotational", "every": 3},
        "distill": {"labels": "last-exit", "weight": 0.5},
    }
    assert make_recipe(method=flat) == make_recipe(method=tables)
    assert make_recipe().with_options(flat) == make_recipe(method=tables)
    named = {
        "curriculum_every": 3,
        "curriculum_kind": "rotational",
        "distill_labels": "last-exit",
        "distill_weight": 0.5,
    }
    assert make_recipe().with_options(named) == make_recipe(method=tables)
    path = tmp_path / "mine.toml"
    path.write_text('extends = "layerskip"\n[method]\nrotate_every = 4\n', encoding="utf-8")
    method = load_recipe(str(path)).method
    assert (method.curriculum.kind, method.curriculum.every, method.weight.rule) == (
        "rotational",
        4,
        "layerskip",
    )


def test_options_name_one_setting_each() -> None:
    paths = [
        ("_".join(path), (table, *path))
        for table, section in SECTIONS.items()
        for path, _, _ in section.settings()
    ]
    assert len(dict(paths)) == len(paths)
    assert {name: OPTIONS[name] for name, _ in paths} == dict(paths)


def test_fewer_steps_than_the_recipes_warm_up_cut_it() -> None:
    with pytest.warns(SettingWarning, match="--steps 7 cuts the recipe's warm-up of 50 steps to 7"):
        assert load_recipe("demo").with_options({"steps": 7}).train.warmup_steps == 7
    assert load_recipe("demo").with_options({"steps": 70}).train.warmup_steps == 50
