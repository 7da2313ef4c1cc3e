"""Every schedule against its formula, worked out by hand or written another way."""

import math
import re
from collections.abc import Callable

import pytest

from ease_common.errors import ConfigError, SettingWarning
from ease_train.methods.schedules import AlphaSchedule, drop_rates, exit_weights
from ease_train.training.config import Recipe
from ease_train.training.trainer import objective_at

Maker = Callable[..., Recipe]
ALL = {"model": {"num_layers": 8, "exits": list(range(1, 9))}}


def weights_over(recipe: Recipe, steps: range) -> list[dict[int, float]]:
    return [exit_weights(step, recipe) for step in steps]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.9, 0.9, 0.9, 0.9, 0.9]),
        ("linear", [0.9, 0.75, 0.6, 0.45, 0.3]),
        ("cosine", [0.9, 0.6 + 0.3 * math.sqrt(0.5), 0.6, 0.6 - 0.3 * math.sqrt(0.5), 0.3]),
        ("step", [0.9, 0.7, 0.7, 0.5, 0.3]),
    ],
)
def test_alpha_over_five_epochs(kind: str, expected: list[float]) -> None:
    schedule = AlphaSchedule(kind, start=0.9, end=0.3, steps=[1, 3, 4])
    assert [schedule.get_alpha(epoch, 5) for epoch in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "step"])
def test_alpha_of_a_single_epoch_is_its_start(kind: str) -> None:
    assert AlphaSchedule(kind, start=0.9, end=0.3, steps=[5]).get_alpha(0, 1) == pytest.approx(0.9)


