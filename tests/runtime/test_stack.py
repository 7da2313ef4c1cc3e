"""ONNX Runtime's side of the stack, on a real bundle: to the bit, in place, and loud when something
is wrong.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_model
from ease_common.errors import BundleError, DeviceError
from ease_runtime.engine.engine import CATCH_UPS, Engine
from ease_runtime.engine.layout import Span
from ease_runtime.engine.sampling import Greedy, GumbelSampler
from ease_runtime.engine.sequence import Token, TokenSequence
from ease_runtime.ort import buffers, sessions
from ease_runtime.ort.buffers import DeviceCache, HiddenPool, RowCache
from ease_runtime.ort.device import Device
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import FULL_DEPTH, make_policy

NUM_TOKENS = 96
SIZES = (
    1,
    2,
    3,
    16,
    48,
    96,
)  # tokens a pass; none but the last is a whole number of the others, all divide 96
COPIED = "TensorScatter: in-place optimization not activated"


def some_ids(stack: OrtStack, num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, stack.vocab_size, num_tokens)


def run_all(
    stack: OrtStack, ids: np.ndarray, size: int, active: np.ndarray | None = None
) -> tuple[list[np.ndarray], RowCache]:
    """Every segment over `ids` in passes of `size`: the hidden states after each segment, and the cache."""
    cache = stack.open_cache()
    rows = ids
    states = []
    for k in range(len(stack.exit_layers)):
        out = stack.reserve_rows(2 * len(ids), [rows] if k else [])
        for start in range(0, len(ids), size):
            part = slice(start, min(start + size, len(ids)))
            stack.run_segment(
                k,
                cache,
                [Span(0, part.start, part.stop)],
                rows[part],
                out + start,
                None if active is None else active[part],
            )
        rows = np.arange(out, out + len(ids))
        states.append(stack.pool.states[rows].copy())
    return states, cache


def assert_equal_runs(
    one: tuple[list[np.ndarray], RowCache], other: tuple[list[np.ndarray], RowCache]
) -> None:
    for k, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"hidden states after segment {k}")
    length = len(one[0][0])
    np.testing.assert_array_equal(
        contents(one[1], length), contents(other[1], length), err_msg="keys and values"
    )


def contents(cache: RowCache, length: int = 128, slot: int = 0) -> np.ndarray:
    """Shape: (layers, 2, length, kv_dim)."""
    return np.array([cache.read(layer, slot, length) for layer in range(len(cache.segment_of))])


@pytest.fixture(scope="module")
def whole(tiny_stack: OrtStack) -> tuple[list[np.ndarray], RowCache]:
    """One pass of 96 tokens a segment."""
    return run_all(tiny_stack, some_ids(tiny_stack, NUM_TOKENS), NUM_TOKENS)


@pytest.mark.parametrize("step", [128, 192, 1024])
@pytest.mark.parametrize("size", SIZES)
def test_passes_are_bit_identical(
    tiny_stack: OrtStack,
    whole: tuple[list[np.ndarray], RowCache],
    size: int,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the number of tokens S, and the cache length T of whole 64s."""
    monkeypatch.setattr(buffers, "CACHE_STEP", step)
    found = run_all(tiny_stack, some_ids(tiny_stack, NUM_TOKENS), size)
    assert found[1].lengths == [step]
    assert_equal_runs(found, whole)


def test_states_and_kv_are_not_trivial(
    tiny_stack: OrtStack, whole: tuple[list[np.ndarray], RowCache]
) -> None:
    """Equal to the bit means something: every position and segment has states of its own, and another past
    gives others.
    """
    states, cache = whole
    for k in range(3):
        assert len(np.unique(states[k], axis=0)) == NUM_TOKENS
    assert (contents(cache)[..., :NUM_TOKENS, :] != 0).any(axis=-1).all()
    assert not contents(cache)[..., NUM_TOKENS:, :].any()
    ids = some_ids(tiny_stack, NUM_TOKENS)
    ids[0] = (ids[0] + 1) % tiny_stack.vocab_size
    other, _ = run_all(tiny_stack, ids, NUM_TOKENS)
    assert (other[2] != states[2]).any(axis=-1).all()


