"""The engine over the mock stack: against a reference that keeps no state at all between tokens."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_common.errors import RequestError
from ease_runtime.engine import engine as engine_module
from ease_runtime.engine import schedule as schedule_module
from ease_runtime.engine.engine import CATCH_UPS, Engine
from ease_runtime.engine.layout import Span
from ease_runtime.engine.mock import MockStack
from ease_runtime.engine.sampling import GumbelSampler
from ease_runtime.engine.schedule import Batch, schedule
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.policies import FULL_DEPTH, HeadOutput, make_policy
from engine_cases import VOCAB, Case, Forced, Reference, cases, check_cache, finish, mixes, reference

LOSSY = ("propagate", "recompute")  # catch-ups whose tokens leave for good


def assert_same(case: Case, engine: Engine, sequence: TokenSequence, expected: Reference) -> None:
    """Tokens, depths, confidences, and whatever K/V the sequence has."""
    assert sequence.tokens == expected.tokens
    produced = sequence.produced
    assert [t.id for t in produced] == expected.tokens[len(case.prompt) :]
    assert [t.depth for t in produced] == expected.depths
    assert [t.confidence for t in produced] == expected.confidences
    assert sequence.counters.done[0] == len(sequence.tokens) - 1
    assert min(sequence.counters.done) >= len(case.prompt)
    stack = case.stack()
    for k, done in enumerate(sequence.counters.done):
        for layer in stack.layers(k):
            np.testing.assert_array_equal(
                engine.cache.entries[sequence.slot, layer - 1, :done],
                expected.cache.entries[0, layer - 1, :done],
            )


@pytest.mark.parametrize("catch_up", LOSSY)
@settings(max_examples=150, deadline=None)
@given(case=cases(), cap=st.integers(1, 9) | st.just(64), chunk=st.integers(1, 7))
def test_equals_the_reference(catch_up: str, case: Case, cap: int, chunk: int) -> None:
    engine = Engine(case.stack(), cap=cap, chunk=chunk)
    sequence = case.start(engine, catch_up, keep=True)
    finish(engine, sequence)
    assert_same(case, engine, sequence, reference(case, catch_up))
    assert sequence.finish_reason == "length"
    engine.release(sequence)
    assert engine.sequences == []


@settings(max_examples=200, deadline=None)
@given(case=cases(), draft_length=st.integers(1, 9), chunk=st.integers(1, 7))
def test_verify_is_full_depth(case: Case, draft_length: int, chunk: int) -> None:
    """Token for token and K/V for K/V, whatever is drafted; a token is drafted where its exit says, and only
    then.
    """
    engine = Engine(case.stack(), draft_length=draft_length, chunk=chunk)
    sequence = case.start(engine, "verify", keep=True)
    finish(engine, sequence)
    off = reference(replace(case, thresholds=None), "recompute")
    assert sequence.tokens == off.tokens
    assert [t.id for t in sequence.produced] == off.tokens[len(case.prompt) :]
    assert sequence.drafts.accepted == sum(t.drafted for t in sequence.produced)
    assert all((t.depth < case.exit_layers[-1]) == t.drafted for t in sequence.produced)
    assert sequence.drafts.judged == 0 or case.thresholds is not None
    check_cache(engine, sequence, off, case)


@pytest.mark.parametrize("seed", [None, 3])
def test_verify_accepts_and_rejects(seed: int | None) -> None:
    """With three words to choose from a guess is right about once in three, greedy and sampled."""
    case = Case((2, 4, 6), None, (1, 2), 200, (0.4, 0.4), "max-prob", seed, vocab=3)
    engine = Engine(case.stack(), draft_length=4)
    sequence = case.start(engine, "verify")
    finish(engine, sequence)
    assert sequence.tokens == reference(replace(case, thresholds=None), "recompute").tokens
    assert 0.15 < sequence.drafts.accepted / sequence.drafts.judged < 0.6
    assert sequence.drafts.judged > 100
    assert {t.depth for t in sequence.produced} == {2, 4, 6}


@pytest.mark.parametrize("catch_up", LOSSY)
@settings(max_examples=60, deadline=None)
@given(case=cases(), cap=st.integers(1, 6))
def test_a_cap_moves_work_and_bounds_queues(catch_up: str, case: Case, cap: int) -> None:
    free = Engine(case.stack(), cap=1000)
    capped = Engine(case.stack(), cap=cap)
    capped.stack.trace = []
    without = finish(free, case.start(free, catch_up))
    sequence = case.start(capped, catch_up)
    while sequence.finish_reason is None:
        if (
            sequence.decision.level == 0
            and not sequence.decision.leaving
            and not sequence.prefilling
            and schedule(sequence, cap).segment == 0
        ):  # a token sets out
            assert max(-np.diff(sequence.counters.done), default=0) < cap
        capped.step()
    assert sequence.produced == without
    decoding = [
        c for c in capped.stack.trace if c.graph in ("segment", "kv") and c.cache_length > len(case.prompt)
    ]
    assert max((c.num_tokens for c in decoding), default=1) <= (cap + 1) * len(case.exit_layers)


@pytest.mark.parametrize("catch_up", LOSSY)
def test_a_cap_settles_a_queue_that_nobody_needs(catch_up: str) -> None:
    """With every token leaving at the first exit, deeper segments run only because of the cap, `cap` tokens a
    pass.
    """
    calls = {}
    for cap in (4, 1000):
        stack = MockStack((2, 4, 6), confidence=lambda exit_index, position: 1.0)
        engine = Engine(stack, cap=cap)
        sequence = engine.start(
            [1, 2, 3], max_new_tokens=20, policy=make_policy("max-prob", [0.5], (2, 4, 6)), catch_up=catch_up
        )
        finish(engine, sequence)
        sequence = engine.start(
            [1, 2, 3], max_new_tokens=20, policy=make_policy("max-prob", [0.5], (2, 4, 6)), catch_up=catch_up
        )
        assert engine.step() == []  # segment 1 of 3 of the prefill
        engine.step()
        engine.step()
        stack.trace = []
        finish(engine, sequence)
        calls[cap] = [
            (c.graph, c.number, c.num_tokens) for c in stack.trace if c.number and c.graph != "exit"
        ]
    graph = "kv" if catch_up == "propagate" else "segment"
    assert calls[1000] == []
    assert calls[4] == [(graph, 1, 4), (graph, 2, 4)] * 4


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_off_is_the_plain_model(catch_up: str, case: Case) -> None:
    """No threshold: a token a pass through every segment, one head call a token, whatever the catch-up."""
    case = replace(case, thresholds=None, policy="max-prob")
    stack = case.stack()
    engine = Engine(stack, cap=1)
    stack.trace = []
    sequence = case.start(engine, catch_up, keep=True)
    produced = finish(engine, sequence)
    segments = range(len(case.exit_layers))
    last = len(case.exit_layers) - 1
    sizes = [len(case.prompt)] + [1] * (case.num_new - 1)
    expected = [
        call for size in sizes for call in [*(("segment", k, size) for k in segments), ("exit", last, 1)]
    ]
    assert [(c.graph, c.number, c.num_tokens) for c in stack.trace] == expected
    assert {t.depth for t in produced} == {case.exit_layers[-1]}
    plain = case.stack()
    sampler = case.sampler()
    tokens = list(case.prompt)
    cache = plain.open_cache()
    while len(tokens) < case.limit:  # one pass after the other, with no engine
        start = cache.filled[0][-1]
        inputs = np.array(tokens[start:], np.int64)
        for k in segments:
            out = plain.reserve_rows(2 * (len(tokens) - start), [inputs] if k else [])
            plain.run_segment(k, cache, [Span(0, start, len(tokens))], inputs, out)
            inputs = np.arange(out, out + len(tokens) - start)
        output = plain.run_exit(last, inputs[-1:])
        tokens.append(sampler.pick(output.logits[0], int(output.top_id[0]), tokens, len(tokens)))
    assert sequence.tokens == tokens
    np.testing.assert_array_equal(engine.cache.entries, cache.entries)


@pytest.mark.parametrize("catch_up", LOSSY)
@pytest.mark.parametrize("policy", ["max-prob", "margin", "entropy", "similarity", "patience", "gate"])
def test_threshold_0_leaves_at_the_first_exit(catch_up: str, policy: str) -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.0))
    sequence = engine.start(
        [5, 1], max_new_tokens=30, policy=make_policy(policy, [0.0], (2, 4, 6)), catch_up=catch_up
    )
    assert [t.depth for t in finish(engine, sequence)] == [2] * 30


@pytest.mark.parametrize("catch_up", CATCH_UPS)
def test_a_threshold_nobody_reaches_runs_every_layer(catch_up: str) -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.999))
    sequence = engine.start(
        [5, 1], max_new_tokens=30, policy=make_policy("max-prob", [1.0], (2, 4, 6)), catch_up=catch_up
    )
    produced = finish(engine, sequence)
    off = engine.start([5, 1], max_new_tokens=30, catch_up=catch_up)
    assert [(t.id, t.depth) for t in produced] == [(t.id, 6) for t in finish(engine, off)]


def test_each_exit_has_its_own_threshold() -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.5))
    depths = {}
    for thresholds in [(0.4, 0.6), (0.6, 0.4), (0.6, 0.6), (0.5, 0.5)]:
        sequence = engine.start([5], max_new_tokens=4, policy=make_policy("max-prob", thresholds, (2, 4, 6)))
        depths[thresholds] = {t.depth for t in finish(engine, sequence)}
    assert depths == {(0.4, 0.6): {2}, (0.6, 0.4): {4}, (0.6, 0.6): {6}, (0.5, 0.5): {2}}


@pytest.mark.parametrize("catch_up", LOSSY)
@pytest.mark.parametrize("thresholds", [None, [0.0], [1.0]])
def test_the_prefill_runs_every_segment(catch_up: str, thresholds: list[float] | None) -> None:
    """And the last prompt position is predicted at the exit that its policy says, with no head call
    after it.
    """
    stack = MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.5)
    engine = Engine(stack)
    stack.trace = []
    sequence = engine.start(
        [3, 1, 4, 1, 5],
        max_new_tokens=2,
        policy=make_policy("max-prob", thresholds, (2, 4, 6)),
        catch_up=catch_up,
    )
    token = next(engine.generate(sequence))
    assert [(c.number, c.num_tokens) for c in stack.trace if c.graph == "segment"] == [(0, 5), (1, 5), (2, 5)]
    heads = [c.number for c in stack.trace if c.graph == "exit"]
    assert (token.depth, heads) == {None: (6, [2]), 0.0: (2, [0]), 1.0: (6, [0, 1, 2])}[
        thresholds and thresholds[0]
    ]
    assert sequence.counters.done == [5, 5, 5]


def test_propagate_never_runs_a_segment_for_pending_tokens() -> None:
    """Decoding: every segment pass is of one token; the others' K/V come from `run_kv`, each position exactly
    once.
    """
    stack = MockStack(
        (1, 3, 4), confidence=lambda exit_index, position: float(exit_index >= (position * 7) % 3)
    )
    engine = Engine(stack)
    stack.trace = []
    sequence = engine.start(
        [2, 7], max_new_tokens=40, policy=make_policy("max-prob", [0.5], (2, 4, 6)), catch_up="propagate"
    )
    finish(engine, sequence)
    decoding = [c for c in stack.trace if c.cache_length > 2]
    assert {c.num_tokens for c in decoding if c.graph == "segment"} == {1}
    for k in (1, 2):
        assert sum(c.num_tokens for c in decoding if c.number == k) == sequence.counters.done[k] - 2
    assert sum(c.num_tokens for c in decoding if c.graph == "kv") > 10


def test_recompute_runs_each_position_once_and_batched() -> None:
    stack = MockStack(
        (1, 3, 4), confidence=lambda exit_index, position: float(exit_index >= (0 if position % 8 else 2))
    )
    engine = Engine(stack)
    stack.trace = []
    sequence = engine.start(
        [2, 7], max_new_tokens=40, policy=make_policy("max-prob", [0.5], (2, 4, 6)), catch_up="recompute"
    )
    finish(engine, sequence)
    decoding = [(c.number, c.num_tokens) for c in stack.trace if c.graph == "segment" and c.cache_length > 2]
    assert [n for k, n in decoding if k == 1] == [7, 8, 8, 8, 8]  # positions 2..8, then 8 at a time
    assert [n for k, n in decoding if k == 2] == [7, 8, 8, 8, 8]
    assert [n for k, n in decoding if k == 0] == [1] * 39
    assert not [c for c in stack.trace if c.graph == "kv"]


def at_random(dice: random.Random, seen: dict[str, int]):
    """A `choose` that picks any rows that fit together, and counts what it saw."""

    def choose(works: Batch, prefill_turn: bool, chunk: int) -> Batch:
        kind, segment = dice.choice([(work.kind, work.segment) for _, work in works])
        fitting = [(s, work) for s, work in works if (work.kind, work.segment) == (kind, segment)]
        chosen = [pair for pair in fitting if dice.random() < 0.6] or [dice.choice(fitting)]
        seen["any"] += len(chosen) > 1
        seen["unequal"] += kind != "head" and len({work.stop - work.start for _, work in chosen}) > 1
        slots = [s.slot for s, _ in chosen]
        seen["holes"] += slots[-1] - slots[0] >= len(slots)
        return chosen

    return choose


def run_mix(requests: list[tuple[Case, str]], num_slots: int, cap: int, dice: random.Random) -> None:
    """Requests that join at any moment, over a few slots: each as if alone. Some are given up on the way."""
    shape = requests[0][0]
    limit = max(case.limit for case, _ in requests)
    stack = MockStack(shape.exit_layers, vocab_size=shape.vocab, max_positions=limit, blocks=shape.blocks)
    engine = Engine(
        stack, num_slots=num_slots, cap=cap, chunk=dice.randint(1, 8), draft_length=dice.randint(1, 6)
    )
    sequences = []
    given_up = []
    while len(sequences) < len(requests) or engine.busy:
        while len(sequences) < len(requests) and (not engine.busy or dice.random() < 0.2):
            case, kind = requests[len(sequences)]
            sequences.append(case.start(engine, kind))
        engine.step()
        if engine.busy and dice.random() < 0.01:
            given_up.append(dice.choice([s for s in sequences if s.finish_reason is None]))
            given_up[-1].finish_reason = "given up"
            engine.release(given_up[-1])
    for (case, kind), sequence in zip(requests, sequences, strict=True):
        if any(sequence is other for other in given_up):
            continue
        expected = reference(replace(case, thresholds=None) if kind == "verify" else case, kind)
        assert sequence.tokens == expected.tokens
        if kind != "verify":
            assert [t.depth for t in sequence.produced] == expected.depths
            assert [t.confidence for t in sequence.produced] == expected.confidences
    assert engine.sequences == []
    assert engine.waiting == []


def test_rows_of_a_batch_do_not_meet() -> None:
    """Whatever runs together: no token, depth or confidence depends on the other rows, and nobody leaves or
    stays for them.

    What that says is worth something: rows with unequal work ran together, and passes stepped over others'
    slots.
    """
    seen = {"any": 0, "unequal": 0, "holes": 0}

    @settings(max_examples=120, deadline=None)
    @given(requests=mixes(), num_slots=st.integers(1, 5), cap=st.integers(1, 9), seed=st.integers(0, 2**32))
    def as_if_alone(requests: list[tuple[Case, str]], num_slots: int, cap: int, seed: int) -> None:
        dice = random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "choose", at_random(dice, seen))
            run_mix(requests, num_slots, cap, dice)

    as_if_alone()
    assert min(seen.values()) > 20, seen


@settings(max_examples=60, deadline=None)
@given(requests=mixes(), num_slots=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_rows_as_they_are_scheduled(requests: list[tuple[Case, str]], num_slots: int, seed: int) -> None:
    run_mix(requests, num_slots, 64, random.Random(seed))


@pytest.mark.parametrize("catch_up", LOSSY)
@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    steps=st.integers(0, 40),
    length=st.integers(1, 24),
    replacement=st.integers(0, VOCAB - 1),
    cap=st.integers(1, 9),
)
def test_crop_then_continue_is_as_if_it_had_been_so(
    catch_up: str, case: Case, steps: int, length: int, replacement: int, cap: int
) -> None:
    """Cut anywhere, at any moment after the prompt has run, and given another token: as a sequence that never
    went further.
    """
    policy = case.policy if case.policy != "gate" else "margin"
    case = replace(case, leaves_at=None, num_new=case.num_new + 2, policy=policy, seed=None, decay=None)
    engine = Engine(case.stack(), cap=cap)
    sequence = case.start(engine, catch_up, keep=True)
    while not sequence.produced:
        engine.step()
    for _ in range(steps):
        if len(sequence.tokens) < case.limit - 1:
            engine.step()
    length = min(length, len(sequence.tokens) - 1)
    before = list(sequence.produced)
    sequence.crop(length)
    assert sequence.produced == before[: max(0, length - len(case.prompt))]
    sequence.tokens.append(replacement % case.vocab)
    history = list(sequence.tokens)
    finish(engine, sequence)
    fresh_engine = Engine(case.stack(), cap=cap)
    fresh = fresh_engine.start(
        history[: min(length, len(case.prompt))],
        max_new_tokens=case.limit - min(length, len(case.prompt)),
        policy=case.exit_policy(),
        catch_up=catch_up,
        sampler=Forced(history),
        keep=True,
    )
    finish(fresh_engine, fresh)
    assert sequence.tokens == fresh.tokens
    num_after = len(fresh.tokens) - len(history)
    assert (
        sequence.produced[len(sequence.produced) - num_after :]
        == fresh.produced[len(fresh.produced) - num_after :]
    )
    for k in range(len(sequence.counters.done)):
        done = min(sequence.counters.done[k], fresh.counters.done[k])
        for layer in case.stack().layers(k):
            np.testing.assert_array_equal(
                engine.cache.entries[0, layer - 1, :done], fresh_engine.cache.entries[0, layer - 1, :done]
            )


def test_crop_forgets_what_was_produced_past_it() -> None:
    engine = Engine(MockStack())
    sequence = engine.start([1, 2, 3], max_new_tokens=10)
    while len(sequence.produced) < 4:
        engine.step()
    kept = sequence.produced[:2]
    sequence.crop(5)
    assert (len(sequence.tokens), sequence.produced, sequence.counters.done, sequence.decision.level) == (
        5,
        kept,
        [5, 5, 5],
        0,
    )
    with pytest.raises(AssertionError, match="needs its next token"):
        engine.step()


@pytest.mark.parametrize("thresholds", [None, [0.0], [1.0]])
def test_verify_takes_the_first_token_from_full_depth(thresholds: list[float] | None) -> None:
    stack = MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.5)
    engine = Engine(stack)
    stack.trace = []
    sequence = engine.start(
        [3, 1, 4], max_new_tokens=2, policy=make_policy("max-prob", thresholds, (2, 4, 6)), catch_up="verify"
    )
    while not sequence.produced:
        engine.step()
    assert sequence.produced[0].depth == 6
    assert [(c.graph, c.number, c.num_tokens) for c in stack.trace] == [
        *(("segment", k, 3) for k in range(3)),
        ("exit", 2, 1),
    ]


def test_verify_judges_draft_length_drafts_at_once() -> None:
    """Every token drafted at the first exit: the pass that judges takes the drafts, and one more that full
    depth says itself.
    """
    stack = MockStack((2, 4), vocab_size=2, confidence=lambda exit_index, position: 1.0)
    engine = Engine(stack, draft_length=3)
    stack.trace = []
    policy = make_policy("max-prob", [0.5], (2, 4))
    finish(engine, engine.start([1, 0], max_new_tokens=60, policy=policy, catch_up="verify"))
    deep = [c.num_tokens for c in stack.trace if c.graph == "segment" and c.number == 1][1:]
    assert set(deep[:-1]) == {4}
    heads = [c.num_tokens for c in stack.trace if c.graph == "exit" and c.number == 1][1:]
    assert heads == deep


def test_a_drafted_stop_token_is_judged_before_it_ends() -> None:
    stack = MockStack((2, 4), vocab_size=3, confidence=lambda exit_index, position: 1.0)
    policy = make_policy("max-prob", [0.5], (2, 4))
    prompt = [1, 0]
    for stop in range(3):
        engine = Engine(stack, draft_length=5)
        off = finish(engine, engine.start(prompt, max_new_tokens=40, stop_ids=frozenset({stop})))
        sequence = engine.start(
            prompt, max_new_tokens=40, policy=policy, catch_up="verify", stop_ids=frozenset({stop})
        )
        assert [t.id for t in finish(engine, sequence)] == [t.id for t in off]
        assert sequence.tokens == prompt + [t.id for t in off]
        assert sequence.finish_reason == "stop"


def test_a_depth_budget_is_held() -> None:
    """Confidences that no fixed threshold sorts that way: the mean depth comes to the budget, from either
    side.
    """
    dice = random.Random(1)
    spread = [dice.random() for _ in range(500)]
    for budget in (2.5, 3.5, 5.0):
        engine = Engine(
            MockStack((2, 4, 6), max_positions=400, confidence=lambda exit_index, position: spread[position])
        )
        policy = make_policy("max-prob", [0.9], (2, 4, 6), depth_budget=budget)
        depths = [t.depth for t in finish(engine, engine.start([1], max_new_tokens=300, policy=policy))]
        assert np.mean(depths) == pytest.approx(budget, abs=0.15)


def test_a_row_that_breaks_ends_alone() -> None:
    """No number among its logits: an error for that row; the others' tokens are as if alone."""
    stack = MockStack((2, 4, 6))
    engine = Engine(stack, num_slots=3)
    sequences = [engine.start([i, 2, 3], max_new_tokens=20) for i in range(3)]
    right = stack.run_exit
    victim = sequences[1]

    def broken(number: int, rows: np.ndarray) -> HeadOutput:
        output = right(number, rows)
        if len(victim.tokens) > 8 and victim.slot is not None:
            mine = rows == victim.counters.rows[len(victim.tokens) - 1]
            output.logits[mine] = np.nan
            output.top_prob[mine] = np.nan
        return output

    stack.run_exit = broken
    while engine.busy:
        engine.step()
    assert [s.finish_reason for s in sequences] == ["length", "error", "length"]
    assert victim.error == "the model's logits are no finite numbers at position 8"
    for i in (0, 2):
        fresh = Engine(MockStack((2, 4, 6)))
        assert sequences[i].produced == finish(fresh, fresh.start([i, 2, 3], max_new_tokens=20))


