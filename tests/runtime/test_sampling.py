"""Sampling against the distribution it claims, and the filters against their definitions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_common.errors import RequestError
from ease_runtime.engine import sampling
from ease_runtime.engine.sampling import (
    AdjustedGreedy,
    Adjustments,
    Given,
    Greedy,
    GumbelSampler,
    Sampler,
    gumbel_noise,
    seed_of,
)

DRAWS = 6_000


def pick(sampler: Sampler, logits: np.ndarray, position: int, tokens: Sequence[int] = ()) -> int:
    """What a sampler takes after `tokens`, told the truth about the largest logit."""
    return sampler.pick(logits, int(logits.argmax()), [*tokens, *[0] * (position - len(tokens))], position)


def some_logits(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 1.5, size).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def brute_force_kept(probabilities: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> set[int]:
    """The k most probable, then the fewest most probable of those that have top_p of their mass, then those
    of min_p times the largest.
    """
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k:
        order = order[:top_k]
    total = math.fsum(probabilities[i] for i in order)
    mass = 0.0
    kept = set()
    for i in order:
        if mass >= top_p * total:
            break
        kept.add(i)
        mass += probabilities[i]
    return {i for i in kept if probabilities[i] >= min_p * max(probabilities)}


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty 1931)."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def draws(sampler: GumbelSampler, logits: np.ndarray) -> np.ndarray:
    """How often each id is picked over many positions."""
    return np.bincount(
        [sampler.pick(logits, -1, (), position) for position in range(DRAWS)], minlength=len(logits)
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "seed", "min_p"),
    [
        (1.0, 0, 1.0, 0, 0.0),
        (0.6, 0, 1.0, 1, 0.0),
        (2.0, 0, 1.0, 2, 0.0),
        (1.0, 6, 1.0, 3, 0.0),
        (1.3, 0, 0.8, 4, 0.0),
        (0.9, 9, 0.7, 5, 0.0),
        (1.0, 0, 1.0, 6, 0.2),
        (1.5, 8, 0.9, 7, 0.3),
    ],
)
def test_draws_follow_the_filtered_softmax(
    temperature: float, top_k: int, top_p: float, seed: int, min_p: float
) -> None:
    """Over positions, at fixed seeds: within 4 standard deviations of the softmax of what the filters keep,
    and never outside it.
    """
    logits = some_logits(12, 1)
    probabilities = softmax(logits / np.float32(temperature))
    kept = sorted(brute_force_kept(probabilities, top_k, top_p, min_p))
    assert (len(kept) == 12) == (top_k == 0 and top_p == 1.0 and min_p == 0.0)
    counts = draws(GumbelSampler(temperature, top_k, top_p, seed, min_p), logits)
    assert counts.sum() == counts[kept].sum() == DRAWS
    expected = probabilities[kept] / probabilities[kept].sum()
    assert abs(chi_square(counts[kept], expected)) < 4
    assert chi_square(counts[kept], np.roll(expected, 1)) > 10  # the test can tell


def test_draws_of_different_seeds_follow_it_too() -> None:
    """Over seeds at one position, and independent of the draws at the next position."""
    logits = some_logits(5, 3) / 4
    probabilities = softmax(logits)
    pairs = np.zeros((5, 5))
    for seed in range(DRAWS):
        sampler = GumbelSampler(1.0, 0, 1.0, seed)
        pairs[pick(sampler, logits, 7), pick(sampler, logits, 8)] += 1
    assert abs(chi_square(pairs.ravel(), np.outer(probabilities, probabilities).ravel())) < 4


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)), at a level of 1 in 10,000, and no two alike."""
    noise = np.sort(np.concatenate([gumbel_noise(3, position, np.arange(1000)) for position in range(100)]))
    n = len(noise)
    distribution = np.exp(-np.exp(-noise))
    distance = max((np.arange(1, n + 1) / n - distribution).max(), (distribution - np.arange(n) / n).max())
    assert distance * math.sqrt(n) < 2.23
    assert len(np.unique(noise)) == n