@pytest.mark.parametrize("size", SIZES)
def test_kv_graphs_write_what_frozen_tokens_have(tiny_stack: OrtStack, size: int) -> None:
    """`run_kv` in passes of any size, against segments with `active` False: K/V equal to the bit, states
    unchanged.
    """
    stack = tiny_stack
    ids = some_ids(tiny_stack, NUM_TOKENS)
    frozen = stack.open_cache()
    propagated = stack.open_cache()
    first = stack.reserve_rows(2 * NUM_TOKENS, [])
    whole = [Span(0, 0, NUM_TOKENS)]
    stack.run_segment(0, frozen, whole, ids, first)
    stack.run_segment(0, propagated, whole, ids, first)
    rows = np.arange(first, first + NUM_TOKENS)
    for k in (1, 2):
        out = stack.reserve_rows(NUM_TOKENS, [rows])
        stack.run_segment(k, frozen, whole, rows, out, np.zeros(NUM_TOKENS, np.bool_))
        np.testing.assert_array_equal(stack.pool.states[out : out + NUM_TOKENS], stack.pool.states[rows])
        for start in range(0, NUM_TOKENS, size):
            stack.run_kv(k, propagated, [Span(0, start, start + size)], rows[start : start + size])
    np.testing.assert_array_equal(contents(propagated), contents(frozen))
    assert contents(frozen)[..., :NUM_TOKENS, :].any(axis=-1).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_of_frozen_tokens_is_bit_identical_too(tiny_stack: OrtStack, size: int) -> None:
    ids = some_ids(tiny_stack, NUM_TOKENS)
    active = np.random.default_rng(5).random(NUM_TOKENS) < 0.5
    assert_equal_runs(run_all(tiny_stack, ids, size, active), run_all(tiny_stack, ids, NUM_TOKENS, active))


def test_head_figures_are_those_of_its_logits(tiny_stack: OrtStack) -> None:
    states, _ = run_all(tiny_stack, some_ids(tiny_stack, 40), 40)
    first = tiny_stack.reserve_rows(40, [])
    for k in range(3):
        tiny_stack.pool.states[first : first + 40] = states[k]
        output = tiny_stack.run_exit(k, np.arange(first, first + 40))
        logits = output.logits.astype(np.float64)
        logprobs = logits - logits.max(axis=1, keepdims=True)
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        top = np.sort(np.exp(logprobs), axis=1)
        np.testing.assert_array_equal(output.top_id, logits.argmax(axis=1))
        np.testing.assert_allclose(output.top_prob, top[:, -1], rtol=1e-5)
        np.testing.assert_allclose(output.margin, top[:, -1] - top[:, -2], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            output.entropy, -(np.exp(logprobs) * logprobs).sum(axis=1), rtol=1e-4, atol=1e-5
        )


# The cache in place


