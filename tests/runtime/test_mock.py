"""The mock itself: right work is equal to the bit however it is cut, and every kind of wrong work is seen."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_runtime.engine.layout import Call, Span
from ease_runtime.engine.mock import MockCache, MockStack

IDS = np.array([4, 8, 15, 16, 2, 3, 9, 1], np.int64)


def run(stack: MockStack, cache: MockCache, sizes: list[int], active: np.ndarray | None = None) -> np.ndarray:
    """IDS through every segment, each segment in passes of these sizes; the last segment's states."""
    rows = IDS
    for k in range(len(stack.exit_layers)):
        done = rows[:0]
        start = 0
        for size in sizes:
            out = stack.reserve_rows(2 * size, [done, *([rows[start:]] if k else [])])
            inputs = rows[start : start + size]
            stack.run_segment(
                k,
                cache,
                at(start, inputs),
                inputs,
                out,
                None if active is None else active[start : start + size],
            )
            done = np.append(done, np.arange(out, out + size))
            start = start + size
        rows = done
    return stack.pool.states[rows].copy()


def at(start: int, tokens: np.ndarray) -> list[Span]:
    """The tokens at start.. of the only slot."""
    return [Span(0, start, start + len(tokens))]


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 8), min_size=8, max_size=8),
    active=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_passes_may_be_cut_anywhere(cuts: list[int], active: list[bool]) -> None:
    sizes = []
    for cut in cuts:
        sizes.append(min(cut, len(IDS) - sum(sizes)))
    sizes = [size for size in sizes if size]
    stack = MockStack()
    whole = MockStack()
    mask = np.array(active)
    cache = stack.open_cache()
    expected = whole.open_cache()
    np.testing.assert_array_equal(run(stack, cache, sizes, mask), run(whole, expected, [8], mask))
    np.testing.assert_array_equal(cache.entries, expected.entries)


def test_every_earlier_token_its_place_and_its_layer_matter() -> None:
    stack = MockStack()
    cache = stack.open_cache()
    states = run(stack, cache, [8])
    assert len(set(states.tolist())) == 8
    for layer in range(6):
        for position in range(7):
            other = stack.open_cache()
            run(stack, other, [8])
            other.entries[0, layer, position] ^= np.uint64(1)  # one bit of one key
            for k in range(3):
                other.filled[0][k] = 7
            rows = IDS[7:]
            for k in range(3):
                out = stack.reserve_rows(2, [rows] if k else [])
                stack.run_segment(k, other, at(7, rows), rows, out)
                rows = np.array([out])
            assert stack.pool.states[rows[0]] != states[7]


def test_frozen_tokens_pass_through_and_leave_the_kv_that_run_kv_writes() -> None:
    stack = MockStack((1, 3))
    first = stack.reserve_rows(16, [])
    cache = stack.open_cache()
    stack.run_segment(0, cache, at(0, IDS), IDS, first)
    caches = [copy.deepcopy(cache) for _ in range(3)]
    rows = np.arange(first, first + 8)
    states = stack.pool.states[rows].copy()
    out = stack.reserve_rows(16, [rows])
    stack.run_segment(1, caches[0], at(0, rows), rows, out, np.zeros(8, np.bool_))
    np.testing.assert_array_equal(stack.pool.states[out : out + 8], states)
    stack.run_kv(1, caches[1], at(0, rows), rows)
    np.testing.assert_array_equal(caches[0].entries, caches[1].entries)
    stack.run_segment(1, caches[2], at(0, rows), rows, out + 8)
    assert (caches[2].entries[0, 1] == caches[1].entries[0, 1]).all()  # the first layer sees the same states
    assert (caches[2].entries[0, 2, :8] != caches[1].entries[0, 2, :8]).all()  # the second one does not


def test_live_rows_move_and_the_others_are_gone() -> None:
    stack = MockStack()
    cache = stack.open_cache()
    first = stack.reserve_rows(16, [])
    stack.run_segment(0, cache, at(0, IDS), IDS, first)
    kept = np.arange(first + 4, first + 8)
    lost = np.arange(first, first + 4)
    states = stack.pool.states[kept].copy()
    before = kept.copy()
    out = stack.reserve_rows(3, [kept[2:], kept[:2]])
    assert not set(kept.tolist()) & {out, out + 1, out + 2}
    assert (kept != before).all()
    np.testing.assert_array_equal(stack.pool.states[kept], states)
    stack.run_exit(0, kept)
    with pytest.raises(AssertionError):
        stack.run_exit(0, np.setdiff1d(lost, kept))


