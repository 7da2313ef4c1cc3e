"""Tokenizers lose nothing, and packing leaves nothing out but the rest that fills no block."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ease_common.errors import DataError
from ease_train.data import tokens
from ease_train.data.tokens import END, UNKNOWN, cached_stream, encode_stream, in_parts, pack, train_tokenizer
from ease_train.training.config import TokenizerConfig

TEXT = "And the king went up;\n\n  two spaces, a tab\t, naïve café — “quotes” 日本語 🙂\n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([TEXT] * 5, TokenizerConfig(kind="bpe", bpe_vocab_size=300))


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_bytes_round_trip_whatever_the_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text).ids) == text


def test_characters_round_trip() -> None:
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(kind="char"))
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) == len(TEXT)  # one token a character, white space included
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.get_vocab_size() == len(set(TEXT)) + 2
    assert tokenizer.encode("ж").ids == [tokenizer.token_to_id(UNKNOWN)]


def test_bpe_learns_as_many_words_as_asked(bpe: Tokenizer) -> None:
    assert bpe.get_vocab_size() == 300
    assert len(bpe.encode(TEXT).ids) < len(TEXT.encode())


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_end_stands_before_every_document(kind: str) -> None:
    documents = ["one two", "three"]
    tokenizer = train_tokenizer(documents, TokenizerConfig(kind=kind, bpe_vocab_size=260))
    end = tokenizer.token_to_id(END)
    stream = encode_stream(tokenizer, documents)
    assert stream.dtype == np.int32
    expected = [end, *tokenizer.encode("one two").ids, end, *tokenizer.encode("three").ids]
    assert stream.tolist() == expected


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_an_end_that_a_document_mentions_is_text(kind: str, tmp_path: Path) -> None:
    documents = [f"The tag {END} is written in this manual.", f"{END}{END}", "three"]
    tokenizer = train_tokenizer(documents, TokenizerConfig(kind=kind, bpe_vocab_size=260))
    end = tokenizer.token_to_id(END)
    stream = encode_stream(tokenizer, documents)
    assert (stream == end).sum() == 3
    assert [
        tokenizer.decode(part.tolist()) for part in np.split(stream, np.flatnonzero(stream == end))[1:]
    ] == documents
    assert tokenizer.encode(END).ids == [end], "the tokenizer is left as it was"
    meant = encode_stream(tokenizer, documents, parse_special=True)
    assert (meant == end).sum() == 6
    assert cached_stream(tokenizer, documents, tmp_path).tolist() == stream.tolist()
    assert cached_stream(tokenizer, documents, tmp_path, parse_special=True).tolist() == meant.tolist()


@given(st.integers(21, 200), st.integers(1, 20))
def test_blocks_overlap_by_one_token(tokens: int, length: int) -> None:
    stream = np.arange(tokens, dtype=np.int32)
    blocks = pack(stream, length, 1, "stream")
    assert blocks.shape == ((tokens - 1) // length, length + 1)
    inputs = blocks[:, :-1].ravel()
    targets = blocks[:, 1:].ravel()
    used = len(blocks) * length
    assert inputs.tolist() == list(range(used))  # every token is an input once,
    assert targets.tolist() == list(range(1, used + 1))  # and the next one its target
    assert tokens - 1 - used < length


def test_too_little_text_says_how_much_there_is(make_recipe: Callable[..., object]) -> None:
    with pytest.raises(
        DataError,
        match="corpus has 10 tokens: 2 blocks of 4, expected at least 3; use a shorter sequence_length or "
        "more "
        "text",
    ):
        pack(np.arange(10, dtype=np.int32), 4, 3, "corpus")


def test_tokens_are_kept_until_text_or_tokenizer_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (
        train_tokenizer(["abc abd" * 9], TokenizerConfig(kind=kind, bpe_vocab_size=260))
        for kind in ("char", "bpe")
    )
    expected = encode_stream(one, ["abc", "abd"])
    assert cached_stream(one, ["abc", "abd"], None).tolist() == expected.tolist()
    assert list(tmp_path.iterdir()) == []
    first = cached_stream(one, ["abc", "abd"], tmp_path)
    assert first.tolist() == expected.tolist()
    assert len(list(tmp_path.iterdir())) == 1
    for documents, tokenizer in ([["abcabd"], one], [["abc", "abc"], one], [["abc", "abd"], other]):
        assert (
            cached_stream(tokenizer, documents, tmp_path).tolist()
            == encode_stream(tokenizer, documents).tolist()
        )
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(tokens, "encoded_parts", lambda *_: pytest.fail("encoded again"))
    again = cached_stream(one, ["abc", "abd"], tmp_path)
    assert isinstance(again, np.memmap)
    assert again.tolist() == expected.tolist()


def test_texts_without_spaces_are_cut_for_the_training_of_a_tokenizer() -> None:
    texts = ["no long word here", "x" * 2500, "a " + "y" * 1000 + " z", ""]
    parts = list(in_parts(texts))
    assert "".join(parts) == "".join(texts)
    assert parts == [texts[0], "x" * 1000, "x" * 1000, "x" * 500, texts[2], ""]
    config = TokenizerConfig(kind="bpe", bpe_vocab_size=300)
    spaced = ["the king went up to the mountain " * 20]
    assert (
        train_tokenizer(spaced, config).to_str() == train_tokenizer(list(in_parts(spaced)), config).to_str()
    )
