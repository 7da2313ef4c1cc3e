"""Drafts from text: the lookups against brute force, and whatever drafts, the answer is full depth's."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ease_common.errors import RequestError
from ease_runtime.cli.batch import answer_lines
from ease_runtime.cli.main import main as run_main
from ease_runtime.conversation import Conversation
from ease_runtime.drafters import CorpusLookup, Drafter, NgramLookup, Proposal, read_corpus
from ease_runtime.drafters.ngram import SuffixIndex
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.lookups import FIRST_TOKENS, FLOOR, LONGEST_DRAFT, Acceptance, Load, Lookups
from ease_runtime.engine.mock import MockStack
from ease_runtime.engine.pass_costs import PassCosts
from ease_runtime.engine.sampling import AdjustedGreedy, Adjustments, GumbelSampler, Sampler
from ease_runtime.engine.sequence import DraftCount, TokenSequence
from ease_runtime.generation import Choice, add_drafts
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies import make_policy
from engine_cases import Case, Forced, cases, check_cache, finish, mixes, reference

texts = st.integers(2, 5).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=30))


class Dice(Drafter):
    """Tokens at random: most are refused."""

    name = "dice"

    def __init__(self, seed: int, vocab: int) -> None:
        self.random = random.Random(seed)
        self.vocab = vocab

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        count = self.random.randint(0, limit + 1)
        match = self.random.randint(1, 9)
        return Proposal([self.random.randrange(self.vocab) for _ in range(count)], match)


class Knowing(Drafter):
    """The answer itself, but now and then: most are accepted. Keeps what it was asked."""

    name = "knowing"

    def __init__(self, answer: Sequence[int], seed: int = 0) -> None:
        self.answer = answer
        self.random = random.Random(seed)
        self.asked: list[list[int]] = []

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        self.asked.append(list(tokens))
        following = self.answer[len(tokens) : len(tokens) + limit]
        return Proposal([token if self.random.random() < 0.8 else 0 for token in following], 8)


# The lookups.


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_the_longest_suffix_that_was_there_before(text: list[int]) -> None:
    index = SuffixIndex()
    for size, token in enumerate(text, 1):
        index.add(token)
        known = text[:size]
        lengths = [n for n in range(1, size) if any(known[e - n : e] == known[-n:] for e in range(n, size))]
        assert index.match == max(lengths, default=0)
        assert known[index.place - index.match : index.place] == known[size - index.match :]
        assert index.place < size


@settings(max_examples=200, deadline=None)
@given(corpus=st.lists(texts, min_size=1, max_size=3), text=texts.filter(bool))
def test_the_longest_match_in_a_corpus(corpus: list[list[int]], text: list[int]) -> None:
    """Long ones count up to 32 tokens; what is proposed follows it, in the same text."""
    proposal = CorpusLookup(corpus).propose(text, 4, None)
    wholes = [
        n
        for one in corpus
        for end in range(1, len(one))
        for n in range(1, min(end, len(text)) + 1)
        if one[end - n : end] == text[-n:]
    ]
    assert bool(proposal.tokens) <= bool(wholes)
    if proposal.tokens:
        found = text[len(text) - proposal.match :] + list(proposal.tokens)
        assert any(found == one[i : i + len(found)] for one in corpus for i in range(len(one)))
        assert proposal.match <= min(max(wholes), 32)


def test_a_corpus_goes_on_where_it_is_unambiguous() -> None:
    corpus = CorpusLookup([[9, 1, 2, 3, 4, 5], [8, 2, 3, 7]])
    assert corpus.propose([1, 2, 3], 8, None) == Proposal([4, 5], 3)
    assert corpus.propose([8, 2, 3], 8, None) == Proposal([7], 3)
    assert corpus.propose([0, 8], 2, None) == Proposal([2, 3], 1)
    assert not corpus.propose([6], 8, None).tokens


def test_ngrams_go_on_over_again() -> None:
    drafter = NgramLookup()
    state = drafter.begin()
    assert drafter.propose([4, 1, 2], 5, state) == Proposal()
    assert drafter.propose([4, 1, 2, 1, 2], 5, state) == Proposal([1, 2, 1, 2, 1], 2)


def test_a_corpus_of_files(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "more" / "b.txt").write_text("bcd")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    found = read_corpus(str(tmp_path), lambda text: [ord(letter) for letter in text])
    assert found.propose([ord("a"), ord("b")], 3, None) == Proposal([ord("c")], 2)
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path, r"c\.bin of the corpus is no UTF-8 text"),
        (tmp_path / "none", "is not there; give --draft-corpus a text file or a directory"),
    ):
        with pytest.raises(RequestError, match=message):
            read_corpus(str(path), lambda text: [1])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(RequestError, match="has no text"):
        read_corpus(str(tmp_path / "a.txt"), lambda text: [])


# The engine: whatever is drafted, tokens and K/V are full depth's.


def drafters_for(case: Case, seed: int, answer: Sequence[int]) -> list[Drafter]:
    """Some of all kinds."""
    dice = random.Random(seed)
    texts = [[dice.randrange(case.vocab) for _ in range(40)], list(answer)]
    known = [NgramLookup(), CorpusLookup(texts), Dice(seed, case.vocab), Knowing(answer, seed)]
    return dice.sample(known, dice.randint(1, 4))


def start(engine: Engine, case: Case, drafters: Sequence[Drafter], **more: Any) -> TokenSequence:
    given = {"policy": case.exit_policy(), "sampler": case.sampler(), "keep": True, **more}
    return engine.start(
        case.prompt, max_new_tokens=case.num_new, catch_up="verify", drafters=drafters, **given
    )


@settings(max_examples=120, deadline=None)
@given(case=cases(), seed=st.integers(0, 999), draft_length=st.integers(1, 9), chunk=st.integers(1, 7))
def test_mixed_drafts_are_full_depth(case: Case, seed: int, draft_length: int, chunk: int) -> None:
    off = reference(replace(case, thresholds=None), "recompute")
    engine = Engine(case.stack(), draft_length=draft_length, chunk=chunk)
    sequence = start(engine, case, drafters_for(case, seed, off.tokens))
    finish(engine, sequence)
    assert sequence.tokens == off.tokens
    assert [t.id for t in sequence.produced] == off.tokens[len(case.prompt) :]
    assert sequence.drafts.accepted == sum(t.drafted for t in sequence.produced)
    assert all((t.depth < case.exit_layers[-1]) == (t.drafter == "exit") for t in sequence.produced)
    check_cache(engine, sequence, off, case)


def test_every_drafter_is_accepted_and_refused() -> None:
    case = Case((2, 4, 6), None, (1, 2), 150, (0.4, 0.4), "max-prob", 3, vocab=3)
    engine = Engine(case.stack(), draft_length=4)
    plain = replace(case, thresholds=None).start(engine, "recompute")
    off = [*case.prompt, *(token.id for token in engine.generate(plain))]
    for drafter in (NgramLookup(), CorpusLookup([off[:60]]), Dice(1, 3), Knowing(off)):
        sequence = start(engine, case, [drafter])
        finish(engine, sequence)
        engine.release(sequence)
        assert sequence.tokens == off
        count = sequence.drafts.counts[drafter.name]
        assert 0 < count.accepted < count.judged
        exits = sequence.drafts.counts["exit"]
        assert drafter.name != "dice" or 0 < exits.accepted < exits.judged


@settings(max_examples=40, deadline=None)
@given(requests=mixes(), num_slots=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_rows_draft_each_for_itself(requests: list[tuple[Case, str]], num_slots: int, seed: int) -> None:
    """Rows with drafts from text, from exits, and without, beside each other."""
    dice = random.Random(seed)
    shape = requests[0][0]
    limit = max(case.limit for case, _ in requests)
    stack = MockStack(shape.exit_layers, vocab_size=shape.vocab, max_positions=limit, blocks=shape.blocks)
    engine = Engine(stack, num_slots=num_slots, chunk=dice.randint(1, 8), draft_length=dice.randint(1, 6))
    expected = [
        reference(replace(case, thresholds=None) if kind == "verify" else case, kind)
        for case, kind in requests
    ]
    sequences = [
        start(engine, case, drafters_for(case, seed, answer.tokens), keep=False)
        if kind == "verify"
        else case.start(engine, kind)
        for (case, kind), answer in zip(requests, expected, strict=True)
    ]
    while engine.busy:
        engine.step()
    assert [sequence.tokens for sequence in sequences] == [answer.tokens for answer in expected]


@settings(max_examples=100, deadline=None)
@given(
    case=cases(),
    seed=st.integers(0, 999),
    steps=st.integers(0, 30),
    length=st.integers(1, 24),
    draft_length=st.integers(1, 6),
)
def test_crop_with_mixed_drafts(case: Case, seed: int, steps: int, length: int, draft_length: int) -> None:
    """Cut anywhere, drafts or not, and given another token: as a sequence that never went further."""
    policy = case.policy if case.policy != "gate" else "margin"
    case = replace(case, leaves_at=None, num_new=case.num_new + 2, policy=policy, seed=None, decay=None)
    answer = reference(replace(case, thresholds=None), "recompute").tokens
    engine = Engine(case.stack(), draft_length=draft_length)
    sequence = start(engine, case, drafters_for(case, seed, answer))
    while not sequence.produced:
        engine.step()
    for _ in range(steps):
        if sequence.num_final < case.limit - 1 and sequence.finish_reason is None:
            engine.step()
    if sequence.finish_reason is not None:
        return
    length = min(length, sequence.num_final - 1)
    sequence.crop(length)
    sequence.tokens.append(seed % case.vocab)
    history = list(sequence.tokens)
    finish(engine, sequence)
    fresh = Engine(case.stack())
    plain = fresh.start(
        history[: min(length, len(case.prompt))],
        max_new_tokens=case.limit - min(length, len(case.prompt)),
        sampler=Forced(history),
    )
    finish(fresh, plain)
    assert sequence.tokens == plain.tokens


def plain_and_drafted(
    drafter: Drafter | None, sampler: Sampler, again: Sampler, **request: Any
) -> tuple[TokenSequence, TokenSequence]:
    """One request at full depth, and with drafts."""
    stack = MockStack((2, 4), vocab_size=5, max_positions=120)
    engine = Engine(stack, draft_length=5)
    plain = engine.start([1, 2, 3], max_new_tokens=100, sampler=sampler, **request)
    answer = [1, 2, 3, *(t.id for t in engine.generate(plain))]
    drafted = engine.start(
        [1, 2, 3],
        max_new_tokens=100,
        sampler=again,
        catch_up="verify",
        drafters=[drafter or Knowing(answer)],
        **request,
    )
    list(engine.generate(drafted))
    assert drafted.drafts.accepted > 0
    return plain, drafted


def test_a_drafted_stop_token_ends_the_drafts_and_the_answer() -> None:
    most = 0
    for stop in range(5):
        case = Case((2, 4), None, (1, 2), 60, None, "max-prob", None, vocab=5)
        answer = reference(case, "recompute").tokens
        engine = Engine(case.stack(), draft_length=9)
        stack_calls = engine.stack.trace = []
        sequence = start(engine, case, [Knowing(answer, stop)], stop_ids=frozenset({stop}), keep=False)
        list(engine.generate(sequence))
        end = answer.index(stop, 2) + 1 if stop in answer[2:] else len(answer)
        assert sequence.tokens == answer[:end]
        most = max(most, *(call.num_tokens for call in stack_calls))
    assert most > 5


def test_drafts_leave_room_for_full_depth_s_own_token() -> None:
    """No pass has more tokens than the answer has yet to get."""
    case = Case((2, 4), None, (1, 2), 12, None, "max-prob", None, vocab=5)
    answer = reference(case, "recompute").tokens
    engine = Engine(case.stack(), draft_length=9)
    sequence = start(engine, case, [Knowing(answer)])
    finish(engine, sequence)
    assert len(sequence.tokens) == 14
    assert max(sequence.counters.done) <= 13


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdjustedGreedy(Adjustments(1.7, 0.6, 0.4, ((2, 1.0),), num_prompt=3)),
        lambda: GumbelSampler(1.2, 4, 0.95, 7, 0.01, Adjustments(1.3, 0.5, 0.5, num_prompt=3)),
    ],
)
def test_penalties_and_logprobs(make: Any) -> None:
    """History counts up to the position alone, whatever is drafted behind it."""
    plain, drafted = plain_and_drafted(None, make(), make(), num_logprobs=3)
    assert [(t.id, t.logprob, t.top_logprobs, t.depth, t.confidence) for t in drafted.produced] == [
        (t.id, t.logprob, t.top_logprobs, t.depth, t.confidence) for t in plain.produced
    ]


class Newest:
    """A sampler of the user's that looks at the newest token, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def pick(self, logits: np.ndarray, top_id: int, tokens: Sequence[int], position: int) -> int:
        self.calls += 1
        assert len(tokens) == position
        return int(np.argsort(logits)[-1 - (tokens[-1] + self.calls) % 2])


