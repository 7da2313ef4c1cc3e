"""Streaming text: the pieces together are the text, however the tokens cut it, up to the stop string and not
a character further.
"""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import toy_text
from ease_runtime.engine.sequence import Token
from ease_runtime.text.streaming import Detokenizer, Piece, StopMatcher, StopPattern, TextWriter, num_shared

BYTES = toy_text.byte_tokenizer()
PIECES = toy_text.piece_tokenizer()


def pieces_of(tokenizer: Tokenizer, ids: list[int], context: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.step(token) for token in ids), detokenizer.flush()]


def write(
    ids: list[int], stops: Sequence[str | tuple[str | int, ...]], tokenizer: Tokenizer = BYTES
) -> tuple[list[list[Piece]], TextWriter]:
    """What a writer gives after each token, up to the stop. The token 0 is special."""
    writer = TextWriter(tokenizer, [], [StopPattern(stop) for stop in stops], {0})
    given = []
    for place, token in enumerate(ids):
        given.append(writer.add(Token(token, 1, 0.5, -1.0), last=place == len(ids) - 1))
        if writer.stopped:
            break
    return given, writer


def text_of(given: list[list[Piece]]) -> str:
    return "".join(piece.text for pieces in given for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=60), prompt=st.text(max_size=20))
def test_pieces_add_up_whatever_the_bytes(ids: list[int], prompt: str) -> None:
    """Random bytes, most of them no character: the pieces are the decoded whole, and no piece shows half a
    character.
    """
    context = BYTES.encode(prompt).ids
    whole = BYTES.decode(context + ids, skip_special_tokens=True)
    assert "".join(pieces_of(BYTES, ids, context)) == whole[len(BYTES.decode(context)) :]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80), prompt=st.text(max_size=20))
