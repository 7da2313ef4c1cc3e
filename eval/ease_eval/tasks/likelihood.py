"""How likely a text is after a context, under an exit policy: what likelihood tasks ask.

The context is the engine's prompt: its K/V are exact in every mode. Each token after it is scored at the exit
where it leaves, with the K/V that the catch-up leaves behind, as the engine would say it token by token.
"""

from collections.abc import Sequence

import numpy as np

from ease_common.errors import RequestError
from ease_eval.measure.documents import encode_whole
from ease_eval.measure.perplexity import Scores, score_documents, score_window
from ease_runtime.engine.engine import Engine
from ease_runtime.llm import LLM
from ease_runtime.policies import ExitPolicy


class NoTokensError(RequestError):
    """A text that the tokenizer has no tokens for, so that no model over it can say it."""


def prefix_id(llm: LLM) -> int:
    """The token that a text without a context follows, as in lm_eval's own models: the tokenizer's start
    token, else its end token.

    Raises RequestError where there is neither.
    """
    begin = llm.manifest.generation.get("bos_token_id", llm.start_id)
    if begin is not None:
        return int(begin)
    if not llm.manifest.stop_ids:
        raise RequestError(
            "this bundle has no start token and no end token: a text needs a context that it can follow"
        )
    return llm.manifest.stop_ids[0]


def encode_pair(llm: LLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """A context's ids, and those of what follows it: together they are the ids of the whole text.

    As in lm_eval, the whole is encoded and divided behind the context, and spaces at the end of the context
    belong to the continuation. A token that spans the join is the continuation's first: tokenizers write
    "end." and "\\n" together as one token, say. Raises NoTokensError where nothing follows in tokens that the
    model knows, and RequestError where there is no token to begin with.
    """
    text = context + continuation
    num_kept = len(context.rstrip())
    try:
        whole = llm.encode(text)
        own = encode_whole(llm.tokenizer, text, parse_special=True)
    except RequestError as error:  # no valid Unicode, or a token that the model has no row for
        raise NoTokensError(str(error)) from None
    num_context = len(whole) - len(own.ids)  # the start token
    if num_kept:
        num_context += sum(end <= num_kept for _, end in own.offsets)
    if not num_context:
        before = prefix_id(llm)
        whole = whole if whole[:1] == [before] else [before, *whole]
        num_context = 1
    if len(whole) <= num_context:
        raise NoTokensError(f"nothing follows the context: {continuation[:40]!r} adds no token to it")
    return whole[:num_context], whole[num_context:]


def score_continuation(
    engine: Engine,
    context: Sequence[int],
    continuation: Sequence[int],
    policies: Sequence[ExitPolicy],
    catch_up: str,
) -> list[Scores]:
    """Score a continuation after a context of at least one token, whose beginning is left out where both are
    too long.

    A continuation that is itself longer than the model's context is scored in windows, like a whole text.

    Shape: continuation (S) -> one Scores of S tokens for each policy.
    """
    limit = engine.stack.max_positions
    if len(continuation) > limit:
        ids = [*context[-limit:], *continuation]
        whole = score_documents(engine, [ids], policies, catch_up)
        return [scores.after(len(ids) - len(continuation) - 1) for scores in whole]
    ids = [*context, *continuation][-limit - 1 :]
    num_prompt = len(ids) - len(continuation)
    scores = score_window(engine, ids[:-1], np.array(ids[1:], np.int64), policies, catch_up, num_prompt)
    return [score.after(num_prompt - 1) for score in scores]
