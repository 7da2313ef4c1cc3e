"""The engine over the mock stack: against a reference that keeps no state at all between tokens."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_runtime.engine import CATCH_UPS, Engine, schedule
from ease_runtime.errors import RequestError
from ease_runtime.mock import MockCache, MockStack
from ease_runtime.policy import ExitPolicy, HeadOutput
from ease_runtime.sampling import Greedy, GumbelSampler, Sampler
from ease_runtime.sequence import Sequence, Token

VOCAB = 23


@dataclass(frozen=True)
class Case:
    """A stack and a request. `leaves_at`: by position, the exit from which it is confident; None: as its logits say."""

    exit_layers: tuple[int, ...]
    leaves_at: tuple[int, ...] | None
    prompt: tuple[int, ...]
    num_new: int
    thresholds: tuple[float, ...] | None
    policy: str
    seed: int | None  # None: greedy

    def stack(self) -> MockStack:
        script = self.leaves_at
        confidence = None if script is None else lambda exit_index, position: float(exit_index >= script[position])
        return MockStack(self.exit_layers, vocab_size=VOCAB, max_positions=self.limit + 3, confidence=confidence)

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.num_new

    def exit_policy(self) -> ExitPolicy:
        return ExitPolicy.create(self.policy, self.thresholds, len(self.exit_layers))

    def sampler(self) -> Sampler:
        return Greedy() if self.seed is None else GumbelSampler(1.3, 7, 0.9, self.seed)

    def start(self, engine: Engine, catch_up: str) -> Sequence:
        return engine.start(self.prompt, max_new_tokens=self.num_new, policy=self.exit_policy(), catch_up=catch_up, sampler=self.sampler())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    exit_layers = draw(st.sampled_from([(3,), (1, 2), (2, 4, 6), (1, 4, 5), (1, 3, 4, 6)]))
    early = len(exit_layers) - 1
    prompt = tuple(draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)))
    num_new = draw(st.integers(1, 18))
    scripted = draw(st.booleans())
    leaves_at = draw(st.lists(st.integers(0, early), min_size=len(prompt) + num_new, max_size=len(prompt) + num_new)) if scripted else None
    value = st.just(0.5) if scripted else st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0]))
    thresholds = draw(st.none() | st.lists(value, min_size=early, max_size=early)) if early else None
    return Case(
        exit_layers,
        None if leaves_at is None else tuple(leaves_at),
        prompt,
        num_new,
        None if thresholds is None else tuple(thresholds),
        draw(st.sampled_from(["max-prob", "margin", "entropy"])),
        draw(st.none() | st.integers(0, 99)),
    )


@dataclass
class Reference:
    """The naive answer: every token from an empty cache, all positions in one pass a segment."""

    tokens: list[int]
    depths: list[int]
    confidences: list[float]
    cache: MockCache


def reference(case: Case, catch_up: str) -> Reference:
    """`recompute`: nobody is ever frozen. `propagate`: a produced token is frozen past the exit that it left by."""
    stack, policy, sampler = case.stack(), case.exit_policy(), case.sampler()
    tokens, exits, confidences = list(case.prompt), [], []
    last = len(case.exit_layers) - 1
    while len(tokens) < case.limit:
        newest, cache, left = len(tokens) - 1, stack.open_cache(), None
        rows = np.array(tokens, np.int64)
        for k in range(last + 1):
            active = np.ones(len(tokens), np.bool_)
            if catch_up == "propagate":
                for position in range(len(case.prompt), newest):  # the prompt's own exits freeze nothing
                    active[position] = exits[position - len(case.prompt) + 1] >= k
                active[newest] = left is None or newest < len(case.prompt)
            out = stack.reserve_rows(len(tokens), [rows] if k else [])
            stack.run_segment(k, cache, 0, rows, out, active)
            rows = np.arange(out, out + len(tokens))
            if left is None and (k == last or policy.tests(k)):
                output = stack.run_exit(k, rows[-1:])
                confidence = float(policy.confidence(output)[0])
                if k == last or confidence >= np.float32(policy.thresholds[k]):
                    left = (k, confidence, sampler.pick(output, len(tokens)))
        assert left is not None
        exits.append(left[0])
        confidences.append(left[1])
        tokens.append(left[2])
    return Reference(tokens, [case.exit_layers[k] for k in exits], confidences, cache)


def finish(engine: Engine, sequence: Sequence) -> list[Token]:
    """Step to the end, watching the counters."""
    produced = []
    while sequence.finish_reason is None:
        before = list(sequence.done)
        token = engine.step(sequence)
        assert sequence.done == sorted(sequence.done, reverse=True)
        assert all(now >= then for now, then in zip(sequence.done, before, strict=True))
        assert sum(sequence.done) > sum(before)  # every pass does something
        if token is not None:
            produced.append(token)
    return produced


def assert_same(case: Case, sequence: Sequence, produced: list[Token], expected: Reference) -> None:
    """Tokens, depths, confidences, and whatever K/V the sequence has."""
    assert sequence.tokens == expected.tokens
    assert produced == sequence.produced
    assert [t.id for t in produced] == expected.tokens[len(case.prompt) :]
    assert [t.depth for t in produced] == expected.depths
    assert [t.confidence for t in produced] == expected.confidences
    assert sequence.done[0] == len(sequence.tokens) - 1
    assert min(sequence.done) >= len(case.prompt)
    stack = case.stack()
    for k, done in enumerate(sequence.done):
        for layer in stack.layers(k):
            np.testing.assert_array_equal(sequence.cache.entries[layer - 1, :done], expected.cache.entries[layer - 1, :done])


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@settings(max_examples=120, deadline=None)
@given(case=cases(), cap=st.integers(1, 9) | st.just(64))
def test_equals_the_reference(catch_up: str, case: Case, cap: int) -> None:
    engine = Engine(case.stack(), cap=cap)
    sequence = case.start(engine, catch_up)
    produced = finish(engine, sequence)
    assert_same(case, sequence, produced, reference(case, catch_up))
    assert sequence.finish_reason == "length"
    assert engine.sequences == []


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), cap=st.integers(1, 6))
def test_a_cap_moves_work_and_bounds_queues(catch_up: str, case: Case, cap: int) -> None:
    free, capped = Engine(case.stack(), cap=1000), Engine(case.stack(), cap=cap)
    capped.stack.trace = []
    without, sequence = finish(free, case.start(free, catch_up)), case.start(capped, catch_up)
    within = []
    while sequence.finish_reason is None:
        if sequence.level == 0 and not sequence.prefilling and schedule(sequence, cap).segment == 0:  # a token sets out
            assert max(-np.diff(sequence.done), default=0) < cap
        token = capped.step(sequence)
        within += [token] if token else []
    assert within == without
    largest = max((call.num_tokens for call in capped.stack.trace[len(case.exit_layers) * 2 :] if call.graph != "exit"), default=1)
    assert largest <= (cap + 1) * len(case.exit_layers)


@pytest.mark.parametrize("catch_up", CATCH_UPS)
def test_a_cap_settles_a_queue_that_nobody_needs(catch_up: str) -> None:
    """With every token leaving at the first exit, deeper segments run only because of the cap, `cap` tokens a pass."""
    calls = {}
    for cap in (4, 1000):
        stack = MockStack((2, 4, 6), confidence=lambda exit_index, position: 1.0)
        engine = Engine(stack, cap=cap)
        sequence = engine.start([1, 2, 3], max_new_tokens=20, policy=ExitPolicy.create("max-prob", [0.5], 3), catch_up=catch_up)
        next(engine.generate(sequence))
        sequence = engine.start([1, 2, 3], max_new_tokens=20, policy=ExitPolicy.create("max-prob", [0.5], 3), catch_up=catch_up)
        assert engine.step(sequence) is None  # segment 1 of 3 of the prefill
        engine.step(sequence)
        engine.step(sequence)
        stack.trace = []
        finish(engine, sequence)
        calls[cap] = [(c.graph, c.number, c.num_tokens) for c in stack.trace if c.number and c.graph != "exit"]
    graph = "kv" if catch_up == "propagate" else "segment"
    assert calls[1000] == []
    assert calls[4] == [(graph, 1, 4), (graph, 2, 4)] * 4


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_off_is_the_plain_model(catch_up: str, case: Case) -> None:
    """No threshold: a token a pass through every segment, one head call a token, whatever the catch-up."""
    case = Case(case.exit_layers, case.leaves_at, case.prompt, case.num_new, None, "max-prob", case.seed)
    stack = case.stack()
    stack.trace, engine = [], Engine(stack, cap=1)
    sequence = case.start(engine, catch_up)
    produced = finish(engine, sequence)
    segments, last = range(len(case.exit_layers)), len(case.exit_layers) - 1
    sizes = [len(case.prompt)] + [1] * (case.num_new - 1)
    expected = [call for size in sizes for call in [*(("segment", k, size) for k in segments), ("exit", last, 1)]]
    assert [(c.graph, c.number, c.num_tokens) for c in stack.trace] == expected
    assert {t.depth for t in produced} == {case.exit_layers[-1]}
    plain, sampler = case.stack(), case.sampler()
    tokens, cache = list(case.prompt), plain.open_cache()
    while len(tokens) < case.limit:  # one pass after the other, with no engine
        start = cache.filled[-1]
        inputs = np.array(tokens[start:], np.int64)
        for k in segments:
            out = plain.reserve_rows(len(tokens) - start, [inputs] if k else [])
            plain.run_segment(k, cache, start, inputs, out)
            inputs = np.arange(out, out + len(tokens) - start)
        tokens.append(sampler.pick(plain.run_exit(last, inputs[-1:]), len(tokens)))
    assert sequence.tokens == tokens
    np.testing.assert_array_equal(sequence.cache.entries, cache.entries)


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize("policy", ["max-prob", "margin", "entropy"])
def test_threshold_0_leaves_at_the_first_exit(catch_up: str, policy: str) -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.0))
    sequence = engine.start([5, 1], max_new_tokens=30, policy=ExitPolicy.create(policy, [0.0], 3), catch_up=catch_up)
    assert [t.depth for t in finish(engine, sequence)] == [2] * 30


@pytest.mark.parametrize("catch_up", CATCH_UPS)
def test_a_threshold_nobody_reaches_runs_every_layer(catch_up: str) -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.999))
    sequence = engine.start([5, 1], max_new_tokens=30, policy=ExitPolicy.create("max-prob", [1.0], 3), catch_up=catch_up)
    produced = finish(engine, sequence)
    off = engine.start([5, 1], max_new_tokens=30, catch_up=catch_up)
    assert [(t.id, t.depth) for t in produced] == [(t.id, 6) for t in finish(engine, off)]


def test_each_exit_has_its_own_threshold() -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.5))
    depths = {}
    for thresholds in [(0.4, 0.6), (0.6, 0.4), (0.6, 0.6), (0.5, 0.5)]:
        sequence = engine.start([5], max_new_tokens=4, policy=ExitPolicy.create("max-prob", thresholds, 3))
        depths[thresholds] = {t.depth for t in finish(engine, sequence)}
    assert depths == {(0.4, 0.6): {2}, (0.6, 0.4): {4}, (0.6, 0.6): {6}, (0.5, 0.5): {2}}


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@pytest.mark.parametrize("thresholds", [None, [0.0], [1.0]])
def test_the_prefill_runs_every_segment(catch_up: str, thresholds: list[float] | None) -> None:
    """And the last prompt position is predicted at the exit that its policy says, with no head call after it."""
    stack = MockStack((2, 4, 6), confidence=lambda exit_index, position: 0.5)
    stack.trace, engine = [], Engine(stack)
    sequence = engine.start([3, 1, 4, 1, 5], max_new_tokens=2, policy=ExitPolicy.create("max-prob", thresholds, 3), catch_up=catch_up)
    token = next(engine.generate(sequence))
    assert [(c.number, c.num_tokens) for c in stack.trace if c.graph == "segment"] == [(0, 5), (1, 5), (2, 5)]
    heads = [c.number for c in stack.trace if c.graph == "exit"]
    assert (token.depth, heads) == {None: (6, [2]), 0.0: (2, [0]), 1.0: (6, [0, 1, 2])}[thresholds and thresholds[0]]
    assert sequence.done == [5, 5, 5]


def test_propagate_never_runs_a_segment_for_pending_tokens() -> None:
    """Decoding: every segment pass is of one token; the others' K/V come from `run_kv`, each position exactly once."""
    stack = MockStack((1, 3, 4), confidence=lambda exit_index, position: float(exit_index >= (position * 7) % 3))
    stack.trace, engine = [], Engine(stack)
    sequence = engine.start([2, 7], max_new_tokens=40, policy=ExitPolicy.create("max-prob", [0.5], 3), catch_up="propagate")
    finish(engine, sequence)
    decoding = [c for c in stack.trace if c.cache_length > 2]
    assert {c.num_tokens for c in decoding if c.graph == "segment"} == {1}
    for k in (1, 2):
        assert sum(c.num_tokens for c in decoding if c.number == k) == sequence.done[k] - 2
    assert sum(c.num_tokens for c in decoding if c.graph == "kv") > 10