def test_no_cache_is_copied(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns when TensorScatter cannot write in place.

    First, that it would: with the cache bound elsewhere.
    """
    stack = OrtStack(tiny_bundle, log_level=2)
    ids = some_ids(stack, 150)
    _run_out_of_place(stack, ids[:3])
    assert capfd.readouterr().err.count(COPIED) == 4  # two layers, keys and values
    engine = Engine(stack, cap=5)
    for catch_up in CATCH_UPS:
        policy = make_policy("max-prob", [0.4], stack.exit_layers)
        sequence = engine.start(ids[:120].tolist(), max_new_tokens=30, policy=policy, catch_up=catch_up)
        assert len({token.depth for token in engine.generate(sequence)}) > 1
    captured = capfd.readouterr()
    assert "TensorScatter" not in captured.err + captured.out


def _run_out_of_place(stack: OrtStack, ids: np.ndarray) -> None:
    """The first segment with past and present in different buffers."""
    session = stack.segments[0].session
    shape = stack.open_cache().shape.buffer(1, 128)
    places = np.arange(len(ids))
    feed = {"input_ids": ids, "active": np.ones(len(ids), np.bool_), "write_indices": np.zeros(1, np.int64)}
    feed |= {"few": np.array(True), "products": np.array(False)}
    feed |= {"spread": places[None], "places": places}
    feed |= {i.name: np.zeros(shape, np.float32) for i in session.get_inputs() if i.name.startswith("past_")}
    io = session.io_binding()
    for name, array in feed.items():
        io.bind_cpu_input(name, array)
    for output in session.get_outputs():
        io.bind_output(output.name)
    session.run_with_iobinding(io)


def test_the_cache_grows_in_steps(tiny_stack: OrtStack) -> None:
    """Across lengths 128, 256 and 384 up to the context's end (288, no multiple of a step), token for token
    as without a cache.
    """
    ids = some_ids(tiny_stack, 100)
    engine = Engine(tiny_stack)
    tiny_stack.trace = []
    sequence = engine.start(ids.tolist(), max_new_tokens=1000)
    tokens = [token.id for token in engine.generate(sequence)]
    trace = tiny_stack.trace
    tiny_stack.trace = None
    assert [c.cache_length for c in trace if c.graph == "segment" and c.number == 2] == [128] * 29 + [
        256
    ] * 128 + [384] * 31
    assert len(tokens) == 188
    assert len(set(tokens)) > 10
    assert tokens == full_recomputation(tiny_stack, ids, 188)


def full_recomputation(stack: OrtStack, ids: np.ndarray, num_new: int) -> list[int]:
    """Greedy tokens, each from an empty cache and one pass a segment over everything so far."""
    history = ids
    for _ in range(num_new):
        cache = stack.open_cache()
        rows = history
        for k in range(len(stack.exit_layers)):
            out = stack.reserve_rows(2 * len(history), [rows] if k else [])
            stack.run_segment(k, cache, [Span(0, 0, len(history))], rows, out)
            rows = np.arange(out, out + len(history))
        history = np.append(history, stack.run_exit(len(stack.exit_layers) - 1, rows[-1:]).top_id[0])
    return history[len(ids) :].tolist()


# The engine on the real stack


def begin(engine: Engine, seed: int, catch_up: str, threshold: float | None) -> TokenSequence:
    """A seeded prompt and sampler, so that the texts differ and do not loop."""
    prompt = some_ids(engine.stack, 5 + 9 * seed, seed).tolist()
    policy = make_policy("max-prob", None if threshold is None else [threshold], engine.stack.exit_layers)
    return engine.start(
        prompt, max_new_tokens=60, policy=policy, catch_up=catch_up, sampler=GumbelSampler(0.8, 0, 1.0, seed)
    )


REQUESTS = [
    (0, "propagate", 0.4),
    (1, "recompute", 0.4),
    (2, "recompute", None),
    (3, "propagate", 0.2),
    (4, "recompute", 0.0),
]


@pytest.fixture(scope="module")
def alone(tiny_stack: OrtStack) -> list[list[Token]]:
    """Each request by itself, on an engine of its own."""
    tokens = []
    for request in REQUESTS:
        engine = Engine(tiny_stack)
        tokens.append(list(engine.generate(begin(engine, *request))))
    return tokens


def test_depths_vary(alone: list[list[Token]]) -> None:
    """What follows would prove little if every token had the same depth."""
    depths = [{token.depth for token in tokens} for tokens in alone]
    assert [len(d) > 1 for d in depths] == [True, True, False, True, False]
    assert depths[2] == {6}
    assert depths[4] == {2}


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(("pool_rows", "cap", "num_slots"), [(1, 3, 5), (1, 64, 2), (64, 3, 3), (64, 64, 5)])
def test_rows_of_a_batch_in_a_small_pool(
    tiny_bundle: Path,
    alone: list[list[Token]],
    pool_rows: int,
    cap: int,
    num_slots: int,
    always: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Together, with a pool so small that it grows and is packed (or packed at every pass): tokens and
    figures as alone, to the bit.
    """
    reserve = HiddenPool.reserve
    pack = HiddenPool._pack
    packs = []

    def hurried_reserve(pool: HiddenPool, num_rows: int, live: list[np.ndarray]) -> int:
        if always:
            pool.top = len(pool.states)
        return reserve(pool, num_rows, live)

    def spoiling_pack(pool: HiddenPool, num_rows: int, live: list[np.ndarray]) -> None:
        pack(pool, num_rows, live)
        pool.states[pool.top :] = np.nan  # what nobody keeps
        packs.append(num_rows)

    monkeypatch.setattr(buffers, "POOL_ROWS", pool_rows)
    monkeypatch.setattr(HiddenPool, "reserve", hurried_reserve)
    monkeypatch.setattr(HiddenPool, "_pack", spoiling_pack)
    stack = OrtStack(tiny_bundle)
    packs.clear()
    engine = Engine(stack, cap=cap, num_slots=num_slots)
    stack.trace = []
    sequences = [begin(engine, *request) for request in REQUESTS]
    while engine.busy:
        engine.step()
    assert [s.produced for s in sequences] == alone
    assert len(packs) >= (100 if always else 3)
    assert stack.pool.serial >= 1  # it has grown
    assert sum(c.num_slots > 1 for c in stack.trace if c.graph == "segment") > 50


def test_a_cap_changes_no_token_and_no_depth(tiny_stack: OrtStack, alone: list[list[Token]]) -> None:
    for cap in (1, 2, 7):
        engine = Engine(tiny_stack, cap=cap)
        assert [list(engine.generate(begin(engine, *request))) for request in REQUESTS] == alone


@pytest.mark.parametrize("seed", [None, 3])
def test_verify_says_what_full_depth_says(tiny_stack: OrtStack, seed: int | None) -> None:
    """Greedy and sampled, to the bit, alone and in a batch; and not because nothing was drafted."""
    layers = tiny_stack.exit_layers
    drafted = 0
    accepted = 0
    sampler = Greedy() if seed is None else GumbelSampler(0.9, 0, 1.0, seed)
    for num_slots in (1, 4):
        engine = Engine(tiny_stack, num_slots=num_slots)
        for policy in (make_policy("max-prob", [0.05], layers), make_policy("similarity", [0.5], layers)):
            prompts = [some_ids(tiny_stack, 5 + 20 * i, i).tolist() for i in range(4)]
            started = [
                [
                    engine.start(p, max_new_tokens=60, policy=chosen, catch_up="verify", sampler=sampler)
                    for p in prompts
                ]
                for chosen in (FULL_DEPTH, policy)
            ]
            while engine.busy:
                engine.step()
            for plain, verified in zip(*started, strict=True):
                assert [(t.id, t.logprob) for t in verified.produced] == [
                    (t.id, t.logprob) for t in plain.produced
                ]
                drafted = drafted + verified.drafts.judged
                accepted = accepted + verified.drafts.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("weights", ["large", "none"])
def test_a_batch_that_outgrows_its_cache(tiny_stack: OrtStack, weights: str) -> None:
    """Rows of very different lengths, past T = 128 and 256 and up to the context's end, with pads past it:
    tokens as alone, in one pass, and in passes by length, which pay where weights cost nothing.
    """
    lengths = [3, 60, 120, 250]
    limit = tiny_stack.max_positions
    prompts = [some_ids(tiny_stack, length, length).tolist() for length in lengths]
    policy = make_policy("max-prob", [0.4], tiny_stack.exit_layers)

    def start(engine: Engine, prompt: list[int]) -> TokenSequence:
        return engine.start(prompt, max_new_tokens=1000, policy=policy)

    expected = []
    for prompt in prompts:
        engine = Engine(tiny_stack)
        expected.append(list(engine.generate(start(engine, prompt))))
    engine = Engine(tiny_stack, num_slots=4)
    assert isinstance(engine.cache, RowCache)
    engine.cache.weight_positions = {"large": 1e9, "none": 0.0}[weights]
    tiny_stack.trace = []
    sequences = [start(engine, prompt) for prompt in prompts]
    nearest_end = limit
    while engine.busy:
        engine.step()
        for sequence in engine.running:
            nearest_end = min(nearest_end, limit - len(sequence.tokens))
    trace = tiny_stack.trace
    tiny_stack.trace = None
    assert [s.produced for s in sequences] == expected
    assert nearest_end == 0 or {len(s.tokens) for s in sequences} == {limit}
    batched = [c for c in trace if c.graph == "segment" and c.num_slots > 1]
    assert {c.cache_length for c in batched} >= ({256, 384} if weights == "large" else {128, 256})
    assert not engine.cache.tables  # nobody needs it
    filled = sum(contents(engine.cache, len(s.tokens)).nbytes for s in sequences)
    assert 0 < engine.cache.copied_bytes < 2 * filled


def test_one_broken_row_leaves_its_neighbours_alone(tiny_stack: OrtStack) -> None:
    """A hidden state that is no number, with a neighbour on each side in the same passes, and a later request
    in the same slot.
    """
    prompts = [some_ids(tiny_stack, 9 + 3 * i, i).tolist() for i in range(4)]
    expected = []
    for prompt in prompts:
        engine = Engine(tiny_stack)
        expected.append(list(engine.generate(engine.start(prompt, max_new_tokens=30))))
    engine = Engine(tiny_stack, num_slots=3)
    sequences = [engine.start(prompt, max_new_tokens=30) for prompt in prompts]
    victim = sequences[1]
    while engine.busy:
        if len(victim.tokens) > 20 and victim.counters.done[0] > victim.counters.done[-1]:
            tiny_stack.pool.states[victim.counters.live_rows()[0]] = np.nan
        engine.step()
    assert [s.finish_reason for s in sequences] == ["length", "error", "length", "length"]
    assert "no finite numbers" in victim.error
    for i in (0, 2, 3):
        assert sequences[i].produced == expected[i]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 20))