def test_no_piece_is_a_broken_character(text: str, prompt: str) -> None:
    ids = BYTES.encode(text).ids
    pieces = pieces_of(BYTES, ids, BYTES.encode(prompt).ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize(
    ("stop", "expected", "count"),
    [
        ((0,), "a", 2),
        ((0, "b"), "a", 3),
        (("a", 0), "", 2),
        (("b", 0, "c"), "a", 5),
        ((0, 0), "abc", 7),
        ("bc", "a", None),
    ],
)
def test_special_tokens_stand_in_stop_strings(
    stop: tuple[str | int, ...], expected: str, count: int | None
) -> None:
    """a, 0, b, 0, c, 0, 0: they have no text, but they stand between the letters and are stopped at."""
    a, b, c = (BYTES.encode(letter).ids[0] for letter in "abc")
    given, writer = write([a, 0, b, 0, c, 0, 0, a], [stop])
    assert writer.stopped == (count is not None)
    if count is not None:
        assert (text_of(given), len(given)) == (expected, count)
        assert sum(len(pieces) for pieces in given) == count
    else:
        assert text_of(given) == "abca"


def test_a_character_comes_with_its_last_byte() -> None:
    ids = BYTES.encode(
        "€!"
    ).ids  # the merges cut it after two bytes, and join its third with the next character
    assert len(ids) == 2
    assert pieces_of(BYTES, ids, []) == ["", "€!", ""]
    assert pieces_of(BYTES, ids[:1], []) == ["", "\ufffd"]


def test_special_tokens_have_no_text_and_spaces_stay() -> None:
    """'▁the' loses its space at the start of a text only: not after the prompt, nor after a special token."""
    the = 3
    a = 4
    ing = 5
    assert pieces_of(PIECES, [the, a, ing, 1, the], [])[:-1] == ["the", " a", "ing", "", " the"]
    assert pieces_of(PIECES, [the, a], [0, ing])[:-1] == [" the", " a"]
    euro = [7 + byte for byte in "€".encode()]
    assert pieces_of(PIECES, [*euro, a], [ing]) == ["", "", "", "€ a", ""]
    assert pieces_of(PIECES, [*euro, *euro], [ing])[-1] == "€€"


OF_ANY_KIND = {kind: toy_text.decoder_tokenizer(kind) for kind in toy_text.DECODERS}
IN_BYTES = [[3 + byte for byte in character.encode()] for character in "é日本👍ß€\n\tz"]
WORDS = [[259 + place] for place in range(len(toy_text.WORDS.split()) + 2)]
OTHERS = [[token] for token in (0, 1, 2, 10_000, *range(3, OF_ANY_KIND["none"].get_vocab_size()))]
GROUPS = st.lists(st.one_of(st.sampled_from(groups) for groups in (IN_BYTES, WORDS, OTHERS)), max_size=25)
TOKENS = GROUPS.map(lambda groups: [token for group in groups for token in group])


@settings(max_examples=100, deadline=None)
@given(prompt=TOKENS, answer=TOKENS)
def test_the_pieces_are_one_decode_of_the_whole(prompt: list[int], answer: list[int]) -> None:
    """Whatever the decoder and wherever the prompt ends: what prompt and answer read, after what the prompt
    reads.
    """
    for kind, tokenizer in OF_ANY_KIND.items():
        whole = tokenizer.decode(prompt + answer)
        before = tokenizer.decode(prompt)
        pieces = pieces_of(tokenizer, answer, prompt)
        assert "".join(pieces) == whole[num_shared(before, whole) :], kind
        assert len(pieces) == len(answer) + 1


@pytest.mark.parametrize("kind", ["llama 2", "gemma"])
def test_characters_in_bytes_and_a_prompt_that_ends_inside_one(kind: str) -> None:
    tokenizer = toy_text.decoder_tokenizer(kind)
    euro, hand = ([3 + byte for byte in character.encode()] for character in "€👍")
    the = tokenizer.token_to_id("▁the")
    broken = 3 + 0xFF
    assert pieces_of(tokenizer, [*euro, *hand, *euro, the], [the]) == [*[""] * 10, "€👍€ the", ""]
    assert "".join(pieces_of(tokenizer, [the], [the, *euro, *hand, *euro])) == " the", (
        "nothing of the prompt's own bytes"
    )
    assert "".join(pieces_of(tokenizer, [*euro[1:], the], [the, euro[0]])) == "€ the"
    assert "".join(pieces_of(tokenizer, [the], [the, *euro[:2]])) == " the"
    assert "".join(pieces_of(tokenizer, [*euro, broken, the], [the])) == "\ufffd" * 4 + " the"


@pytest.mark.parametrize("last", [True, False])
def test_a_stop_string_is_looked_for_in_the_text_as_it_reads(last: bool) -> None:
    """Characters in bytes read only together, whether the text ends with them or goes on."""
    tokenizer = toy_text.decoder_tokenizer("llama 2")
    the = tokenizer.token_to_id("▁the")
    ids = [3 + byte for byte in "a€👍b".encode()]
    given, writer = write([the, *ids, *([] if last else [the])], ["👍b"], tokenizer)
    assert (text_of(given), writer.stopped) == ("thea€", True)
    given, writer = write([the, *ids[:-2], the], ["€"], tokenizer)
    assert (text_of(given), writer.stopped) == ("the" + "\ufffd" * 7 + " the", False), (
        "a byte is missing, so none of them reads"
    )


def test_a_long_run_of_broken_bytes_costs_no_more_than_a_text() -> None:
    broken = BYTES.encode("é").ids[:1]
    start = time.perf_counter()
    assert "".join(pieces_of(BYTES, broken * 5000, [])) == "\ufffd" * 5000
    assert time.perf_counter() - start < 5


def first_stop(text: str, stops: list[str]) -> int:
    """Brute force: where the answer ends, by the first end of a stop string, the longest first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return len(text)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    cut=st.integers(1, 5),
)
def test_stop_strings_against_brute_force(text: str, stops: list[str], cut: int) -> None:
    """Fed in parts of any size: found where they are, and what is held is the longest end that begins one of
    them.
    """
    matcher = StopMatcher([StopPattern(stop) for stop in stops])
    found = None
    for start in range(0, len(text), cut):
        found = matcher.feed(text[start : start + cut])
        if found is not None:
            break
        so_far = text[: start + cut]
        held = max(n for stop in stops for n in range(len(stop)) if so_far.endswith(stop[:n]))
        assert matcher.num_held == held
    assert (len(text) if found is None else found) == first_stop(text, stops)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("the a€\n", max_size=40),
    stops=st.lists(st.text("the a€\n", min_size=1, max_size=5), max_size=3),
)
def test_the_answer_ends_before_the_stop_string(text: str, stops: list[str]) -> None:
    """Across the borders of tokens and of characters; what was given never has to be taken back."""
    given, writer = write(BYTES.encode(text).ids, stops)
    end = first_stop(text, stops)
    assert text_of(given) == text[:end]
    assert writer.stopped == (end < len(text))
    so_far = ""
    for pieces in given:
        so_far += "".join(piece.text for piece in pieces)
        assert text[:end].startswith(so_far)


def test_each_token_comes_once_and_in_order() -> None:
    ids = BYTES.encode("abcabd the end").ids
    given, writer = write(ids, ["abd!", " end?"])
    assert [piece.token.id for pieces in given for piece in pieces] == ids
    assert not writer.stopped
    given, writer = write(ids, ["bd t"])
    assert writer.stopped
    assert text_of(given) == "abca"
    assert [piece.token.id for pieces in given for piece in pieces] == ids[: len(given)]
    assert BYTES.decode(ids[: len(given)]).startswith("abcabd t")


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    given, _ = write(BYTES.encode("x12x123").ids, ["1234"])
    assert [[piece.text for piece in pieces] for pieces in given] == [
        ["x"],
        [],
        [],
        ["1", "2", "x"],
        [],
        [],
        ["1", "2", "3"],
    ]


def test_no_stop_strings_hold_nothing() -> None:
    given, _ = write(BYTES.encode("abc").ids, [])
    assert [[piece.text for piece in pieces] for pieces in given] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("stop", ["a" * 10_000 + "b", "ab" * 5_000 + "c", "x" * 10_000])
def test_a_stop_string_of_10_kb_costs_little(stop: str) -> None:
    """The worst texts for it: they nearly match, over and over."""
    text = (stop[:-1] + "!") * 2
    start = time.perf_counter()
    matcher = StopMatcher([StopPattern(stop)])
    assert matcher.feed(text) is None
    assert matcher.feed(stop[:-1]) is None
    assert matcher.num_held == len(stop) - 1
    assert matcher.feed(stop[-1]) == len(text)
    assert time.perf_counter() - start < 2