@pytest.mark.parametrize("catch_up", CATCH_UPS)
def test_a_request_after_another_runs_only_what_is_new(catch_up: str) -> None:
    """As a conversation does: its prompt begins with what the other has in its cache; its tokens are those of
    a fresh start.
    """
    stack = MockStack((2, 4, 6), max_positions=200)
    layers = (2, 4, 6)
    policy = make_policy("max-prob", None if catch_up == "propagate" else [0.5], layers)
    engine = Engine(stack, num_slots=2)
    first = engine.start([5, 6, 7, 8], max_new_tokens=10, policy=policy, catch_up=catch_up, keep=True)
    finish(engine, first)
    prompt = [*first.tokens, 1, 2, 3]
    shared = first.counters.done[-1]
    assert shared >= 4
    stack.trace = []
    second = engine.start(prompt, max_new_tokens=10, policy=policy, catch_up=catch_up, after=first)
    finish(engine, second)
    assert [c.num_tokens for c in stack.trace if c.graph == "segment"][:3] == [len(prompt) - shared] * 3
    fresh = Engine(MockStack(layers, max_positions=200))
    assert second.produced == finish(
        fresh, fresh.start(prompt, max_new_tokens=10, policy=policy, catch_up=catch_up)
    )
    assert engine.sequences == []


