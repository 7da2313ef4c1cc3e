"""Drafts from text: when a sequence's drafters are asked, and what is taken over. Runs no graph."""

from collections.abc import Sequence

import numpy as np

from ease_runtime.engine.commit import fail
from ease_runtime.engine.lookups import Load
from ease_runtime.engine.sequence import Token, TokenSequence


def wants_drafts(sequence: TokenSequence) -> bool:
    """Whether a sequence is about to run its newest token, all of its tokens stand, and its drafters have not
    been asked yet.
    """
    lookups = sequence.drafts.lookups
    return (
        lookups is not None
        and not sequence.prefilling
        and not sequence.drafts.tokens
        and sequence.counters.done[0] == len(sequence.tokens) - 1
        and lookups.asked_at != len(sequence.tokens)
    )


def load_of(sequence: TokenSequence, running: Sequence[TokenSequence]) -> Load:
    """What a sequence's next pass may have: the others that decode, with their newest tokens and drafts."""
    cost = sequence.decision.request_cost
    others = [other for other in running if other is not sequence and not other.prefilling]
    return Load(
        len(others),
        sum(1 + len(other.drafts.tokens) for other in others),
        max(len(other.tokens) for other in (sequence, *others)),
        len(sequence.produced),
        cost.gain if cost and sequence.counters.asked else 1.0,
    )


def draft(sequence: TokenSequence, running: Sequence[TokenSequence], most: int, vocab_size: int) -> bool:
    """Append drafts from text, where some pay. Whether the sequence ended, by a drafter's mistake.

    Not past a stop token, nor so many that full depth could not say one more.
    """
    lookups = sequence.drafts.lookups
    assert lookups is not None, "only of a sequence that drafts from text"
    room = sequence.request.max_length - len(sequence.tokens) - 1
    if room < 1:
        return False
    limit = min(room, most) if lookups.pass_costs is None else room
    choice = lookups.choose(sequence.tokens, limit, load_of(sequence, running))
    if choice is None:
        return False
    for token in choice.tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            what = f"drafter '{choice.name}' proposed {str(token)[:40]}"
            return fail(sequence, f"{what}, which is no token id of the vocabulary of {vocab_size}")
    for token in choice.tokens:
        drafted = Token(int(token), 0, 0.0, 0.0, drafter=choice.name)
        sequence.tokens.append(drafted.id)
        sequence.drafts.tokens.append(drafted)
        if token in sequence.request.stop_ids:
            break
    return False