def test_scripted_confidences_by_exit_and_position() -> None:
    stack = MockStack((2, 4), confidence=lambda exit_index, position: exit_index / 2 + position / 16)
    cache = stack.open_cache()
    first = stack.reserve_rows(16, [])
    stack.run_segment(0, cache, at(0, IDS), IDS, first)
    rows = np.arange(first, first + 8)
    np.testing.assert_array_equal(stack.run_exit(0, rows[[3, 5]]).top_prob, np.float32([3 / 16, 5 / 16]))
    output = stack.run_exit(0, rows)
    np.testing.assert_array_equal(output.margin, np.arange(8, dtype=np.float32) / 16)
    np.testing.assert_allclose(1 - output.entropy / np.log(stack.vocab_size), np.arange(8) / 16, atol=1e-6)
    out = stack.reserve_rows(8, [rows])
    stack.run_segment(1, cache, at(0, rows), rows, out)
    np.testing.assert_array_equal(
        stack.run_exit(1, np.arange(out, out + 2)).top_prob, np.float32([1 / 2, 9 / 16])
    )


def test_unscripted_figures_are_those_of_the_logits() -> None:
    stack = MockStack()
    first = stack.reserve_rows(16, [])
    stack.run_segment(0, stack.open_cache(), at(0, IDS), IDS, first)
    output = stack.run_exit(0, np.arange(first, first + 8))
    probabilities = np.exp(output.logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    ordered = np.sort(probabilities, axis=1)[:, ::-1]
    np.testing.assert_array_equal(output.top_id, probabilities.argmax(axis=1))
    np.testing.assert_allclose(output.top_prob, ordered[:, 0], rtol=1e-5)
    np.testing.assert_allclose(output.margin, ordered[:, 0] - ordered[:, 1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        output.entropy, -(probabilities * np.log(probabilities)).sum(axis=1), rtol=1e-5
    )


def test_an_output_is_spoilt_by_the_next_call() -> None:
    stack = MockStack()
    first = stack.reserve_rows(16, [])
    stack.run_segment(0, stack.open_cache(), at(0, IDS), IDS, first)
    output = stack.run_exit(0, np.array([first]))
    stack.run_exit(0, np.array([first + 1]))
    assert np.isnan(output.logits).all()
    assert np.isnan(output.top_prob[0])
    assert output.top_id[0] == -1


def test_calls_are_traced() -> None:
    stack = MockStack((1, 2))
    cache = stack.open_cache()
    first = stack.reserve_rows(16, [])
    stack.run_segment(0, cache, at(0, IDS), IDS, first)  # before anyone traces
    rows = np.arange(first, first + 8)
    stack.trace = []
    stack.run_kv(1, cache, at(0, rows[:5]), rows[:5])
    out = stack.reserve_rows(3, [rows])
    stack.run_segment(1, cache, at(5, rows[5:]), rows[5:], out)
    stack.run_exit(1, np.array([out, out + 2]))
    assert stack.trace == [Call("kv", 1, 5, 5), Call("segment", 1, 3, 8), Call("exit", 1, 2, 0)]


class Filled:
    """A stack whose first segment has run for IDS, and their rows."""

    def __init__(self) -> None:
        self.stack = MockStack((2, 4, 6), max_positions=10)
        self.cache = self.stack.open_cache()
        first = self.stack.reserve_rows(2 * len(IDS), [])
        self.stack.run_segment(0, self.cache, at(0, IDS), IDS, first)
        self.rows = np.arange(first, first + len(IDS))
        self.out = self.stack.reserve_rows(16, [self.rows])


FAULTS = {
    "a gap in the first segment": (
        lambda f: f.stack.run_segment(0, f.cache, at(9, IDS[:1]), IDS[:1], f.out),
        "leaves a gap",
    ),
    "a gap in a later segment": (
        lambda f: f.stack.run_segment(1, f.cache, at(1, f.rows[1:]), f.rows[1:], f.out),
        "leaves a gap",
    ),
    "a gap in propagated K/V": (
        lambda f: f.stack.run_kv(1, f.cache, at(1, f.rows[1:]), f.rows[1:]),
        "leaves a gap",
    ),
    "no tokens": (
        lambda f: f.stack.run_segment(1, f.cache, at(0, f.rows[:0]), f.rows[:0], f.out),
        "no token",
    ),
    "past the context": (
        lambda f: f.stack.run_segment(0, f.cache, at(8, IDS[:3]), IDS[:3], f.out),
        "past the context",
    ),
    "a token outside the vocabulary": (
        lambda f: f.stack.run_segment(0, f.cache, at(8, IDS[:1] + 50), IDS[:1] + 50, f.out),
        "outside the vocabulary",
    ),
    "another order": (
        lambda f: f.stack.run_segment(1, f.cache, at(0, f.rows[::-1]), f.rows[::-1], f.out),
        "run at",
    ),
    "another position": (lambda f: f.stack.run_kv(1, f.cache, at(0, f.rows[1:]), f.rows[1:]), "run at"),
    "a segment skipped": (
        lambda f: f.stack.run_segment(2, f.cache, at(0, f.rows), f.rows, f.out),
        "does not come from segment 1",
    ),
    "another exit": (lambda f: f.stack.run_exit(1, f.rows), "does not come from segment 1"),
    "a row that nobody wrote": (lambda f: f.stack.run_exit(0, np.array([f.out])), "holds no state"),
    "a row that is not there": (lambda f: f.stack.run_exit(0, np.array([999])), "holds no state"),
    "a dead row kept alive": (lambda f: f.stack.reserve_rows(1, [np.array([0])]), "holds no state"),
    "a row twice alive": (lambda f: f.stack.reserve_rows(1, [f.rows, f.rows[:1]]), "living twice"),
    "writing over a living row": (
        lambda f: f.stack.run_segment(1, f.cache, at(0, f.rows), f.rows, int(f.rows[0])),
        "not reserved",
    ),
    "writing past the reserved rows": (
        lambda f: f.stack.run_segment(1, f.cache, at(0, f.rows), f.rows, f.out + 9),
        "not reserved",
    ),
    "propagating into the first segment": (
        lambda f: f.stack.run_kv(0, f.cache, at(0, IDS), IDS),
        "nothing to propagate",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str) -> None:
    wrong, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        wrong(Filled())


def test_rows_are_written_once() -> None:
    filled = Filled()
    filled.stack.run_segment(1, filled.cache, at(0, filled.rows), filled.rows, filled.out)
    with pytest.raises(AssertionError, match="not reserved"):
        filled.stack.run_segment(0, filled.cache, at(8, IDS[:2]), IDS[:2], filled.out)


def test_a_state_runs_a_segment_once() -> None:
    filled = Filled()
    filled.stack.run_segment(1, filled.cache, at(0, filled.rows), filled.rows, filled.out)
    with pytest.raises(AssertionError, match="been through segment 1 before"):
        filled.stack.run_kv(
            1,
            filled.cache,
            at(0, np.arange(filled.out, filled.out + 8)),
            np.arange(filled.out, filled.out + 8),
        )


def test_what_a_rewritten_cache_held_past_the_writing_is_stale() -> None:
    filled = Filled()
    filled.stack.run_segment(
        0, filled.cache, at(3, IDS[:1]), IDS[:1], filled.out
    )  # position 3 anew: positions 4..7 no longer count
    with pytest.raises(AssertionError, match="holds 4 positions: writing at 8"):
        filled.stack.run_segment(0, filled.cache, at(8, IDS[:1]), IDS[:1], filled.out + 1)


def test_pads_fall_on_what_a_slot_in_between_does_not_hold_yet() -> None:
    """A pass over slots 0 and 2 writes past the end of slot 1, and of slot 2, which has less new; what they
    hold stays.
    """
    stack = MockStack((2, 4), max_positions=10)
    ids = IDS[:3]
    cache = stack.open_cache(3)
    for slot in range(3):
        out = stack.reserve_rows(6, [])
        stack.run_segment(0, cache, [Span(slot, 0, 3)], ids, out)
    before = cache.entries.copy()
    out = stack.reserve_rows(8, [])
    stack.run_segment(0, cache, [Span(0, 3, 6), Span(2, 3, 4)], IDS[:4], out)
    np.testing.assert_array_equal(cache.entries[:, :, :3], before[:, :, :3])
    assert (cache.entries[1, :2, 3:6] != before[1, :2, 3:6]).all()
    assert (cache.entries[2, :2, 4:6] == cache.entries[1, :2, 4:6]).all()
    assert [filled[:2] for filled in cache.filled] == [[6, 0], [3, 0], [4, 0]]


def test_similarity_compares_a_state_with_the_one_before_its_segment() -> None:
    filled = Filled()
    embedded = filled.rows  # not the embeddings, and of the same segment
    with pytest.raises(AssertionError, match="does not come from before the segment"):
        filled.stack.run_similarity(filled.rows, embedded)
    filled.stack.run_segment(1, filled.cache, at(0, filled.rows), filled.rows, filled.out)
    after = np.arange(filled.out, filled.out + len(IDS))
    values = filled.stack.run_similarity(after, filled.rows)
    assert ((values >= 0) & (values <= 1)).all()
    with pytest.raises(AssertionError, match="two positions"):
        filled.stack.run_similarity(after, filled.rows[::-1])