def test_a_sampler_that_looks_at_the_newest_token_and_counts_calls() -> None:
    """Without exits it is asked once a token, in order."""
    plain, drafted = plain_and_drafted(None, Newest(), again := Newest())
    assert drafted.tokens == plain.tokens
    assert again.calls == len(drafted.produced)


def test_a_depth_budget_is_not_about_drafts_from_text() -> None:
    case = Case((2, 4), None, (1, 2), 80, None, "max-prob", None, vocab=5)
    answer = reference(case, "recompute").tokens
    policy = make_policy("max-prob", (0.5,), (2, 4), depth_budget=3.0)
    engine = Engine(case.stack(), draft_length=4)
    sequence = start(engine, case, [Knowing(answer)], policy=policy)
    finish(engine, sequence)
    assert sequence.tokens == answer
    noted = [t.depth for t in sequence.produced if t.drafter != "knowing"]
    assert 0 < len(noted) < 70
    assert sequence.decision.state.offset == pytest.approx(-0.25 * sum(d - 3.0 for d in noted) / 4)


def test_a_drafter_is_shown_what_stands_and_no_more() -> None:
    case = Case((2, 4), None, (1, 2), 60, (0.3,), "max-prob", 5, vocab=5)
    answer = reference(replace(case, thresholds=None), "recompute").tokens
    engine = Engine(case.stack(), draft_length=6)
    drafter = Knowing(answer)
    sequence = start(engine, case, [drafter])
    finish(engine, sequence)
    assert all(asked == answer[: len(asked)] for asked in drafter.asked)
    lengths = [len(asked) for asked in drafter.asked]
    assert lengths == sorted(set(lengths))
    assert len(lengths) < 50


