"""How likely a text is after a context, under an exit policy: what likelihood tasks ask.

The context is the engine's prompt: its K/V are exact in every mode. Each token after it is scored at the exit where it leaves,
with the K/V that the catch-up leaves behind, as the engine would say it token by token.
"""

from collections.abc import Sequence

import numpy as np

from ease_eval.perplexity import Scores, score_window
from ease_runtime.engine import Engine
from ease_runtime.errors import RequestError
from ease_runtime.llm import LLM
from ease_runtime.policies import ExitPolicy


def prefix_id(llm: LLM) -> int:
    """The token that a text without a context follows: the start token, or the end token of a bundle that has none.

    Raises RequestError where there is neither.
    """
    if llm.start_id is not None:
        return llm.start_id
    if not llm.stop_ids:
        raise RequestError("this bundle has no start token and no end token: a text needs a context that it can follow")
    return min(llm.stop_ids)


def encode_pair(llm: LLM, context: str, continuation: str, *, raw: bool = True) -> tuple[list[int], list[int]]:
    """A context's ids, and those of what follows it, so that both together are the ids of the whole text.

    Spaces at the end of the context belong to the continuation, as tokenizers have it. A text that is not raw comes from a
    chat template. Raises RequestError.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    first = llm.encode(kept, raw=raw) if kept else []
    whole = llm.encode(kept + continuation, raw=raw)
    if not first:
        first = [prefix_id(llm)]
        whole = whole if whole[:1] == first else [*first, *whole]
    if len(whole) <= len(first):
        raise RequestError(f"nothing follows the context: {continuation[:40]!r} adds no token to it")
    return first, whole[len(first) :]


def score_continuation(
    engine: Engine, context: Sequence[int], continuation: Sequence[int], policies: Sequence[ExitPolicy], catch_up: str
) -> list[Scores]:
    """Score a continuation after a context of at least one token, whose beginning is left out where both are too long.

    Shape: continuation (S) -> one Scores of S tokens for each policy. Raises RequestError for a continuation that is too long.
    """
    limit = engine.stack.max_positions
    if len(continuation) > limit:
        raise RequestError(f"a continuation of {len(continuation)} tokens is longer than this model's context of {limit}")
    ids = [*context, *continuation][-limit - 1 :]
    num_prompt = len(ids) - len(continuation)
    scores = score_window(engine, ids[:-1], np.array(ids[1:], np.int64), policies, catch_up, num_prompt)
    return [score.after(num_prompt - 1) for score in scores]
