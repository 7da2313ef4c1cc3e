"""Whether leaving early pays: the arithmetic against hand-made prices, and what the engine does with it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ease_runtime.drafters import Drafter, Proposal
from ease_runtime.engine.costs import FIRST_LOOK, SIZES, Costs, RequestCost, timed_sizes
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.layout import Call
from ease_runtime.engine.mock import MockStack
from ease_runtime.engine.probe import measure_costs
from ease_runtime.engine.schedule import near, schedule
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy

LAYERS = (2, 4)


def prices(
    stack: MockStack,
    segments: tuple[float, float],
    per_token: float = 0.0,
    head: float = 0.0,
    slot: float = 0.0,
) -> Costs:
    """Costs of a two-segment stack: so many seconds a pass, and more for each token and slot."""
    sizes = np.array(SIZES, np.float64)
    costs = Costs(stack.layout, {}, {0: slot, 1: slot})
    costs.tables = {("segment", k): seconds + per_token * sizes for k, seconds in enumerate(segments)}
    costs.tables |= {("exit", k): head + 0.0 * sizes for k in range(2)}
    costs.tables |= {
        ("kv", 1): 0.01 + 0.0 * sizes,
        ("gate", 0): 0.02 + 0.0 * sizes,
        ("similarity", 0): 0.03 + 0.0 * sizes,
    }
    return costs


def request_cost(
    costs: Costs, entered: tuple[float, float], catch_up: str = "recompute", policy: str = "max-prob"
) -> RequestCost:
    made = RequestCost(costs, make_policy(policy, [0.5], LAYERS), catch_up)
    made.entered = list(entered)
    return made


def test_seconds_between_and_past_the_sizes_timed() -> None:
    costs = prices(MockStack(LAYERS), (1.0, 2.0), per_token=0.1, slot=0.5)
    assert costs.seconds("segment", 0, 1) == pytest.approx(1.1)
    assert costs.seconds("segment", 0, 3) == pytest.approx(1.3)
    assert costs.seconds("segment", 1, 40) == pytest.approx(6.0)
    assert costs.seconds("segment", 1, 8, 8) == pytest.approx(2.8 + 3.5)
    assert costs.over_slots(0, 3, 512) == pytest.approx(3 * 0.5 * 2)


@pytest.mark.parametrize(
    ("kernel_steps", "sizes"),
    [
        ((), SIZES),
        ((6,), (1, 2, 4, 5, 6, 8, 10, 16)),
        ((6, 17), (1, 2, 4, 5, 6, 8, 10, 16, 17, 32)),
    ],
)
def test_the_price_of_a_token_more_where_kernels_change(
    kernel_steps: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    """From each step on a pass takes one second more, and a token 0.1: no line runs over a step."""
    stack = MockStack(LAYERS)
    stack.kernel_steps = kernel_steps
    assert timed_sizes(kernel_steps) == sizes

    def seconds(num_tokens: int) -> float:
        return 1.0 + 0.1 * num_tokens + sum(num_tokens >= step for step in kernel_steps)

    tables = {("segment", 0): np.array([seconds(size) for size in sizes])}
    costs = Costs(stack.layout, tables, sizes=sizes)
    for num_tokens in range(1, 40):
        assert costs.seconds("segment", 0, num_tokens) == pytest.approx(seconds(num_tokens))


def test_drafts_stop_before_a_step_that_does_not_pay() -> None:
    """A pass of 17 tokens takes four times one of 16: 15 drafts are judged beside the newest token."""
    stack = MockStack(LAYERS)
    sizes = timed_sizes((17,))
    table = np.array([1.0 if size < 17 else 4.0 for size in sizes])
    costs = Costs(stack.layout, {}, sizes=sizes)
    costs.tables = {("segment", 0): 0.01 + 0.0 * table, ("segment", 1): table}
    costs.tables |= {("exit", k): 0.0 * table for k in range(2)}
    cost = request_cost(costs, (32.0, 2.0), "verify")
    cost.drafted, cost.accepted = [1000.0] * 2, [999.0] * 2
    assert cost.draft_length(1) == 15


def test_measured_at_both_sides_of_a_step(tiny_stack: OrtStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_stack, "kernel_steps", (6,))
    costs = measure_costs(tiny_stack)
    assert costs.sizes == timed_sizes((6,))
    assert {len(table) for table in costs.tables.values()} == {len(costs.sizes)}


def test_recompute_by_hand() -> None:
    """One token in four goes deep itself: a pass of four tokens there for every four tokens.

    Of those passes one in four has nothing pending to propagate."""
    costs = prices(MockStack(LAYERS), (1.0, 1.0), per_token=0.1, head=0.2)
    assert request_cost(costs, (4, 1)).early(1) == pytest.approx(1.1 + 0.2 + (1.4 + 0.2) / 4)
    assert request_cost(costs, (4, 1)).full_depth(1) == pytest.approx(1.1 + 1.1 + 0.2)
    assert request_cost(costs, (4, 1), "propagate").early(1) == pytest.approx(
        1.1 + 0.2 + (1.1 + 0.75 * 0.01 + 0.2) / 4
    )
    assert request_cost(costs, (4, 1), policy="gate").early(1) == pytest.approx(
        1.1 + 0.02 + 0.75 * 0.2 + (1.4 + 0.2) / 4
    )


def test_recompute_does_not_pay_once_a_pass_is_bound_by_arithmetic() -> None:
    """Costs proportional to tokens: recompute only adds the heads; propagate saves the deep tokens
    for good.
    """
    costs = prices(MockStack(LAYERS), (0.0, 0.0), per_token=1.0, head=0.1)
    assert not request_cost(costs, (4, 1)).pays(8)
    assert request_cost(costs, (4, 1), "propagate").pays(8)
    weights = prices(MockStack(LAYERS), (1.0, 1.0), head=0.1)
    assert request_cost(weights, (4, 1)).pays(1)
    assert not request_cost(weights, (4, 4)).pays(1)  # nobody leaves, and the head is asked twice


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9, 0.97])
def test_draft_length_is_the_best_of_a_simulation(acceptance: float) -> None:
    """Every token drafted, accepted by a coin: the length chosen gives the most tokens a second among all
    lengths.
    """
    costs = prices(MockStack(LAYERS), (1.0, 1.0), per_token=0.02, head=0.1)
    made = request_cost(costs, (100, 0), "verify")
    made.drafted, made.accepted = [1.0] * 2, [acceptance] * 2
    dice = np.random.default_rng(0)
    speeds = {0: 1.0 / (1.02 + 1.02 + 0.1)}
    for length in range(1, 17):
        runs = np.cumprod(dice.random((20000, length)) < acceptance, axis=1).sum(axis=1) + 1
        seconds = (length + 1) * (1.02 + 0.1) + 1.0 + 0.02 * (length + 1) + 0.1
        speeds[length] = runs.mean() / seconds
    chosen = made.draft_length(1)
    assert speeds[chosen] >= 0.97 * max(speeds.values())
    assert (chosen == 0) == (max(speeds, key=speeds.get) == 0)


def adaptive(stack: MockStack, costs: Costs, num_slots: int = 1) -> Engine:
    engine = Engine(stack, num_slots=num_slots, adapt=True)
    engine.costs = costs
    return engine


def test_leaving_that_does_not_pay_stops_and_says_so() -> None:
    stack = MockStack(LAYERS, max_positions=200, confidence=lambda exit_index, position: float(position % 2))
    for head, stays in ((5.0, True), (0.01, False)):  # a head dearer than the layers it may save
        engine = adaptive(stack, prices(stack, (1.0, 1.0), head=head))
        sequence = engine.start([1], max_new_tokens=100, policy=make_policy("max-prob", [0.5], LAYERS))
        depths = [token.depth for token in engine.generate(sequence)]
        assert bool(sequence.notes) == stays
        assert set(depths[20:]) == ({4} if stays else {2, 4})
        assert set(depths[:10]) == {2, 4}
        if stays:
            assert sequence.notes == [
                "leaving early does not pay here: full depth after 12 tokens (catch-up recompute)"
            ]


def test_verify_that_does_not_pay_turns_itself_off_and_says_so() -> None:
    """Drafts that are right one time in 23 cannot pay; drafts that always are must stay on."""
    stack = MockStack(LAYERS, max_positions=300, confidence=lambda exit_index, position: 1.0)
    engine = adaptive(stack, prices(stack, (1.0, 1.0), head=0.1))
    policy = make_policy("max-prob", [0.5], LAYERS)
    off = list(engine.generate(engine.start([1], max_new_tokens=100)))
    sequence = engine.start([1], max_new_tokens=100, policy=policy, catch_up="verify")
    assert [token.id for token in engine.generate(sequence)] == [token.id for token in off]
    assert len(sequence.notes) == 1
    assert "verify turned itself off" in sequence.notes[0]
    assert sequence.drafts.judged < 40


class AlwaysOne:
    def pick(self, logits: np.ndarray, top_id: int, tokens: list[int], position: int) -> int:
        return 1


def test_verify_that_pays_stays_on_with_longer_drafts() -> None:
    stack = MockStack(LAYERS, max_positions=300, confidence=lambda exit_index, position: 1.0)
    engine = adaptive(stack, prices(stack, (1.0, 3.0), head=0.1))
    policy = make_policy("max-prob", [0.5], LAYERS)
    sequence = engine.start([1], max_new_tokens=200, policy=policy, catch_up="verify", sampler=AlwaysOne())
    list(engine.generate(sequence))
    assert sequence.notes == []
    assert sequence.drafts.accepted == sequence.drafts.judged > 150
    assert sequence.drafts.length == 16


LAYERS_3 = (2, 3, 6)


def by_layers(stack: MockStack) -> Costs:
    """Costs that count layers, whatever a pass has of tokens, and nothing else."""
    flat = np.ones(len(SIZES))
    costs = Costs(stack.layout, {})
    costs.tables = {("segment", k): shape.num_layers * flat for k, shape in enumerate(stack.layout)}
    costs.tables |= {("exit", k): 0.0 * flat for k in range(len(stack.layout))}
    return costs


@pytest.mark.parametrize(
    ("accepted", "stays"),
    [((0.9, 0.92), 0), ((0.6, 0.7), 0), ((0.6, 0.9), 1), ((0.3, 0.95), 1)],
)
def test_the_exit_that_drafts_is_that_of_del_s_rule(accepted: tuple[float, float], stays: int) -> None:
    """All tokens leave at the first of two exits: it is given up where the other one has more tokens a layer,
    (1 - a^(d+1)) / (1 - a) / (d l + L).
    """
    stack = MockStack(LAYERS_3)
    made = RequestCost(by_layers(stack), make_policy("max-prob", [0.5], LAYERS_3), "verify")
    made.entered = [1000.0, 0.0, 0.0]
    made.drafted, made.accepted = [1.0] * 3, [*accepted, 1.0]
    tokens_a_layer = [
        max((1 - a ** (d + 1)) / (1 - a) / (d * layer + 6) for d in range(1, 17))
        for a, layer in zip(accepted, LAYERS_3, strict=False)
    ]
    assert max(range(2), key=tokens_a_layer.__getitem__) == stays
    assert made.give_up_exit(1) == (0 if stays else None)
    assert made.give_up_exit(1) is None
    assert [made.costs.asks(k, made.policy) for k in range(2)] == [not stays, True]


class RightAtTheSecondExit:
    """Full depth says 1, as the second exit does; the first says 2."""

    def __init__(self, trace: list[Call]) -> None:
        self.trace = trace

    def pick(self, logits: np.ndarray, top_id: int, tokens: list[int], position: int) -> int:
        assert self.trace[-1].graph == "exit"
        return 2 if self.trace[-1].number == 0 else 1


def test_an_exit_whose_drafts_are_refused_is_asked_no_more() -> None:
    """The other one goes on, where both together would not have paid."""
    stack = MockStack(
        LAYERS_3, max_positions=300, confidence=lambda exit_index, place: float(exit_index or place % 2)
    )
    stack.trace = []
    engine = adaptive(stack, by_layers(stack))
    sequence = engine.start(
        [1],
        max_new_tokens=200,
        policy=make_policy("max-prob", [0.5], LAYERS_3),
        catch_up="verify",
        sampler=RightAtTheSecondExit(stack.trace),
    )
    list(engine.generate(sequence))
    assert set(sequence.tokens) == {1}
    assert sequence.counters.asked == {1}
    (note,) = sequence.notes
    assert "the exit at layer 2 stopped drafting after" in note
    assert sequence.drafts.judged - sequence.drafts.accepted < 12
    assert {token.depth for token in sequence.produced[40:] if token.drafted} == {3}


class Silent(Drafter):
    """Drafts nothing."""

    name = "silent"

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        return Proposal()


@pytest.mark.parametrize(
    ("head", "first_asked"),
    [(0.05, 1), (0.5, 120), (5.0, None)],  # of 200 tokens; of two layers that take 2 seconds together
)
def test_beside_drafts_from_text_exits_are_tried_where_there_is_time_to_spare(
    head: float, first_asked: int | None
) -> None:
    """A trial of 12 tokens may take two percent of the answer so far, of 64 tokens at first: an answer that
    exits cannot help keeps 0.98 of its speed.
    """
    stack = MockStack(LAYERS, max_positions=300, confidence=lambda exit_index, place: 0.0)
    stack.trace = []
    engine = adaptive(stack, prices(stack, (1.0, 1.0), head=head))
    policy = make_policy("max-prob", [0.5], LAYERS)
    sequence = engine.start([1], max_new_tokens=200, policy=policy, catch_up="verify", drafters=[Silent()])
    asked = []
    for place, _ in enumerate(engine.generate(sequence), 1):
        asked += [place] * sum((call.graph, call.number) == ("exit", 0) for call in stack.trace)
        stack.trace.clear()
    assert len(asked) == (0 if first_asked is None else FIRST_LOOK)
    if first_asked is not None:
        assert abs(asked[0] - first_asked) <= 2


def test_rows_far_apart_run_apart() -> None:
    """Stepping over six slots costs more than a pass: two passes; stepping over one does not."""
    stack = MockStack(LAYERS, max_positions=100)
    engine = Engine(stack, num_slots=8)
    sequences = [engine.start([i], max_new_tokens=5) for i in range(8)]
    engine.step()
    costs = prices(stack, (1.0, 1.0), slot=0.5 * 256)  # half a pass for a slot with one token in it
    batch = [(s, work) for s in (sequences[0], sequences[2], sequences[7]) for work in [schedule(s)]]
    assert [s for s, _ in near(batch, costs)] == [sequences[0], sequences[2]]
    assert near(batch, None) == batch
    sequences[7].waited = 1 + max(s.waited for s in sequences)
    assert [s for s, _ in near(batch, costs)] == [sequences[7]], "who has waited longest goes next"


def test_measured_costs_are_sane(tiny_stack: OrtStack) -> None:
    """On the real stack: every table rises, and an engine measures once, when nothing runs."""
    engine = Engine(tiny_stack)
    policy = make_policy("max-prob", [0.4], tiny_stack.exit_layers)
    first = engine.start([1, 2, 3], max_new_tokens=30, policy=policy, catch_up="verify")
    engine.step()
    engine.measure()
    assert engine.costs is None
    assert first.decision.request_cost is None
    list(engine.generate(first))
    engine.measure()
    costs = engine.costs
    assert costs is not None
    assert all((np.diff(table) >= 0).all() and table[0] > 0 for table in costs.tables.values())
    engine.measure()
    assert engine.costs is costs
    assert (
        engine.start([1, 2, 3], max_new_tokens=3, policy=policy).decision.request_cost is None
    )  # it would change tokens
    assert (
        engine.start([1, 2, 3], max_new_tokens=3, policy=policy, catch_up="verify").decision.request_cost
        is not None
    )


def test_verify_says_where_it_holds_only_up_to_rounding() -> None:
    stack = MockStack(LAYERS)
    stack.exact = False
    sequence = Engine(stack).start([1], max_new_tokens=3, catch_up="verify")
    assert sequence.notes == [
        "verify holds up to rounding here: passes of several tokens differ from single ones in their "
        "last bits"
    ]