class Wrong(Drafter):
    name = "wrong"

    def __init__(self, token: Any) -> None:
        self.token = token

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        return Proposal([self.token] * limit, 8)


@pytest.mark.parametrize("token", [99, -1, "a", 1.5])
def test_what_is_no_token_ends_its_own_request_alone(token: Any) -> None:
    engine = Engine(MockStack((2, 4)), num_slots=2)
    wrong = engine.start([1], max_new_tokens=9, catch_up="verify", drafters=[Wrong(token)])
    other = engine.start([1], max_new_tokens=9)
    list(engine.generate(other))
    assert wrong.error == f"drafter 'wrong' proposed {token}, which is no token id of the vocabulary of 23"
    assert len(wrong.produced) == 1
    assert len(other.produced) == 9
    assert not engine.busy


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_only_verify_judges_drafts(catch_up: str) -> None:
    with pytest.raises(RequestError, match=f"catch-up '{catch_up}' takes none; use verify"):
        Engine(MockStack()).start([1], max_new_tokens=3, catch_up=catch_up, drafters=[NgramLookup()])


# Lengths that pay.


def priced(a_token: float) -> PassCosts:
    """Costs of a stack of one segment that have been seen: a pass takes 1, a token more so much."""
    costs = PassCosts(1, None)
    for i in range(400):
        count = 1 + i % 12
        costs.note(0, count, 1, 100, 1.0 + a_token * (count - 1))
    return costs


