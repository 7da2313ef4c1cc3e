"""Where rows lie: in buffers of about their own length, however they grow, are cut and come and go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_runtime.engine.layout import Span
from ease_runtime.ort.buffers import CacheShape, RowCache, Run, rounded, shared_lengths

SHAPE = CacheShape(heads=2, width=4, by_head=True)
NUM_LAYERS = 3
BYTES = 2 * NUM_LAYERS * SHAPE.numbers * 4  # of a position


def opened(num_slots: int, weight_positions: float = 0.0) -> RowCache:
    """A cache of two segments, of two layers and of one; weights of as many bytes as some positions."""
    return RowCache([2, 1], num_slots, SHAPE, int(weight_positions * BYTES))


def positions_read(runs: list[Run]) -> int:
    """What passes go over: T for each row, with those that are only stepped over."""
    return sum(run.length * len(run.write_indices) for run in runs)


def one_each(lengths: list[int]) -> list[Span]:
    """A new token for each row."""
    return [Span(slot, length, length + 1) for slot, length in enumerate(lengths)]


def filled(lengths: list[int], weight_positions: float) -> RowCache:
    """With rows of some lengths, written in one piece each."""
    cache = opened(len(lengths), weight_positions)
    for part in (0, 1):
        for slot, length in enumerate(lengths):
            cache.runs(part, [Span(slot, 0, length)])
    return cache


@pytest.mark.parametrize("longest", [0, 3, 7])
@pytest.mark.parametrize("weight_positions", [1300.0, 9000.0])  # SmolLM2-135M in int4 and fp32
def test_a_row_pays_for_its_own_length(longest: int, weight_positions: float) -> None:
    """One slot at 8,192 and seven at 128: the seven go over what they would alone, up to a tenth."""
    lengths = [127] * 8
    lengths[longest] = 8191
    cache = filled(lengths, weight_positions)
    runs = cache.runs(0, one_each(lengths))
    (long,) = (run for run in runs if longest in [span.slot for span in run.spans])
    assert [span.slot for span in long.spans] == [longest]
    others = [run for run in runs if run is not long]
    assert len(others) == 1
    own = 7 * 128
    assert positions_read(others) <= own + 128 * (0 < longest < 7)  # the long one's place is stepped over
    assert long.length == 8192


def test_rows_of_about_the_same_length_share_a_pass() -> None:
    lengths = [1000, 1100, 900, 1090]
    runs = filled(lengths, 1300.0).runs(0, one_each(lengths))
    assert [(len(run.spans), run.length) for run in runs] == [(4, 1152)]


@pytest.mark.parametrize("length", [1000, 4000, 8100])
def test_growing_copies_little_of_what_decoding_reads(length: int) -> None:
    """Alone, and as the longest of eight."""
    for lengths in ([length], [length - 50 * i for i in range(8)]):
        cache = filled(lengths, 1300.0)
        cache.copied_bytes = 0
        read = 0
        for step in range(600):
            for part in (0, 1):
                runs = cache.runs(part, one_each([n + step for n in lengths]))
            read += positions_read(runs) * BYTES
        assert 0 < cache.copied_bytes < 0.02 * read


def test_a_cut_text_does_not_keep_its_length() -> None:
    cache = filled([6000], 1300.0)
    (deep,) = cache.runs(1, one_each([6000]))
    assert deep.length == rounded(6001) == 6144
    (first,) = cache.runs(0, one_each([70]))
    assert first.length == 6144, "the second segment still holds it"
    (deep,) = cache.runs(1, one_each([70]))
    assert deep.length == 128
    cache.free(0)
    assert not cache.tables


def test_what_a_freed_or_stepped_over_slot_held_is_gone() -> None:
    """So that what is no number cannot reach the next row there."""
    cache = filled([300, 300, 300], 1e9)
    (run,) = cache.runs(0, one_each([300, 300, 300]))
    for buffer in cache.tables[run.length].layer(0):
        buffer[:] = np.nan
    cache.free(1)
    assert not np.array(cache.tables[run.length].layer(0))[:, 1].any()
    cache.scrub()
    kept = np.array(cache.tables[run.length].layer(0))[:, [0, 2]]
    assert np.isnan(kept[..., :301, :]).all()
    assert not kept[..., 301:, :].any()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.sampled_from([0.0, 1.0, 3.0, 100.0]))
def test_shared_lengths_cost_least(needed: list[int], weight_positions: float) -> None:
    """Against every way to cut the rows, sorted by length, into neighbours."""

    def cost(lengths: list[int]) -> float:
        return sum(lengths) + weight_positions * len(set(lengths))

    found = shared_lengths(needed, weight_positions)
    assert all(length >= need for length, need in zip(found, needed, strict=True))
    rows = sorted(needed)
    best = float("inf")
    for cuts in range(2 ** (len(rows) - 1)):
        lengths = list(rows)
        for place in range(len(rows) - 2, -1, -1):
            if cuts >> place & 1:
                lengths[place] = lengths[place + 1]
        best = min(best, cost(lengths))
    assert cost(found) <= best


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_keep_what_was_written(data: st.DataObject) -> None:
    """Random passes, cuts and frees over four slots, against what was written, number by number."""
    cache = opened(4, data.draw(st.sampled_from([0.0, 300.0, 1e6])))
    expected: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        if expected and data.draw(st.booleans()):
            slot = data.draw(st.sampled_from(sorted(expected)))
            if data.draw(st.booleans()):
                cache.free(slot)
                del expected[slot]
            else:
                expected[slot] = data.draw(st.integers(0, expected[slot]))
        slots = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
        count = data.draw(st.sampled_from([1, 3, 200]))
        spans = []
        for slot in slots:
            start = expected.get(slot, 0)
            spans.append(Span(slot, start, start + data.draw(st.integers(1, count))))
        for part, layers in ((0, (0, 1)), (1, (2,))):
            places = max(stop - start for _, start, stop in spans)
            taken = set()
            for run in cache.runs(part, spans):
                table = cache.tables[run.length]
                rows = range(run.first, run.first + len(run.write_indices))
                for slot, index in zip(rows, run.write_indices, strict=True):
                    assert index + places <= run.length, "room for pads"
                    for layer in layers:
                        for buffer in table.layer(layer):
                            buffer[slot, :, index : index + places] = -1.0  # a pad
                for slot, start, stop in run.spans:
                    taken.add(slot)
                    for layer in layers:
                        for which, buffer in enumerate(table.layer(layer)):
                            buffer[slot, :, start:stop] = content(slot, layer, which)[:, start:stop]
            assert taken == set(slots)
        for slot, _, stop in spans:
            expected[slot] = stop
        for slot, length in expected.items():
            for layer in range(NUM_LAYERS):
                want = [content(slot, layer, which)[:, :length] for which in (0, 1)]
                flat = np.array(want).swapaxes(1, 2).reshape(2, length, SHAPE.numbers)
                np.testing.assert_array_equal(cache.read(layer, slot, length), flat)


def content(slot: int, layer: int, which: int) -> np.ndarray:
    """What a slot holds. Shape: (heads, 3000, width)."""
    first = 1.0 + 1e5 * (2 * layer + which) + 1e4 * slot
    return (
        (first + np.arange(3000 * SHAPE.numbers)).astype(np.float32).reshape(SHAPE.heads, 3000, SHAPE.width)
    )