def test_noise_depends_on_each_of_its_three_numbers() -> None:
    ids = np.arange(50)
    one = gumbel_noise(1, 2, ids)
    for other in (gumbel_noise(2, 2, ids), gumbel_noise(1, 3, ids), gumbel_noise(2, 1, ids)):
        assert (one != other).all()
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bits, the noise is a number: the smallest and largest uniforms are neither 0 nor 1."""
    for bits in (0, 2**64 - 1):
        monkeypatch.setattr(sampling, "_splitmix", lambda x, bits=bits: np.full(len(x), bits, np.uint64))
        assert np.isfinite(gumbel_noise(0, 0, np.arange(3))).all()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10**6),
    ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True),
)
def test_noise_of_an_id_does_not_depend_on_the_others(seed: int, position: int, ids: list[int]) -> None:
    together = gumbel_noise(seed, position, np.array(ids))
    assert together.tolist() == [gumbel_noise(seed, position, np.array([i]))[0] for i in ids]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 60),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_keep_what_their_definitions_say(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scaled = some_logits(size, seed).astype(np.float64) / temperature
    sampler = GumbelSampler(temperature, top_k, top_p, seed, min_p)
    kept = sampler.kept(scaled)
    assert len(set(kept.tolist())) == len(kept) > 0
    weights = np.exp(scaled - scaled.max())
    expected = brute_force_kept(weights / weights.sum(), top_k, top_p, min_p)
    if (
        set(kept.tolist()) != expected
    ):  # only a mass that reaches top_p up to rounding may be decided otherwise
        mass = weights[sorted(expected & set(kept.tolist()))].sum()
        total = weights[sorted(brute_force_kept(weights, top_k, 1.0))].sum()
        assert abs(mass - top_p * total) < 1e-12 * total
    assert int(scaled.argmax()) in kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "expected"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3}),
        (2, 1.0, 0.0, {0, 1}),
        (9, 1.0, 0.0, {0, 1, 2, 3}),
        (0, 0.5, 0.0, {0}),
        (0, 0.51, 0.0, {0, 1}),
        (0, 0.76, 0.0, {0, 1, 2}),
        (0, 0.001, 0.0, {0}),
        (2, 0.66, 0.0, {0}),
        (2, 0.67, 0.0, {0, 1}),
        (0, 1.0, 0.51, {0}),
        (0, 1.0, 0.49, {0, 1}),
        (0, 1.0, 0.24, {0, 1, 2, 3}),
        (0, 1.0, 1.0, {0}),
        (3, 1.0, 0.2, {0, 1, 2}),
    ],
)
def test_filters_on_round_figures(top_k: int, top_p: float, min_p: float, expected: set[int]) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8. Top-p counts among what top-k has left: 1/2 of 3/4 is two thirds."""
    scaled = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    assert set(GumbelSampler(1.0, top_k, top_p, 0, min_p).kept(scaled).tolist()) == expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 5000),
    top_k=st.integers(1, 30),
    top_p=st.floats(0.05, 1.0),
)
def test_a_filter_keeps_the_draw_if_it_keeps_the_token(
    seed: int, position: int, top_k: int, top_p: float
) -> None:
    """The noise does not depend on what is kept: a draw that survives a filter is the filtered draw."""
    logits = some_logits(30, seed % 1000)
    free = pick(GumbelSampler(1.0, 0, 1.0, seed), logits, position)
    narrow = GumbelSampler(1.0, top_k, top_p, seed)
    if free in narrow.kept(logits.astype(np.float64)):
        assert pick(narrow, logits, position) == free
    assert pick(narrow, logits, position) in narrow.kept(logits.astype(np.float64))


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.3, 3.0])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 0.9999999])
def test_top_p_of_a_large_vocabulary(spread: float, top_p: float) -> None:
    """However flat, with equals among the logits: the same as with everything sorted."""
    scaled = np.round(np.random.default_rng(5).normal(0.0, 1.0, 5000) * spread, 2)
    kept = GumbelSampler(1.0, 0, top_p, 0).kept(scaled)
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled.max())
    count = int(np.count_nonzero(np.cumsum(weights) - weights < top_p * weights.sum()))
    assert abs(len(kept) - count) <= 1  # sums in another order may differ in their last bits
    assert kept.tolist() == order[: len(kept)].tolist()