@pytest.mark.parametrize("a_token", [0.02, 0.1, 0.25, 0.6])
def test_costs_are_learnt(a_token: float) -> None:
    found = priced(a_token).curve(1, 8, 1, 100)
    np.testing.assert_allclose(found, 1.0 + a_token * np.arange(9), rtol=0.05)


def test_one_slow_pass_changes_little() -> None:
    costs = priced(0.1)
    before = costs.curve(1, 4, 1, 100)
    costs.note(0, 3, 1, 100, 1000.0)
    np.testing.assert_allclose(costs.curve(1, 4, 1, 100), before, rtol=0.1)


@pytest.mark.parametrize("a_token", [0.02, 0.25])
@pytest.mark.parametrize("match", [1, 2, 5, 9])
def test_the_length_gives_most_tokens_a_second(a_token: float, match: int) -> None:
    lookups = Lookups([Fixed(match)], costs := priced(a_token))
    choice = lookups.choose([1, 2, 3], 100, Load(0, 0, 100, num_produced=10_000))
    rate = Acceptance().rate({1: 0, 2: 1, 5: 3, 9: 4}[match])
    seconds = costs.curve(1, LONGEST_DRAFT, 1, 100)
    speeds = [sum(rate**i for i in range(k + 1)) / seconds[k] for k in range(LONGEST_DRAFT + 1)]
    assert (len(choice.tokens) if choice else 0) == int(np.argmax(speeds))


