"""The table of docs/cuda.md, "Which bits", as far as it is about a CPU: a text's tokens and their
log-probabilities, to the bit, in every precision and every way of running it.
"""

from pathlib import Path

import numpy as np
import pytest

from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sequence import Token
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy

Said = list[tuple[int, float]]
BEGINNING = [3, 1, 4, 1, 5, 9, 2, 6] * 5
PROMPTS = [[*BEGINNING, 7], [*BEGINNING, 2, 8], [5] * 3]
NUM_TOKENS = 12


def said(tokens: list[Token]) -> Said:
    return [(token.id, token.logprob) for token in tokens]


def one_by_one(engine: Engine, **settings: object) -> list[Said]:
    return [
        said(list(engine.generate(engine.start(prompt, max_new_tokens=NUM_TOKENS, **settings))))  # type: ignore[arg-type]
        for prompt in PROMPTS
    ]


def together(engine: Engine) -> list[Said]:
    sequences = [engine.start(prompt, max_new_tokens=NUM_TOKENS) for prompt in PROMPTS]
    while engine.busy:
        engine.step()
    return [said(sequence.produced) for sequence in sequences]


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def stack(request: pytest.FixtureRequest, precisions: tuple[Path, dict[str, Path]]) -> OrtStack:
    return OrtStack(precisions[1][request.param])


@pytest.fixture(scope="module")
def alone(stack: OrtStack) -> list[Said]:
    return one_by_one(Engine(stack, exact=True))


@pytest.mark.parametrize("way", ["batch", "verify", "prefix"])
def test_a_text_gets_the_bits_that_it_gets_alone(stack: OrtStack, alone: list[Said], way: str) -> None:
    assert stack.exact
    if way == "batch":
        found = together(Engine(stack, num_slots=len(PROMPTS), exact=True))
    elif way == "verify":
        policy = make_policy("max-prob", [0.0], stack.exit_layers)
        engine = Engine(stack, exact=True)
        found = one_by_one(engine, policy=policy, catch_up="verify")
    else:
        engine = Engine(stack, exact=True, prefix_bytes=1 << 24)
        found = one_by_one(engine, sharing="one user")
        again = engine.start(PROMPTS[1], max_new_tokens=NUM_TOKENS, sharing="one user")
        assert said(list(engine.generate(again))) == alone[1]
        assert again.num_shared >= len(BEGINNING)
    assert found == alone
    assert len({logprob for answer in alone for _, logprob in answer}) > NUM_TOKENS  # of different numbers
    assert np.isfinite([logprob for answer in alone for _, logprob in answer]).all()