def test_the_pool_keeps_what_lives(data: st.DataObject, rows: int) -> None:
    """HiddenPool against a dictionary: after any reservations, the living rows hold what was written, and
    free rows are free.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "POOL_ROWS", rows)
        pool = HiddenPool(2)
    owners: list[tuple[np.ndarray, np.ndarray]] = []  # rows of each, and what they must hold
    written = 0
    for _ in range(data.draw(st.integers(1, 12))):
        num_rows = data.draw(st.integers(1, 9))
        serial = pool.serial
        size = len(pool.states)
        first = pool.reserve(num_rows, [rows for rows, _ in owners])
        assert (pool.serial != serial) == (len(pool.states) != size)
        new = np.arange(first, first + num_rows)
        assert new[-1] < len(pool.states)
        named = np.concatenate([new, *(rows for rows, _ in owners)])
        assert len(np.unique(named)) == len(named)
        values = np.arange(written, written + num_rows, dtype=np.float32)[:, None].repeat(2, axis=1)
        written += num_rows
        pool.states[new] = values
        owners.append((new, values))
        owners = [
            (rows[cut:], values[cut:])
            for rows, values in owners
            if (cut := data.draw(st.integers(0, len(rows)))) < len(rows)
        ]
        for rows_of, expected in owners:
            np.testing.assert_array_equal(pool.states[rows_of], expected)


def test_more_pass_sizes_than_bindings_are_kept(
    tiny_stack: OrtStack, whole: tuple[list[np.ndarray], RowCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bindings are forgotten and built again, and the tokens of a pass still land where they should."""
    monkeypatch.setattr(sessions, "BINDINGS_KEPT", 2)
    for graph in tiny_stack.segments:
        graph.bindings.clear()
    for size in (5, 11, 13, 5, 11):
        assert_equal_runs(run_all(tiny_stack, some_ids(tiny_stack, NUM_TOKENS), size), whole)
    assert all(len(graph.bindings) == 2 for graph in tiny_stack.segments)