def test_a_request_after_one_that_skipped_an_exits_layer_runs_it_all() -> None:
    """The exit's own layer has no K/V of a request that could not leave there: nothing can be taken over;
    after one that could, all.
    """
    layers = (2, 4)
    prompt = [5, 6, 7, 8]
    policy = make_policy("max-prob", [0.5], layers)
    for before in (FULL_DEPTH, policy):
        stack = MockStack(layers, max_positions=200, blocks=(0,))
        engine = Engine(stack)
        first = engine.start(prompt, max_new_tokens=10, policy=before, keep=True)
        finish(engine, first)
        stack.trace = []
        longer = [*first.tokens, 1, 2]
        shared = first.counters.done[-1] if before is policy else 0
        second = engine.start(longer, max_new_tokens=10, policy=policy, after=first)
        finish(engine, second)
        blocks = [c.num_tokens for c in stack.trace if c.graph == "block"]
        assert blocks[0] == len(longer) - shared
        fresh = Engine(MockStack(layers, max_positions=200, blocks=(0,)))
        assert second.produced == finish(fresh, fresh.start(longer, max_new_tokens=10, policy=policy))


def test_an_exits_layer_runs_for_those_that_may_leave_there() -> None:
    """Full depth does not pay for it, nor does a request that is asked elsewhere."""
    stack = MockStack((2, 4, 6), blocks=(0,))
    engine = Engine(stack, num_slots=3)
    stack.trace = []
    for thresholds in (None, [None, 0.5], [0.5, None]):
        engine.start([1, 2, 3], max_new_tokens=5, policy=make_policy("max-prob", thresholds, (2, 4, 6)))
    while engine.busy:
        engine.step()
    assert sum(c.num_tokens for c in stack.trace if c.graph == "block") == 3 + 5 - 1