def test_a_seed_gives_the_same_draws() -> None:
    outputs = [some_logits(40, position) for position in range(200)]
    first, again, other = (
        [pick(GumbelSampler(1.0, 0, 0.95, seed), o, p) for p, o in enumerate(outputs)]
        for seed in (11, 11, 12)
    )
    assert first == again
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 50


def test_these_draws_for_ever() -> None:
    """A seed means the same on every machine and in every version: draws written down here."""
    logits = np.linspace(0.0, 1.0, 10, dtype=np.float32)
    assert [pick(GumbelSampler(1.0, 0, 1.0, 42), logits, position) for position in range(12)] == [
        2,
        5,
        5,
        6,
        2,
        8,
        2,
        9,
        8,
        6,
        8,
        2,
    ]


def test_a_low_temperature_is_greedy_and_so_is_top_1() -> None:
    for seed in range(50):
        logits = some_logits(30, seed)
        best = int(logits.argmax())
        assert pick(Greedy(), logits, seed) == best
        assert pick(GumbelSampler(1e-6, 0, 1.0, seed), logits, seed) == best
        assert pick(GumbelSampler(5.0, 1, 1.0, seed), logits, seed) == best
        assert pick(GumbelSampler(1.0, 0, 1e-9, seed), logits, seed) == best


def test_given_reads_the_text_by_position() -> None:
    given_text = Given([5, 9, 7, 3])
    assert [pick(given_text, some_logits(10, 0), position) for position in (1, 3)] == [9, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0, 1.0, 0), "temperature 0.0"),
        ((-1.0, 0, 1.0, 0), "temperature -1.0"),
        ((math.inf, 0, 1.0, 0), "temperature inf"),
        ((math.nan, 0, 1.0, 0), "temperature nan"),
        ((1.0, -1, 1.0, 0), "top_k -1"),
        ((1.0, 0, 0.0, 0), "top_p 0.0"),
        ((1.0, 0, 1.1, 0), "top_p 1.1"),
        ((1.0, 0, math.nan, 0), "top_p nan"),
        ((1.0, 0, 1.0, -1), "seed -1"),
        ((1.0, 0, 1.0, 2**64), f"seed {2**64}"),
        ((1.0, 0, 1.0, 0, -0.1), "min_p -0.1"),
        ((1.0, 0, 1.0, 0, 1.1), "min_p 1.1"),
        ((1.0, 0, 1.0, 0, math.nan), "min_p nan"),
    ],
)
def test_values_outside_their_range(values: tuple[float, int, float, int, float], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("+", r"\+")):
        GumbelSampler(*values)


def test_the_largest_seed_draws() -> None:
    picks = {
        pick(GumbelSampler(1.0, 0, 1.0, 2**64 - 1), some_logits(30, 0), position) for position in range(100)
    }
    assert len(picks) > 5


def test_penalties_by_their_formulas() -> None:
    """History 1 1 2 | 2 3 3 3, four of them new: CTRL's penalty on all, the others on what was said, the bias
    on top.
    """
    logits = np.array([1.0, 2.0, -3.0, 4.0, -5.0], np.float32)
    adjustments = Adjustments(2.0, 0.25, 0.5, ((0, 10.0), (4, -1.5)), num_prompt=3)
    tokens = [1, 1, 2, 2, 3, 3, 3, 4, 4]  # what stands at the position and after does not count
    expected = [1.0 + 10.0, 2.0 / 2.0, -3.0 * 2.0 - 0.25 - 0.5, 4.0 / 2.0 - 0.25 - 3 * 0.5, -5.0 - 1.5]
    assert adjustments.apply(logits, tokens, 7).tolist() == expected
    assert logits.tolist() == [1.0, 2.0, -3.0, 4.0, -5.0]
    assert not adjustments.change_nothing


