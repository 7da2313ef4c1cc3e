"""Requests over the mock stack, and a reference that keeps no state at all between tokens."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ease_runtime.engine.engine import CATCH_UPS, Engine
from ease_runtime.engine.layout import Span
from ease_runtime.engine.mock import MockCache, MockStack
from ease_runtime.engine.sampling import Greedy, GumbelSampler, Sampler
from ease_runtime.engine.sequence import Token, TokenSequence
from ease_runtime.policies import ExitOutput, ExitPolicy, make_policy

VOCAB = 23


@dataclass(frozen=True)
class Case:
    """A stack and a request.

    `leaves_at`: by position, the exit from which it is confident; None: as its logits say.
    """

    exit_layers: tuple[int, ...]
    leaves_at: tuple[int, ...] | None
    prompt: tuple[int, ...]
    num_new: int
    thresholds: tuple[float | None, ...] | None
    policy: str
    seed: int | None  # None: greedy
    decay: float | None = None
    vocab: int = VOCAB
    patience: int = 1
    blocks: tuple[int, ...] = ()  # exits with a layer of their own

    def stack(self) -> MockStack:
        script = self.leaves_at
        confidence = (
            None if script is None else lambda exit_index, position: float(exit_index >= script[position])
        )
        return MockStack(
            self.exit_layers,
            vocab_size=self.vocab,
            max_positions=self.limit + 3,
            confidence=confidence,
            blocks=self.blocks,
        )

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.num_new

    def exit_policy(self) -> ExitPolicy:
        return make_policy(
            self.policy, self.thresholds, self.exit_layers, decay=self.decay, patience=self.patience
        )

    def sampler(self) -> Sampler:
        return Greedy() if self.seed is None else GumbelSampler(1.3, 7, 0.9, self.seed)

    def start(self, engine: Engine, catch_up: str, *, keep: bool = False) -> TokenSequence:
        return engine.start(
            self.prompt,
            max_new_tokens=self.num_new,
            policy=self.exit_policy(),
            catch_up=catch_up,
            sampler=self.sampler(),
            keep=keep,
        )


@st.composite
def cases(
    draw: st.DrawFn,
    exit_layers: tuple[int, ...] | None = None,
    vocab: int | None = None,
    scripts: bool = True,
    blocks: tuple[int, ...] | None = None,
) -> Case:
    exit_layers = exit_layers or draw(st.sampled_from([(3,), (1, 2), (2, 4, 6), (1, 4, 5), (1, 3, 4, 6)]))
    early = len(exit_layers) - 1
    vocab = vocab or draw(st.sampled_from([3, VOCAB]))
    prompt = tuple(draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=6)))
    num_new = draw(st.integers(1, 18))
    leaves_at = draw(
        st.lists(st.integers(0, early), min_size=len(prompt) + num_new, max_size=len(prompt) + num_new)
    )
    scripted = scripts and draw(st.booleans())
    value = st.just(0.5) if scripted else st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0]))
    thresholds = (
        draw(st.none() | st.lists(st.none() | value, min_size=early, max_size=early)) if early else None
    )
    return Case(
        exit_layers,
        tuple(leaves_at) if scripted else None,
        prompt,
        num_new,
        None if thresholds is None else tuple(thresholds),
        draw(
            st.sampled_from(
                ["max-prob", "margin", "entropy", "similarity", "patience", *(["gate"] if scripted else [])]
            )
        ),
        draw(st.none() | st.integers(0, 99)),
        draw(st.none() | st.floats(0.0, 8.0)),
        vocab,
        draw(st.integers(1, 2)),
        draw(some_exits(early)) if blocks is None else blocks,
    )


def some_exits(early: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, early - 1)).map(tuple) if early else st.just(())


@dataclass
class Reference:
    """The naive answer: every token from an empty cache, all positions in one pass a segment."""

    tokens: list[int]
    depths: list[int]
    confidences: list[float]
    cache: MockCache


def reference(case: Case, catch_up: str) -> Reference:
    """`recompute`: nobody is ever frozen.

    `propagate`: a produced token is frozen past the exit that it left by.
    """
    stack = case.stack()
    policy = case.exit_policy()
    sampler = case.sampler()
    tokens = list(case.prompt)
    exits = []
    confidences = []
    last = len(case.exit_layers) - 1
    while len(tokens) < case.limit:
        newest = len(tokens) - 1
        cache = stack.open_cache()
        left = None
        rows = np.array(tokens, np.int64)
        said = None
        agreeing = 0
        for k in range(last + 1):
            active = np.ones(len(tokens), np.bool_)
            if catch_up == "propagate":
                for position in range(len(case.prompt), newest):  # the prompt's own exits freeze nothing
                    active[position] = exits[position - len(case.prompt) + 1] >= k
                active[newest] = left is None or newest < len(case.prompt)
            out = stack.reserve_rows(2 * len(tokens), [rows] if k else [])
            stack.run_segment(k, cache, [Span(0, 0, len(tokens))], rows, out, active)
            before = rows[-1:] if k else np.array([out + 2 * len(tokens) - 1])
            rows = np.arange(out, out + len(tokens))
            read = rows
            if k in case.blocks and k < last and policy.thresholds.at(k) is not None:
                first = stack.reserve_rows(len(tokens), [rows, before])
                stack.run_block(k, cache, [Span(0, 0, len(tokens))], rows, first)
                read = np.arange(first, first + len(tokens))
            if left is not None or not (k == last or policy.thresholds.at(k) is not None):
                continue
            if k < last and case.policy in ("gate", "similarity"):
                ask = (
                    stack.run_gate(k, read[-1:])
                    if case.policy == "gate"
                    else stack.run_similarity(rows[-1:], before)
                )
                confidence = float(ask[0])
                output = stack.run_exit(k, read[-1:])
            else:
                output = stack.run_exit(k, read[-1:])
                confidence = float(
                    policy.confidence(
                        ExitOutput(k, np.array([newest]), output, early=k < last), policy.begin()
                    )[0]
                )
                if case.policy == "patience" and k < last:
                    agreeing = agreeing + 1 if output.top_id[0] == said else 0
                    confidence = float(np.float32(min(1.0, agreeing / case.patience)))
                    said = output.top_id[0]
            if k == last or confidence >= lowered(policy.thresholds.at(k), case, len(tokens)):
                left = (
                    k,
                    confidence,
                    sampler.pick(output.logits[0], int(output.top_id[0]), tokens, len(tokens)),
                )
        assert left is not None
        exits.append(left[0])
        confidences.append(left[1])
        tokens.append(left[2])
    return Reference(tokens, [case.exit_layers[k] for k in exits], confidences, cache)


def lowered(threshold: float, case: Case, length: int) -> np.float32:
    """CALM's decay, from the paper."""
    if case.decay is None:
        return np.float32(threshold)
    t = length - len(case.prompt)
    return np.float32(np.clip(0.9 * threshold + 0.1 * np.exp(-case.decay * t / case.num_new), 0.0, 1.0))