def test_top_logprobs_are_the_largest() -> None:
    engine = Engine(MockStack((2, 4)))
    token = finish(engine, engine.start([3, 9], max_new_tokens=1, num_logprobs=4))[0]
    ids, logprobs = zip(*token.top_logprobs, strict=True)
    assert (ids[0], logprobs[0]) == (token.id, token.logprob)
    assert list(logprobs) == sorted(logprobs, reverse=True)
    everything = finish(engine, engine.start([3, 9], max_new_tokens=1, num_logprobs=23))[0].top_logprobs
    assert everything[:4] == token.top_logprobs
    assert sum(np.exp(logprob) for _, logprob in everything) == pytest.approx(1.0, abs=1e-5)


def test_more_requests_than_slots_wait_their_turn() -> None:
    engine = Engine(MockStack((2, 4)), num_slots=2)
    sequences = [engine.start([i], max_new_tokens=3 + i) for i in range(5)]
    order = []
    while engine.busy:
        assert len(engine.sequences) <= 2
        order += [sequences.index(s) for s in engine.step() if s.finish_reason]
    assert order == [0, 1, 2, 3, 4]
    assert [len(s.produced) for s in sequences] == [3, 4, 5, 6, 7]


def test_nobody_waits_for_ever() -> None:
    """A row that needs depth while seven others never do: it goes after MAX_WAIT passes at the latest."""
    stack = MockStack((2, 4), max_positions=200)
    engine = Engine(stack, num_slots=8)
    shallow = make_policy("max-prob", [0.0], (2, 4))
    sequences = [engine.start([i], max_new_tokens=100, policy=shallow) for i in range(7)]
    deep = engine.start([7], max_new_tokens=50)
    longest = 0
    while engine.busy:
        engine.step()
        longest = max([longest, *(s.waited for s in engine.running)])
    assert longest <= schedule_module.MAX_WAIT + 1
    assert len(deep.produced) == 50
    assert all(len(s.produced) == 100 for s in sequences)