def test_recompute_runs_each_position_once_and_batched() -> None:
    stack = MockStack((1, 3, 4), confidence=lambda exit_index, position: float(exit_index >= (0 if position % 8 else 2)))
    stack.trace, engine = [], Engine(stack)
    sequence = engine.start([2, 7], max_new_tokens=40, policy=ExitPolicy.create("max-prob", [0.5], 3), catch_up="recompute")
    finish(engine, sequence)
    decoding = [(c.number, c.num_tokens) for c in stack.trace if c.graph == "segment" and c.cache_length > 2]
    assert [n for k, n in decoding if k == 1] == [7, 8, 8, 8, 8]  # positions 2..8, then 8 at a time
    assert [n for k, n in decoding if k == 2] == [7, 8, 8, 8, 8]
    assert [n for k, n in decoding if k == 0] == [1] * 39
    assert not [c for c in stack.trace if c.graph == "kv"]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), requests=st.lists(st.tuples(cases(), st.sampled_from(CATCH_UPS)), min_size=2, max_size=4), cap=st.integers(1, 9))
def test_interleaved_sequences_do_not_meet(data: st.DataObject, requests: list[tuple[Case, str]], cap: int) -> None:
    """Several sequences on one engine, in any order of steps: each as if alone. The mock moves every live row every time."""
    shape = requests[0][0]
    requests = [(Case(shape.exit_layers, None, c.prompt, c.num_new, _fit(c, shape), c.policy, c.seed), kind) for c, kind in requests]
    stack = MockStack(shape.exit_layers, vocab_size=VOCAB)
    engine = Engine(stack, cap=cap)
    sequences = [case.start(engine, kind) for case, kind in requests]
    while running := [s for s in sequences if s.finish_reason is None]:
        sequence = running[data.draw(st.integers(0, len(running) - 1), label="turn")]
        for _ in range(data.draw(st.integers(1, 4), label="steps")):
            if sequence.finish_reason is None:
                engine.step(sequence)
    for (case, kind), sequence in zip(requests, sequences, strict=True):
        assert_same(case, sequence, sequence.produced, reference(case, kind))
    assert engine.sequences == []