# Loading


def test_the_self_test_sees_a_wrong_mask(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask aligned top-left, as before onnxruntime 1.31: several tokens on a filled cache see only
    its beginning.
    """
    right = OrtStack.run_segment

    def top_left(
        self: OrtStack, number: int, cache: RowCache, spans: list[Span], inputs: np.ndarray, out_row: int
    ) -> None:
        if len(inputs) > 1 and spans[0].start:
            right(self, number, self.open_cache(), [Span(0, 0, len(inputs))], inputs, out_row)
        else:
            right(self, number, cache, spans, inputs, out_row)

    monkeypatch.setattr(OrtStack, "run_segment", top_left)
    with pytest.raises(DeviceError) as caught:
        OrtStack(tiny_bundle)
    message = str(caught.value)
    assert "self-test failed" in message
    assert "pip install 'onnxruntime>=1.31'" in message
    assert "\n" not in message


def test_the_self_test_sees_numbers_that_are_none(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OrtStack.run_segment

    def not_a_number(
        self: OrtStack, number: int, cache: RowCache, spans: list[Span], inputs: np.ndarray, out_row: int
    ) -> None:
        right(self, number, cache, spans, inputs, out_row)
        self.pool.states[out_row + len(inputs) - 1, 0] = np.nan

    monkeypatch.setattr(OrtStack, "run_segment", not_a_number)
    with pytest.raises(BundleError, match="its first segment gives no finite numbers"):
        OrtStack(tiny_bundle)


Spans = list[Span]


@pytest.mark.parametrize(
    "inexact",
    [
        lambda spans: len(spans) == 1 and spans[0].start > 90 and spans[0].stop - spans[0].start > 1,
        lambda spans: len(spans) > 1,
        lambda spans: spans[0].stop - spans[0].start > 16,
    ],
    ids=["behind long texts", "in a batch", "of many tokens"],
)
def test_passes_that_differ_are_not_called_exact(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, inexact: Callable[[Spans], bool]
) -> None:
    """Wherever the last bits of a pass of several tokens differ: a short text alone does not show it."""
    right = OrtStack.run_segment

    def rounded(
        self: OrtStack, number: int, cache: RowCache, spans: Spans, inputs: np.ndarray, out_row: int
    ) -> None:
        right(self, number, cache, spans, inputs, out_row)
        if inexact(spans):
            states = self.pool.states[out_row : out_row + len(inputs)]
            states[:] = np.nextafter(states, np.float32(np.inf))

    assert OrtStack(tiny_bundle).exact
    monkeypatch.setattr(OrtStack, "run_segment", rounded)
    stack = OrtStack(tiny_bundle)
    assert not stack.exact
    assert not stack.even


@pytest.mark.parametrize(("longest", "exact"), [(600, False), (300, True)], ids=["tried", "too long to try"])
def test_passes_over_a_step_of_a_buffers_length_are_tried_on_a_gpu(
    long: Path, monkeypatch: pytest.MonkeyPatch, longest: int, exact: bool
) -> None:
    """There the first of several tokens may lie in a longer buffer than it does alone, whose length is among
    what sums are divided by. Texts are tried as far as their keys and values take little memory.
    """
    right = OrtStack.run_segment

    def by_length(
        self: OrtStack, number: int, cache: DeviceCache, spans: Spans, inputs: np.ndarray, out_row: int
    ) -> None:
        right(self, number, cache, spans, inputs, out_row)
        if cache.num_slots == 1 and buffers.rounded(spans[0].stop) > 512:
            rows = self.pool.read(np.arange(out_row, out_row + len(inputs)))
            where = self.pool.row_pointer(out_row)
            self.device.memory.upload(where, np.nextafter(rows, np.float32(np.inf)))

    elsewhere = Device("cpu", "CPUExecutionProvider", own_memory=True)
    stack = OrtStack(long, device=elsewhere)
    assert stack.exact
    monkeypatch.setattr(OrtStack, "run_segment", by_length)
    token_bytes = 2 * stack.layers_cached[0] * stack.manifest.kv_dim * 4
    monkeypatch.setattr("ease_runtime.ort.load_tests.MOST_TRIED_BYTES", longest * token_bytes)
    assert OrtStack(long, device=elsewhere).exact == exact


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context that goes past a step of a device's buffers."""
    pytest.importorskip("torch", reason="no torch to export a bundle with")
    from ease_export.build import export_bundle

    path = tmp_path_factory.mktemp("long")
    tiny_model.write_checkpoint(path / "checkpoint", (2, 6), max_positions=600)
    export_bundle(path / "checkpoint", path / "bundle", target="cuda")
    return path / "bundle"


def test_one_thread_pool_for_the_process(
    tiny_bundle: Path, tiny_stack: OrtStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set once, however many stacks load; every session uses it."""
    assert sessions.start_thread_pool.cache_info().currsize == 1  # `tiny_stack` has set it for good
    sizes = []
    own_threads = []
    sessions.start_thread_pool.cache_clear()
    monkeypatch.setattr(ort, "set_global_thread_pool_sizes", lambda *size: sizes.append(size))
    load = ort.InferenceSession

    def loaded(path: str, options: ort.SessionOptions, **kwargs: object) -> ort.InferenceSession:
        own_threads.append(options.use_per_session_threads)
        return load(path, options, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", loaded)
    OrtStack(tiny_bundle)
    OrtStack(tiny_bundle)
    assert sizes == [(0, 1)]
    assert (
        own_threads == [False] * 2 * 10
    )  # 3 segments, 2 kv graphs, 3 exits, 1 head that they share, the similarity


def test_another_number_of_threads_is_refused(tiny_bundle: Path, tiny_stack: OrtStack) -> None:
    """ONNX Runtime's pool cannot be replaced once it is there."""
    assert tiny_stack.segments  # has started it
    with pytest.raises(DeviceError, match="another number of threads") as caught:
        OrtStack(tiny_bundle, num_threads=2)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_no_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "segment.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BundleError) as caught:
        sessions.load_session(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_propagates_into_the_first_segment(tiny_stack: OrtStack) -> None:
    with pytest.raises(AssertionError, match="nothing to propagate"):
        tiny_stack.run_kv(0, tiny_stack.open_cache(), [Span(0, 0, 1)], np.zeros(1, np.int64))