def test_stop_ids_end_a_sequence_and_free_its_rows() -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 1.0))
    policy = make_policy("max-prob", [0.5], (2, 4, 6))
    whole = finish(engine, engine.start([1, 2], max_new_tokens=12, policy=policy))
    stop = whole[5].id
    sequence = engine.start([1, 2], max_new_tokens=12, policy=policy, stop_ids=frozenset({stop}))
    produced = finish(engine, sequence)
    assert produced == whole[: [t.id for t in whole].index(stop) + 1]
    assert sequence.finish_reason == "stop"
    assert engine.sequences == []


def test_whoever_stops_reading_gives_up_the_sequence() -> None:
    engine = Engine(MockStack())
    tokens = engine.generate(engine.start([1, 2], max_new_tokens=12))
    next(tokens)
    assert len(engine.sequences) == 1
    tokens.close()
    assert engine.sequences == []


def test_the_context_ends_a_sequence() -> None:
    engine = Engine(MockStack(max_positions=16))
    sequence = engine.start([1] * 10, max_new_tokens=100)
    assert len(finish(engine, sequence)) == 6
    assert sequence.finish_reason == "length"


def test_logprob_is_that_of_the_chosen_token_under_its_head() -> None:
    stack = MockStack((2, 4))
    sampled = Engine(stack).start([3, 9], max_new_tokens=1, sampler=GumbelSampler(3.0, 0, 1.0, 4))
    engine = Engine(stack)
    token = finish(engine, engine.start([3, 9], max_new_tokens=1, sampler=GumbelSampler(3.0, 0, 1.0, 4)))[0]
    cache = stack.open_cache()
    rows = np.array([3, 9], np.int64)
    for k in range(2):
        out = stack.reserve_rows(4, [rows] if k else [])
        stack.run_segment(k, cache, [Span(0, 0, 2)], rows, out)
        rows = np.arange(out, out + 2)
    logits = stack.run_exit(1, rows[1:]).logits[0].astype(np.float64)
    assert token.id != int(logits.argmax())  # the seed was chosen so
    assert token.logprob == pytest.approx(logits[token.id] - np.log(np.exp(logits).sum()), abs=1e-5)
    assert sampled.produced == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [0] * 64}, "64 tokens; this model's context of 64"),
        ({"prompt": [1, VOCAB]}, f"outside the vocabulary of {VOCAB}"),
        ({"prompt": [-1]}, f"outside the vocabulary of {VOCAB}"),
        ({"catch_up": "propogate"}, "unknown catch-up 'propogate'; did you mean 'propagate'?"),
        ({"max_new_tokens": -1}, "max_new_tokens -1 is below 0"),
    ],
)
def test_requests_that_cannot_be_run(change: dict[str, object], message: str) -> None:
    engine = Engine(MockStack(vocab_size=VOCAB, max_positions=64))
    request = {"prompt": [1, 2], "max_new_tokens": 5, **change}
    with pytest.raises(RequestError) as caught:
        engine.start(request.pop("prompt"), **request)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.sequences == []


def test_a_cap_below_1_is_refused() -> None:
    with pytest.raises(RequestError, match="cap 0 is below 1"):
        Engine(MockStack(), cap=0)


def test_a_request_that_no_slot_will_ever_take_is_told_so() -> None:
    engine = Engine(MockStack((2, 4)))
    list(engine.generate(engine.start([1, 2], max_new_tokens=2, keep=True)))
    with pytest.raises(RequestError, match="every slot is kept by a sequence that has ended"):
        list(engine.generate(engine.start([3], max_new_tokens=2)))
    assert not engine.waiting