class Fixed(Drafter):
    name = "fixed"

    def __init__(self, match: int) -> None:
        self.match = match

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        return Proposal([1] * limit, self.match)


def test_rows_beside_it_shorten_drafts_where_a_pass_is_bound_by_arithmetic() -> None:
    """Flat up to eight tokens, then as many times longer as it has tokens: seven rows leave little room."""
    costs = PassCosts(1, None)
    costs.curve = lambda first, more, rows, length: [max(1.0, n / 8) for n in range(first, first + more + 1)]
    lengths = [
        len(choice.tokens)
        if (choice := Lookups([Fixed(3)], costs).choose([1], 99, Load(n, n, 9, 10_000)))
        else 0
        for n in (0, 4, 7)
    ]
    assert lengths[0] >= 7 > lengths[1] > lengths[2]


def test_what_wrong_drafts_may_cost_is_bounded() -> None:
    """Drafts that never are accepted, and say that they surely are: two percent, and no more."""
    lookups = Lookups([Fixed(9)], priced(0.25))
    spent = 0.0
    for produced in range(1, 400):
        choice = lookups.choose([1, 2, 3], 100, Load(0, 0, 100, produced))
        if choice:
            spent += choice.price
            lookups.judged(1, 0)
            lookups.acceptance["fixed"] = Acceptance()  # nothing is learnt: the worst case
        assert spent <= (1.0 - FLOOR) * max(produced, FIRST_TOKENS)
    assert spent > 4.0
    assert lookups.balance == pytest.approx(-spent)


@pytest.mark.parametrize(
    ("said", "judged", "right"), [([1, 1], 2, 2), ([1, 5], 2, 1), ([5], 1, 0), ([1] * 9, 4, 4)]
)
def test_proposals_that_did_not_draft_are_judged_by_what_was_said(
    said: list[int], judged: int, right: int
) -> None:
    """So that exits which seem faster do not keep n-grams from being known."""
    lookups = Lookups([Fixed(2)], priced(0.25))
    expected = Acceptance()
    expected.judged(1, judged, right)
    assert lookups.choose([7, 7], 4, Load(0, 0, 9, other_gain=100.0)) is None
    lookups.choose([7, 7, *said], 4, Load(0, 0, 9, other_gain=100.0))
    assert lookups.acceptance["fixed"] == expected


def test_a_drafter_s_luck_is_its_own() -> None:
    lookups = Lookups([NgramLookup(), Fixed(2)], None)
    before = lookups.acceptance["ngram"].rate(1)
    lookups.choose([1, 2, 3], 3, Load(0, 0, 3))
    lookups.judged(3, 3)
    assert lookups.acceptance["fixed"].rate(1) > before == lookups.acceptance["ngram"].rate(1)
    assert lookups.acceptance["fixed"].rate(2) == Acceptance().rate(2)


# A real bundle.

GRAMMARS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"regex": "((the |And )(king|sea)[ .]?){1,12}"},
    {"grammar": 'start: (word " ")+ "so."\nword: "king" | "kin" | "sea" | /[a-c]{1,3}/'},
    {
        "json_schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 4}, "king": {"enum": ["sea", "so"]}},
            "required": ["name", "king"],
            "additionalProperties": False,
        }
    },
)


class Echo(Drafter):
    """Tokens that the text has, at random."""

    name = "echo"

    def begin(self) -> random.Random:
        return random.Random(0)

    def propose(self, tokens: Sequence[int], limit: int, state: random.Random) -> Proposal:
        return Proposal(state.choices(tokens, k=min(limit, 3)), state.randint(1, 9))


