"""Bundles of strangers: heads that say what no head says, and tokenizers whose own rules break down."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import toy_text
from ease_common.errors import PanicError, RequestError, without_panics
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.mock import MockStack
from ease_runtime.engine.sampling import GumbelSampler
from ease_runtime.text.special import encode_ids


def forged(monkeypatch: pytest.MonkeyPatch, **said: Any) -> Engine:
    """An engine whose heads say something else from the fourth pass on."""
    stack = MockStack(vocab_size=23, max_positions=64)
    run_exit = stack.run_exit
    calls = [0]

    def run(number: int, rows: Any) -> Any:
        output = run_exit(number, rows)
        calls[0] += 1
        for name, value in said.items() if calls[0] > 3 else ():
            getattr(output, name)[:] = value
        return output

    monkeypatch.setattr(stack, "run_exit", run)
    return Engine(stack)


@pytest.mark.parametrize("top_id", [-1, 23, 2**40, -(10**6)])
def test_a_head_that_names_no_token_ends_the_request(monkeypatch: pytest.MonkeyPatch, top_id: int) -> None:
    engine = forged(monkeypatch, top_id=top_id)
    sequence = engine.start([1, 2, 3], max_new_tokens=20)
    while engine.busy:
        engine.step()
    assert sequence.error == "the model's head names a token that is not in its vocabulary"
    assert len(sequence.produced) == 3


def test_logits_that_are_no_numbers_end_a_sampled_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever probability the head claims for its best token."""
    engine = forged(monkeypatch, logits=math.nan)
    sequence = engine.start([1, 2, 3], max_new_tokens=20, sampler=GumbelSampler(1.0, 0, 1.0, 7))
    while engine.busy:
        engine.step()
    assert (sequence.error or "").startswith("the model's logits are no finite numbers at position")
    assert len(sequence.produced) == 3
    assert np.isfinite([token.logprob for token in sequence.produced]).all()


def test_a_panic_is_an_error(tmp_path: Path) -> None:
    described = json.loads(toy_text.letter_tokenizer("abc").to_str())
    described["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    described["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(described), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(path))
    with pytest.raises(PanicError), without_panics():
        tokenizer.encode("hello")
    with pytest.raises(RequestError, match="the tokenizer fails on this text: a library gave up: ") as caught:
        encode_ids(tokenizer, "hello")
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), without_panics():
        raise KeyError("others stay what they are")