def _fit(case: Case, shape: Case) -> tuple[float, ...] | None:
    """A case's thresholds for the exits of another."""
    return None if not case.thresholds else (case.thresholds * 3)[: len(shape.exit_layers) - 1]


class Forced:
    """The given tokens as far as they go, then greedy."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def pick(self, output: HeadOutput, position: int) -> int:
        return self.tokens[position] if position < len(self.tokens) else Greedy().pick(output, position)


@pytest.mark.parametrize("catch_up", CATCH_UPS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), steps=st.integers(0, 40), length=st.integers(1, 24), replacement=st.integers(0, VOCAB - 1), cap=st.integers(1, 9))
def test_crop_then_continue_is_as_if_it_had_been_so(catch_up: str, case: Case, steps: int, length: int, replacement: int, cap: int) -> None:
    """Cut anywhere, at any moment after the prompt has run, and given another token: as a sequence that never went further."""
    case = Case(case.exit_layers, None, case.prompt, case.num_new + 2, case.thresholds, case.policy, None)
    engine = Engine(case.stack(), cap=cap)
    sequence = case.start(engine, catch_up)
    while not sequence.produced:
        engine.step(sequence)
    for _ in range(steps):
        if len(sequence.tokens) < case.limit - 1:
            engine.step(sequence)
    length, before = min(length, len(sequence.tokens) - 1), list(sequence.produced)
    sequence.crop(length)
    assert sequence.produced == before[: max(0, length - len(case.prompt))]
    sequence.tokens.append(replacement)
    history = list(sequence.tokens)
    finish(engine, sequence)
    fresh_engine = Engine(case.stack(), cap=cap)
    fresh = fresh_engine.start(
        history[: min(length, len(case.prompt))],
        max_new_tokens=case.limit - min(length, len(case.prompt)),
        policy=case.exit_policy(),
        catch_up=catch_up,
        sampler=Forced(history),
    )
    finish(fresh_engine, fresh)
    assert sequence.tokens == fresh.tokens
    num_after = len(fresh.tokens) - len(history)
    assert sequence.produced[len(sequence.produced) - num_after :] == fresh.produced[len(fresh.produced) - num_after :]
    for k in range(len(sequence.done)):
        done = min(sequence.done[k], fresh.done[k])
        for layer in case.stack().layers(k):
            np.testing.assert_array_equal(sequence.cache.entries[layer - 1, :done], fresh.cache.entries[layer - 1, :done])


def test_crop_forgets_what_was_produced_past_it() -> None:
    engine = Engine(MockStack())
    sequence = engine.start([1, 2, 3], max_new_tokens=10)
    while len(sequence.produced) < 4:
        engine.step(sequence)
    kept = sequence.produced[:2]
    sequence.crop(5)
    assert (len(sequence.tokens), sequence.produced, sequence.done, sequence.level) == (5, kept, [5, 5, 5], 0)
    with pytest.raises(AssertionError, match="needs its next token"):
        engine.step(sequence)


def test_stop_ids_end_a_sequence_and_free_its_rows() -> None:
    engine = Engine(MockStack((2, 4, 6), confidence=lambda exit_index, position: 1.0))
    policy = ExitPolicy.create("max-prob", [0.5], 3)
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
    cache, rows = stack.open_cache(), np.array([3, 9], np.int64)
    for k in range(2):
        out = stack.reserve_rows(2, [rows] if k else [])
        stack.run_segment(k, cache, 0, rows, out)
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
        ({"max_new_tokens": 0}, "max_new_tokens 0 is below 1"),
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