@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(one, marks=pytest.mark.slow) for one in ("int8", "int4"))]
)
def test_random_requests_are_full_depth_to_the_bit(
    precisions: tuple[Path, dict[str, Path]], corpus_file: str, precision: str, num_slots: int
) -> None:
    """100 random prompts, samplers, seeds, drafters and grammars, alone and as many in batches, under
    --exact: tokens, log-probabilities and ends are those of the same request with drafts off.
    """
    pytest.importorskip("llguidance")
    llm = LLM(precisions[1][precision], num_slots=num_slots, exact=True)
    llm.engine.measure = lambda: None  # who drafts does not depend on the machine
    assert llm.stack.exact
    dice = random.Random(num_slots)
    counts: dict[str, DraftCount] = {}
    for _ in range(25):
        pairs = [random_pair(llm, dice, corpus_file) for _ in range(4)]
        while llm.busy:
            llm.step()
        for plain, drafted in pairs:
            assert plain.sequence.request.catch_up == "recompute"
            assert said(drafted.sequence) == said(plain.sequence)
            assert drafted.finish_reason == plain.finish_reason
            add_drafts(counts, drafted.sequence.drafts.counts)
    assert set(counts) == {"exit", "ngram", "corpus", "echo", "grammar"}
    forced = counts.pop("grammar")
    assert forced.accepted > 0  # nothing else is allowed where a grammar drafts
    assert all(0 < count.accepted < count.judged for count in counts.values()), counts


def said(sequence: TokenSequence) -> list[Any]:
    return [(t.id, t.logprob, t.top_logprobs) for t in sequence.produced]


def random_pair(llm: LLM, dice: random.Random, corpus_file: str) -> tuple[Choice, Choice]:
    """One request at full depth, and with drafts; few tokens to choose from: some guesses are right."""
    few = dice.sample(range(20, 60), dice.randint(2, 4))
    prompt = [dice.choice(few) for _ in range(dice.choice([1, 3, 20, 20, 90, 257]))]
    grammar = dice.choice(GRAMMARS)
    request = Options.from_json(
        {
            "max_tokens": dice.randint(1, 25),
            "temperature": dice.choice([0.0, 0.0, 0.7, 2.0]),
            "top_p": dice.choice([1.0, 0.9]),
            "top_k": dice.choice([0, 5]),
            "seed": dice.randrange(1000),
            "repetition_penalty": dice.choice([1.0, 1.0, 1.2]),
            "frequency_penalty": dice.choice([0.0, 0.0, 0.3]),
            "logit_bias": {} if grammar else {str(token): 50.0 for token in few},
            "logprobs": dice.choice([0, 3]),
            "stop_token_ids": [] if grammar else dice.sample(few, dice.choice([0, 0, 1])),
            **grammar,
        }
    )
    draft = dice.choice(["exit", "ngram", "corpus", "auto", "auto", f"{__name__}:Echo"])
    exits = {"exit": True, "auto": dice.random() < 0.5}.get(draft, False)
    drafted = replace(
        request,
        draft=draft,
        catch_up="verify",
        threshold=(dice.choice([0.0, 0.02, 0.1]),) if exits else None,
        draft_corpus=corpus_file if draft in ("corpus", "auto") else None,
    )
    plain, judged = (llm.submit(prompt, options) for options in (request, drafted))
    return plain.choices[0], judged.choices[0]


def generated(bundle: Path, *flags: str) -> Any:
    return CliRunner().invoke(
        run_main,
        ["generate", str(bundle), "--prompt", "the king the king", "--max-tokens", "40", *flags],
    )


