"""Texts that begin alike: what is kept of one changes no bit of another, and is kept within bounds."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ease_common.errors import DeviceError
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.mock import MockStack
from ease_runtime.engine.prefixes import LEAST
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.ort.buffers import RowCache
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy

PLENTY = 64 << 20


def finish(engine: Engine, sequence: TokenSequence) -> TokenSequence:
    while sequence.finish_reason is None:
        engine.step()
    return sequence


def texts(draw: random.Random, vocab: int) -> list[list[int]]:
    """Prompts with common beginnings of several lengths, some of them the whole of another."""
    trunk = [draw.randrange(1, vocab) for _ in range(120)]
    made = []
    for _ in range(8):
        shared = draw.choice([0, 5, 40, 90, 120])
        made.append(trunk[:shared] + [draw.randrange(1, vocab) for _ in range(draw.choice([0, 1, 30]))])
    return [ids or trunk[:20] for ids in made]


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_without_it_to_the_bit(tiny_stack: OrtStack, seed: int) -> None:
    draw = random.Random(seed)
    plain = Engine(tiny_stack, num_slots=3)
    keeping = Engine(tiny_stack, num_slots=3, prefix_bytes=PLENTY)
    asked = []
    for ids in texts(draw, tiny_stack.vocab_size):
        catch_up = draw.choice(["recompute", "propagate", "verify"])
        threshold = draw.choice(["off", 0.2, 0.6])
        asked.append((ids, catch_up, make_policy("max-prob", threshold, tiny_stack.exit_layers)))
    for ids, catch_up, policy in asked:  # some of them together
        started = [
            engine.start(
                ids, max_new_tokens=20, catch_up=catch_up, policy=policy, num_logprobs=3, sharing="a"
            )
            for engine in (plain, keeping)
        ]
        if draw.random() < 0.5:
            for engine, sequence in zip((plain, keeping), started, strict=True):
                finish(engine, sequence)
    while plain.busy or keeping.busy:
        plain.step()
        keeping.step()
    again = [
        finish(
            engine, engine.start(ids, max_new_tokens=20, catch_up=catch_up, policy=policy, sharing="a")
        ).produced
        for ids, catch_up, policy in asked
        for engine in (plain, keeping)
    ]
    assert again[::2] == again[1::2]


def test_what_is_shared(tiny_stack: OrtStack) -> None:
    engine = Engine(tiny_stack, prefix_bytes=PLENTY)
    trunk = list(range(1, 101))

    def shared(ids: list[int], **more: Any) -> int:
        options = {"max_new_tokens": 10, "sharing": "a", **more}
        return finish(engine, engine.start(ids, **options)).num_shared

    assert shared(trunk) == 0
    assert shared([*trunk, 7]) == 100
    assert shared(trunk) == 99  # the last one always runs
    assert shared([*trunk[:60], 200, 201]) == 60
    assert shared([*trunk[: LEAST - 1], 200, 201]) == 0
    assert shared(trunk, sharing="b") == 0
    assert shared(trunk, sharing=None) == 0
    assert shared(trunk, score_prompt=True, max_new_tokens=0) == 0
    said = finish(engine, engine.start(trunk[:50], max_new_tokens=40, sharing="c"))
    assert shared([*said.tokens, 5], sharing="c") == len(said.tokens) - 1  # of the last, nothing had run
    # What propagate leaves of an answer is not full depth's.
    policy = make_policy("max-prob", 0.0, tiny_stack.exit_layers)
    started = engine.start(trunk[:50], max_new_tokens=40, policy=policy, catch_up="propagate", sharing="d")
    said = finish(engine, started)
    assert shared([*said.tokens, 5], sharing="d") == 50


def test_it_stays_within_its_bytes_and_drops_what_was_used_longest_ago(tiny_stack: OrtStack) -> None:
    cache = tiny_stack.open_cache(1)
    assert isinstance(cache, RowCache)
    limit = 250 * cache.position_bytes
    engine = Engine(tiny_stack, prefix_bytes=limit)
    draw = random.Random(3)
    prompts = [[draw.randrange(1, 200) for _ in range(80)] for _ in range(5)]

    def run(ids: list[int]) -> int:
        assert engine.prefixes is not None
        found = finish(engine, engine.start(ids, max_new_tokens=1, sharing="a")).num_shared
        kept = engine.prefixes.entries.values()
        assert engine.prefixes.num_bytes == sum(entry.num_bytes for entry in kept) <= limit
        return found

    assert [run(ids) for ids in prompts[:3]] == [0, 0, 0]
    assert run(prompts[0]) == 79
    assert run(prompts[3]) == 0  # in the place of the second
    assert [run(prompts[i]) for i in (0, 2)] == [79, 79]
    assert run(prompts[1]) == 0
    too_long = [draw.randrange(1, 200) for _ in range(251)]
    assert run(too_long) == 0
    assert run(too_long) == 0


def test_copies_are_what_was_there(tiny_stack: OrtStack) -> None:
    cache = tiny_stack.open_cache(3)
    engine = Engine(tiny_stack, num_slots=3)
    engine.runner.cache = cache
    assert isinstance(cache, RowCache)
    started = engine.start(list(range(1, 140)), max_new_tokens=2, keep=True)
    finish(engine, started)
    assert started.slot is not None
    copied = cache.copy_out(started.slot, 130)
    cache.copy_in(2, copied, 120)
    for layer in range(len(cache.segment_of)):
        before = cache.read(layer, started.slot, 120)
        assert (before == cache.read(layer, 2, 120)).all()
        assert np.abs(before).max() > 0
    assert (cache.written[:, 2] == 120).all()


def test_a_stack_that_cannot_share_keeps_nothing() -> None:
    assert Engine(MockStack(), prefix_bytes=PLENTY).prefixes is None


def test_a_text_engine_shares(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle, prefix_bytes=PLENTY)
    begin = "And the king went up to the mountain; and it was good. " * 3
    options = Options(max_tokens=8)
    for number, more in enumerate(["And", "And", "The"]):
        generation = llm.submit(begin + more, replace(options, seed=number), sharing="")
        while llm.busy:
            llm.step()
        num_shared = generation.choices[0].sequence.num_shared
        assert num_shared > LEAST if number else num_shared == 0


@pytest.mark.parametrize(
    ("name", "error"), [("copy_out", MemoryError()), ("copy_in", DeviceError("not enough memory for keys"))]
)
def test_no_memory_to_share_with_changes_no_answer(
    tiny_stack: OrtStack, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    """All that is kept goes, and the request runs as without it."""
    engine = Engine(tiny_stack, num_slots=2, prefix_bytes=PLENTY)
    prompts = [[*range(1, 61)], [*range(1, 61), 7, 8], [*range(100, 140)]]
    alone = Engine(tiny_stack)
    expected = [finish(alone, begin(alone, ids)).produced for ids in prompts]
    assert engine.prefixes is not None
    finish(engine, begin(engine, prompts[0]))
    assert engine.prefixes.entries

    def short(*_: Any) -> None:
        raise error

    with monkeypatch.context() as without:
        without.setattr(engine.cache, name, short)
        started = [begin(engine, ids) for ids in prompts]
        found = [finish(engine, sequence).produced for sequence in started]
    assert found == expected
    assert [sequence.error for sequence in started] == [None] * 3
    if name == "copy_out":
        assert (engine.prefixes.entries, engine.prefixes.num_bytes) == ({}, 0)
    assert finish(engine, begin(engine, prompts[0])).produced == expected[0]


def begin(engine: Engine, ids: list[int]) -> TokenSequence:
    return engine.start(ids, max_new_tokens=6, sharing="a")