def finish(engine: Engine, sequence: TokenSequence) -> list[Token]:
    """Step to the end, watching the counters."""
    while sequence.finish_reason is None:
        before = list(sequence.counters.done)
        produced = len(sequence.produced)
        leaving = sequence.decision.leaving
        changed = engine.step()
        assert sequence.counters.done == sorted(sequence.counters.done, reverse=True)
        if sequence.request.catch_up != "verify" and leaving is None:
            assert all(now >= then for now, then in zip(sequence.counters.done, before, strict=True))
            assert sum(sequence.counters.done) > sum(before)  # every pass does something
        assert (sequence in changed) == (len(sequence.produced) > produced)
    return sequence.produced


def check_cache(engine: Engine, sequence: TokenSequence, off: Reference, case: Case) -> None:
    """A sequence's K/V are full depth's, as far as they are written."""
    for k, done in enumerate(sequence.counters.done):
        for layer in case.stack().layers(k):
            length = min(done, len(sequence.tokens) - 1)
            np.testing.assert_array_equal(
                engine.cache.entries[sequence.slot, layer - 1, :length],
                off.cache.entries[0, layer - 1, :length],
            )


@st.composite
def mixes(draw: st.DrawFn) -> list[tuple[Case, str]]:
    """Requests for one stack, of every length, policy and catch-up."""
    exit_layers = draw(st.sampled_from([(1, 2), (2, 4, 6), (1, 3, 4, 6)]))
    vocab = draw(st.sampled_from([3, VOCAB]))
    blocks = draw(
        some_exits(len(exit_layers) - 1)
    )  # whether a request is asked at one depends on its thresholds
    one = st.tuples(cases(exit_layers, vocab, scripts=False, blocks=blocks), st.sampled_from(CATCH_UPS))
    return draw(st.lists(one, min_size=2, max_size=7))


class Forced:
    """The given tokens as far as they go, then greedy."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def pick(self, logits: np.ndarray, top_id: int, tokens: list[int], position: int) -> int:
        return (
            self.tokens[position]
            if position < len(self.tokens)
            else Greedy().pick(logits, top_id, tokens, position)
        )