@pytest.mark.parametrize(
    ("adjustments", "expected"),
    [
        (Adjustments(), 1),
        (Adjustments(repetition_penalty=1.2), 0),
        (Adjustments(repetition_penalty=0.5), 1),
        (Adjustments(presence_penalty=0.5), 1),  # 1 stands in the prompt only
        (Adjustments(presence_penalty=-9.0), 2),
        (Adjustments(frequency_penalty=-6.0), 2),
        (Adjustments(logit_bias=((2, 100.0),)), 2),
        (Adjustments(logit_bias=((1, -100.0), (0, -100.0))), 2),
    ],
)
def test_greedy_takes_the_largest_of_the_adjusted(adjustments: Adjustments, expected: int) -> None:
    logits = np.array([1.9, 2.0, -3.0], np.float32)
    tokens = [1, 2]
    sampler = AdjustedGreedy(dataclasses.replace(adjustments, num_prompt=1))
    assert pick(sampler, logits, 2, tokens) == expected


def test_adjusted_draws_follow_the_adjusted_softmax() -> None:
    """Penalties come before the temperature, and the filters see what they leave."""
    logits = some_logits(8, 2)
    adjustments = Adjustments(repetition_penalty=1.4, logit_bias=((5, 1.0),))
    adjusted = logits.astype(np.float64)
    adjusted[0] = adjusted[0] / 1.4 if adjusted[0] > 0 else adjusted[0] * 1.4
    adjusted[5] += 1.0
    probabilities = softmax(adjusted / 0.7)
    kept = sorted(brute_force_kept(probabilities, 5, 1.0))
    sampler = GumbelSampler(0.7, 5, 1.0, 9, adjustments=adjustments)
    tokens = [0] * DRAWS
    counts = np.bincount(
        [sampler.pick(logits, -1, tokens, 1 + position) for position in range(DRAWS)], minlength=8
    )
    assert counts.sum() == counts[kept].sum()
    assert abs(chi_square(counts[kept], probabilities[kept] / probabilities[kept].sum())) < 4


def test_no_adjustment_changes_no_draw() -> None:
    assert Adjustments(num_prompt=7).change_nothing
    logits = some_logits(30, 1)
    assert Adjustments().apply(logits, [3], 1).tolist() == logits.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty nan"),
        ({"repetition_penalty": math.inf}, "repetition_penalty inf"),
        ({"presence_penalty": math.nan}, "presence_penalty nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty inf"),
        ({"logit_bias": ((-1, 2.0),)}, "logit_bias -1=2.0"),
        ({"logit_bias": ((4, math.nan),)}, "logit_bias 4=nan"),
        ({"logit_bias": ((4, 1e308),)}, "logit_bias 4=1e[+]308 is not"),
        ({"repetition_penalty": 1e-310}, "repetition_penalty 1e-310 is outside"),
        ({"presence_penalty": -1e300}, "presence_penalty -1e[+]300 is outside"),
    ],
)
def test_adjustments_outside_their_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Adjustments(**values)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_the_lowest_temperature_is_greedy(filters: dict[str, Any]) -> None:
    """Logits over 1e-310 are no numbers; the largest is still the largest."""
    logits = some_logits(30, 1)
    sampler = GumbelSampler(**{"temperature": 1e-310, "top_k": 0, "top_p": 1.0, "seed": 3, **filters})
    assert sampler.pick(logits, int(logits.argmax()), [], 0) == logits.argmax()


def test_completions_draw_from_streams_of_their_own() -> None:
    """The first has the seed itself; the others differ from it, from each other, and from those of
    neighbouring seeds.
    """
    assert seed_of(7, 0) == 7
    seeds = [seed_of(seed, number) for seed in range(50) for number in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    one = gumbel_noise(seed_of(7, 1), 3, np.arange(2000))
    other = gumbel_noise(seed_of(7, 2), 3, np.arange(2000))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