def test_alpha_goes_up_as_well() -> None:
    assert AlphaSchedule("step", start=0.2, end=0.8, steps=[2, 4]).get_alpha(9, 10) == pytest.approx(0.8)
    assert AlphaSchedule("linear", start=0.0, end=1.0).get_alpha(3, 5) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule_type": "cosin"}, "schedule_type = 'cosin'; did you mean 'cosine'?"),
        ({"start": 1.5}, "start = 1.5, expected a number from 0 to 1"),
        ({"schedule_type": "step"}, "without steps"),
    ],
)
def test_a_wrong_alpha_schedule(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        AlphaSchedule(**arguments)
    assert message in str(error.value)


def test_given_weights_are_left_alone(recipe: Recipe) -> None:
    assert exit_weights(0, recipe) == exit_weights(11, recipe) == {2: 0.3, 3: 0.2, 4: 1.0}


def test_alpha_replaces_the_first_and_the_last_weight(make_recipe: Maker) -> None:
    recipe = make_recipe(
        method={"alpha_schedule": "linear", "alpha_start": 0.8, "alpha_end": 0.2}, train={"steps": 4}
    )
    found = weights_over(recipe, range(4))
    assert [w[2] for w in found] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [w[4] for w in found] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [w[3] for w in found] == [0.2] * 4


def test_depth_weights_are_calms(make_recipe: Maker) -> None:
    recipe = make_recipe(model={"exits": [1, 2, 4]}, method={"weight_rule": "depth"})
    assert exit_weights(0, recipe) == pytest.approx({1: 1 / 7, 2: 2 / 7, 4: 4 / 7})


def test_uniform_weights(make_recipe: Maker) -> None:
    assert exit_weights(0, make_recipe(method={"weight_rule": "uniform"})) == pytest.approx(
        {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}
    )


def test_layerskip_weights_are_sums_of_layer_numbers(make_recipe: Maker) -> None:
    with pytest.warns(SettingWarning, match="the exit after layer 1 the weight 0; it is not trained"):
        recipe = make_recipe(
            **ALL, method={"weight_rule": "layerskip", "exit_scale": 0.2, "normalize_weights": True}
        )
    layers = 8
    raw = {l + 1: 0.2 * sum(range(l + 1)) for l in range(layers - 1)}  # noqa: E741 - the paper's letter
    raw[layers] = (layers - 1) + 0.2 * sum(range(layers - 1))
    total = sum(raw.values())
    assert exit_weights(0, recipe) == pytest.approx(
        {layer: weight / total for layer, weight in raw.items() if weight}
    )


def test_a_rotational_curriculum_turns_through_all_exits(make_recipe: Maker) -> None:
    recipe = make_recipe(
        **ALL, method={"weight_rule": "uniform", "curriculum": "rotational", "rotate_every": 4}
    )
    enabled = [set(weights) for weights in weights_over(recipe, range(8))]
    assert enabled[0] == {1, 5, 8}
    assert enabled[1] == {2, 6, 8}
    assert enabled[3] == {4, 8}
    assert enabled[4:] == enabled[:4]
    assert set().union(*enabled) == set(range(1, 9))


def test_a_gradual_curriculum_goes_from_the_last_exit_to_the_first(make_recipe: Maker) -> None:
    recipe = make_recipe(
        **ALL, method={"weight_rule": "uniform", "curriculum": "gradual"}, train={"steps": 160}
    )
    counts = [len(weights) for weights in weights_over(recipe, range(160))]
    assert counts == [
        min(8, 1 + step // 10) for step in range(160)
    ]  # one more every T/(2L) = 10 steps, all of them by half
    assert set(exit_weights(25, recipe)) == {8, 7, 6}


@pytest.mark.parametrize(("kind", "halfway"), [("linear", 0.5), ("cosine", 0.5)])
def test_exit_warm_up_reaches_the_weight(make_recipe: Maker, kind: str, halfway: float) -> None:
    recipe = make_recipe(method={"exit_warmup": kind, "exit_warmup_steps": 8, "exit_warmup_from": 0.1})
    assert exit_weights(0, recipe)[2] == pytest.approx(0.1)
    assert exit_weights(4, recipe)[2] == pytest.approx(0.1 + halfway * 0.2)
    assert exit_weights(8, recipe) == exit_weights(11, recipe) == {2: 0.3, 3: 0.2, 4: 1.0}
    quarter = {"linear": 0.25, "cosine": (1 - math.sqrt(0.5)) / 2}[kind]
    assert exit_weights(2, recipe)[3] == pytest.approx(0.1 + quarter * 0.1)
    assert all(weights[4] == 1.0 for weights in weights_over(recipe, range(12)))


def test_warm_up_from_nothing_leaves_the_exits_out_at_first(make_recipe: Maker) -> None:
    recipe = make_recipe(method={"exit_warmup": "linear", "exit_warmup_steps": 8})
    assert exit_weights(0, recipe) == {4: 1.0}


def test_normalised_weights_sum_to_one(make_recipe: Maker) -> None:
    assert exit_weights(0, make_recipe(method={"normalize_weights": True})) == pytest.approx(
        {2: 0.2, 3: 0.2 / 1.5, 4: 1 / 1.5}
    )


def test_layer_dropout_grows_with_depth_and_time(make_recipe: Maker) -> None:
    method = {"layer_dropout": 0.2, "layer_dropout_time": "exponential"}
    recipe = make_recipe(**ALL, method=method, train={"steps": 101})
    depth = [math.exp(layer * math.log(2) / 7) - 1 for layer in range(8)]
    for step in (0, 50, 100):
        time = math.exp(step * math.log(2) / 100) - 1
        assert drop_rates(step, recipe) == pytest.approx([0.2 * d * time for d in depth])
    constant = make_recipe(**ALL, method={"layer_dropout": 0.2})
    assert drop_rates(0, constant)[0] == 0.0
    assert drop_rates(0, constant)[-1] == pytest.approx(0.2)
    assert drop_rates(0, make_recipe()) == ()


def test_tokens_are_routed_after_the_warm_up(make_recipe: Maker) -> None:
    recipe = make_recipe(method={"routing_threshold": 0.6, "routing_warmup_steps": 5})
    assert [objective_at(step, recipe).routing_threshold for step in (0, 4, 5, 11)] == [0.0, 0.0, 0.6, 0.6]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"weight_rule": "dept"}, "method.weight: rule = 'dept'; did you mean 'depth'?"),
        ({"curriculum": "rotate"}, "method.curriculum: kind = 'rotate'; did you mean 'rotational'?"),
        ({"layer_dropout": 2.0}, "method.layer_dropout: rate = 2.0, expected a number from 0 to 1"),
        ({"distill_weight": -1.0}, "method.distill: weight = -1.0, expected at least 0"),
        ({"distill_temperature": 0.0}, "method.distill: temperature = 0.0, expected more than 0"),
        ({"rotate_every": 0}, "method.curriculum: every = 0, expected at least 1"),
        ({"layer_lr_scales": {2: -1.0}}, "layer_lr_scales = {2: -1.0}, expected at least 0"),
        ({"layer_lr_scales": {7: 1.0}}, "layer_lr_scales names [7], expected layers from 1 to 4"),
        ({"alpha_schedule": "linear", "weight_rule": "depth"}, "both set the exit weights; leave one out"),
        (
            {"alpha_schedule": "linear", "exit_warmup": "linear", "exit_warmup_steps": 3},
            "both move the early exits' weights; leave one out",
        ),
        ({"alpha_schedule": "step"}, "method.alpha: schedule = 'step' without steps"),
        ({"exit_warmup": "linear"}, "method.exit_warmup: steps = 0, expected at least 1"),
        (
            {"routing_threshold": 0.5, "curriculum": "gradual"},
            "both choose the exits to train; leave one out",
        ),
        ({"routing_threshold": 0.5, "distill_weight": 1.0}, "nothing to distil from; leave one out"),
    ],
)
def test_wrong_and_contradictory_methods(make_recipe: Maker, method: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_recipe(method=method)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"rotate_every": 3}, "method.curriculum: every = 3 has no effect without kind"),
        ({"distill_temperature": 3.0}, "method.distill: temperature = 3.0 has no effect without weight"),
        ({"alpha_end": 0.2}, "method.alpha: end = 0.2 has no effect without schedule"),
        ({"routing_warmup_steps": 3}, "method.routing: warmup_steps = 3 has no effect without threshold"),
    ],
)
def test_a_setting_without_effect_warns(make_recipe: Maker, method: dict[str, object], message: str) -> None:
    with pytest.warns(SettingWarning, match=re.escape(message)):
        make_recipe(method=method)


@pytest.mark.parametrize(
    "method",
    [
        {"curriculum": "gradual"},
        {"distill_weight": 1.0},
        {"exit_gradient": "detached"},
        {"routing_threshold": 0.5},
    ],
)
def test_what_needs_an_early_exit_says_so(make_recipe: Maker, method: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"needs an early exit; exits = \[4\]"):
        make_recipe(model={"exits": [4]}, train={"layer_weights": {4: 1.0}}, method=method)
