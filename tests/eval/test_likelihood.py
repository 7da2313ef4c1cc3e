"""A context and what follows it: the ids of the whole text, divided behind the last token that is all
context.
"""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ease_eval.measure.perplexity import score_documents
from ease_eval.tasks.likelihood import NoTokensError, encode_pair, score_continuation
from ease_runtime.engine.mock import MockStack
from ease_runtime.llm import LLM, TextEngine
from ease_runtime.policies import make_policy

MERGES = [
    (".", "Ċ"),
    ("Ċ", "Ċ"),
    (".Ċ", "Ċ"),
    ("h", "e"),
    ("l", "l"),
    ("ll", "o"),
    ("he", "l"),
    ("Ġ", "he"),
    ("a", ".Ċ"),
]
PIECES = ["he", "hel", "l", "lo", ".", "\n", "\n\n", "a", " ", "日", "é"]


def joining() -> Tokenizer:
    """Byte-level, with tokens that reach over words' ends, and places that a post-processor trims, as Llama
    3's does.
    """
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


START = 300
END = 301


def engine(start_id: int | None) -> Any:
    made: Any = TextEngine(MockStack(vocab_size=400), joining(), start_id=start_id, stop_ids=frozenset({END}))
    made.manifest = SimpleNamespace(generation={}, stop_ids=(END,))
    return made


def pairs() -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [
        ("".join(rng.choices(PIECES, k=rng.randint(0, 4))), "".join(rng.choices(PIECES, k=rng.randint(1, 3))))
        for _ in range(1000)
    ]


@pytest.mark.parametrize("start_id", [START, None])
def test_what_is_scored_is_the_text_that_was_asked(start_id: int | None) -> None:
    llm = engine(start_id)
    spanning = 0
    for context, continuation in pairs():
        first, rest = encode_pair(llm, context, continuation)
        ids = llm.tokenizer.encode(context + continuation, add_special_tokens=False).ids
        before = [start_id if start_id is not None else END]
        assert [*first, *rest] in ([*before, *ids], ids), (context, continuation)
        kept = context.rstrip().encode()
        told = num_bytes(llm, first, before)
        assert told <= len(kept) < told + num_bytes(llm, rest[:1], before), (context, continuation)
        spanning += told < len(kept)
    assert spanning > 50, "few tokens span a join: the test shows little"


def num_bytes(llm: TextEngine, ids: list[int], special: list[int]) -> int:
    """Of byte-level tokens: a character of their names is a byte."""
    return sum(len(llm.tokenizer.id_to_token(token)) for token in ids if token not in special)


def test_a_token_that_spans_the_join_is_scored() -> None:
    llm = engine(START)
    ids = llm.encode("hello.\n\nhe")
    assert encode_pair(llm, "hello.", "\n\nhe") == (ids[:-2], ids[-2:])
    assert [llm.tokenizer.id_to_token(token) for token in ids[-2:]] == [".ĊĊ", "he"]


def test_the_harness_divides_alike_where_its_ids_are_the_texts() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed", exc_type=ImportError)
    from lm_eval.api.model import TemplateLM

    llm = engine(START)
    same = 0

    class Measurement:
        backend = "causal"

        def tok_encode(self, text: str) -> list[int]:
            return llm.encode(text)

    for context, continuation in pairs():
        if not context.strip():
            continue
        theirs = TemplateLM._encode_pair(Measurement(), context, continuation)  # type: ignore[arg-type]
        if [*theirs[0], *theirs[1]] == llm.encode(context + continuation) and theirs[1]:
            assert encode_pair(llm, context, continuation) == theirs, (context, continuation)
            same += 1
    assert same > 100


@pytest.mark.parametrize("continuation", ["", "\ud83d"])
def test_what_no_token_stands_for(continuation: str) -> None:
    with pytest.raises(NoTokensError):
        encode_pair(engine(START), "he", continuation)


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_a_continuation_longer_than_the_context_is_scored_in_windows(tiny_bundle: Any, catch_up: str) -> None:
    llm = LLM(tiny_bundle)
    policy = make_policy("max-prob", 0.4, llm.stack.exit_layers)
    context, continuation = encode_pair(llm, "And the king", " went up to the sea" * 60)
    assert len(continuation) > llm.stack.max_positions
    (found,) = score_continuation(llm.engine, context, continuation, [policy], catch_up)
    (whole,) = score_documents(llm.engine, [[*context, *continuation]], [policy], catch_up)
    assert found.logprobs.tolist() == whole.logprobs[-len(continuation) :].tolist()
    assert np.isfinite(found.logprobs).all()