@pytest.fixture
def corpus_file(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text("And the king went up to the mountain; and it was so.\n" * 3)
    return str(tmp_path / "corpus.txt")


def test_the_command_drafts_and_tells(tiny_bundle: Path, corpus_file: str) -> None:
    def answer(*flags: str) -> dict[str, Any]:
        result = generated(tiny_bundle, "--json", *flags)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    plain = answer()
    for flags in (
        ["--draft", "ngram"],
        ["--draft", "corpus", "--draft-corpus", corpus_file],
        ["--draft", "auto"],
        ["--draft", "auto", "--threshold", "0.02", "--draft-corpus", corpus_file],
        ["--draft", "off", "--threshold", "0.02", "--catch-up", "verify"],
        ["--draft", f"{__name__}:Again"],
    ):
        found = answer(*flags)
        assert found["text"] == plain["text"]
        usage = found["usage"]
        assert usage["drafted"] == sum(one["drafted"] for one in usage["drafters"].values())
        assert sum("drafter" in token for token in found["tokens"]) == usage["accepted"]
    assert plain["usage"]["drafters"] == {}


class Again(Drafter):
    """The last token once more."""

    def propose(self, tokens: Sequence[int], limit: int, state: Any) -> Proposal:
        return Proposal([tokens[-1]] * limit, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft", "ngrams"], "unknown draft 'ngrams'; did you mean 'ngram'"),
        (["--draft", "ngram", "--catch-up", "recompute"], "draft 'ngram' needs full depth to judge it"),
        (["--draft", "auto", "--catch-up", "propagate"], "which catch-up 'propagate' does not"),
        (["--draft", "ngram", "--threshold", "0.5"], "threshold 0.5 has no effect with draft 'ngram'"),
        (["--draft", "ngram", "--policy", "entropy"], "policy entropy has no effect without a threshold"),
        (["--draft", "corpus"], "draft 'corpus' needs texts to draft from; give --draft-corpus FILE|DIR"),
        (["--draft", "corpus", "--draft-corpus", "none"], "the corpus none is not there"),
        (["--draft", "pathlib:Path"], "is no class with the methods of ease_runtime.drafters.Drafter"),
        (["--draft", "nowhere:Nothing"], "draft 'nowhere:Nothing' cannot be loaded"),
    ],
)
def test_what_cannot_draft_is_one_line(tiny_bundle: Path, flags: list[str], message: str) -> None:
    result = generated(tiny_bundle, *flags)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_request_names_no_files_and_no_code() -> None:
    base = Options(draft="auto")
    for values, message in (
        ({"draft_corpus": "/etc"}, "only who runs the command can name files"),
        ({"draft": "os:path"}, "only who runs the command can name code"),
        ({"catch_up": "recompute"}, "draft 'auto' needs full depth to judge it"),
    ):
        with pytest.raises(RequestError, match=message):
            Options.from_json(values, base)
    assert Options.from_json({"draft": "off", "catch_up": "recompute"}, base).draft == "off"


def test_calibrated_thresholds_ask_no_exit_under_drafts(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle)
    certificate = {"policy": "max-prob", "thresholds": 0.02, "catch_up": "recompute", "risk": "loss"}
    llm.manifest = replace(llm.manifest, calibration={**certificate, "delta": 1, "epsilon": 1, "data": "x"})
    for draft, asked in (("exit", True), ("off", True), ("ngram", False), ("auto", False)):
        (choice,) = llm.submit([1, 2, 3], Options(draft=draft)).choices
        assert bool(choice.sequence.counters.asked) == asked, draft
        assert (choice.sequence.drafts.lookups is not None) == (not asked)
    (choice,) = llm.submit([1, 2, 3], Options(draft="auto", threshold=(0.3,))).choices
    assert choice.sequence.counters.asked


def test_batches_and_chats_draft_from_text(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle, num_slots=3)
    lines = [{"prompt": "the king the king the"}, {"prompt": "the king the king the", "draft": "ngram"}]
    source = [(number, json.dumps(line).encode()) for number, line in enumerate(lines, 1)]
    plain, drafted = map(json.loads, answer_lines(llm, source, Options(max_tokens=20), 3))
    assert drafted["choices"] == plain["choices"]
    assert drafted["usage"]["drafters"]["ngram"]["drafted"] > 0
    assert "drafters" not in plain["usage"]
    chats = [Conversation(llm, Options(max_tokens=12, draft=draft)) for draft in ("off", "ngram")]
    for text in ("the king", "the king and the king"):
        first, second = ([event.id for event in chat.say(text)] for chat in chats)
        assert first == second


def test_a_drafter_of_one_s_own_as_an_object(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle)
    plain = list(llm.generate("the king", Options(max_tokens=30)))
    generation = llm.submit("the king", Options(max_tokens=30), drafter=Knowing([e.id for e in plain]))
    assert generation.choices[0].sequence.request.catch_up == "verify"
    llm.cancel(generation)
    drafter = Again()
    drafter.name = "again"
    events = list(llm.generate("the king", Options(max_tokens=30), drafter=drafter))
    assert [(e.id, e.logprob) for e in events] == [(e.id, e.logprob) for e in plain]
