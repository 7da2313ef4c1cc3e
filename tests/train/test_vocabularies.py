"""Tokenizers of bare vocabularies, against the rules that SentencePiece and llama.cpp read them by, written
down once more here.
"""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from tokenizers import Tokenizer

from ease_common.errors import ModelImportError
from ease_train.convert.vocabularies import (
    SPACE,
    SPLITS,
    TokenType,
    Vocabulary,
    byte_level,
    sentencepiece_bpe,
    split_of,
    unigram,
)

LETTERS = ("a", "b", "c", SPACE)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = {"<unk>": TokenType.UNKNOWN, "</s>": TokenType.CONTROL, "[IN]": TokenType.USER_DEFINED}


def make_vocabulary(seed: int, with_bytes: bool) -> Vocabulary:
    """Random pieces over three letters and the space; all scores differ."""
    rng = random.Random(seed)
    pieces = {"".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 4))) for _ in range(60)}
    known = [*SPECIAL, *(BYTES if with_bytes else ()), *sorted(pieces), *LETTERS]
    scores = [-float(number) / 3 for number in rng.sample(range(1, 1000), len(known))]
    types = [SPECIAL.get(token, TokenType.BYTE if token in BYTES else TokenType.NORMAL) for token in known]
    return Vocabulary(known, types, scores, frozenset({0, 1}))


def pieces_of(vocabulary: Vocabulary) -> dict[str, float]:
    rows = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    return {token: score for token, score, kind in rows if kind == TokenType.NORMAL}


def best_merges(text: str, vocabulary: Vocabulary) -> list[str]:
    """SentencePiece's BPE: of all neighbours whose union is a piece, the best, the first of those; until
    there are none.
    """
    scores = pieces_of(vocabulary)
    symbols = list(text)
    while True:
        unions = [
            (-scores[one + two], at) for at, (one, two) in enumerate(pairwise(symbols)) if one + two in scores
        ]
        if not unions:
            break
        at = min(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    spelt = (
        [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        for symbol in symbols
    )
    return [token for tokens in spelt for token in tokens]


def most_likely(text: str, vocabulary: Vocabulary) -> list[str]:
    """The unigram model: of all ways to cut the text, the one with the highest sum; runs of unknown
    characters are one token.
    """
    scores = pieces_of(vocabulary)
    unknown = min(scores.values()) - 10
    best = [(0.0, [""])] + [(-1e9, [""])] * len(text)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - 4), end):
            piece = text[start:end]
            score = scores.get(piece, unknown if end - start == 1 else None)
            if score is not None and best[start][0] + score > best[end][0]:
                best[end] = (best[start][0] + score, [*best[start][1], piece if piece in scores else "<unk>"])
    found = best[-1][1][1:]
    return [
        token for at, token in enumerate(found) if token != "<unk>" or at == 0 or found[at - 1] != "<unk>"
    ]


def around_special(text: str, inner: Callable[[str], list[str]]) -> list[str]:
    """Special and user-defined tokens are found first; each stretch of text between them is read on
    its own.
    """
    at = min((at for token in SPECIAL if (at := text.find(token)) >= 0), default=-1)
    if at < 0:
        return inner(text) if text else []
    token = next(token for token in SPECIAL if text.startswith(token, at))
    return [*around_special(text[:at], inner), token, *around_special(text[at + len(token) :], inner)]


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    parts = ["a", "b", "c", "aa", "ab", " ", "  ", SPACE, "é", "👍", "\n", *SPECIAL]
    return ["", " ", "   ", " a", "a "] + [
        "".join(rng.choice(parts) for _ in range(rng.randint(1, 12))) for _ in range(200)
    ]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_bpe_merges_what_scores_best(seed: int, prefix: bool) -> None:
    vocabulary = make_vocabulary(seed, with_bytes=True)
    tokenizer = sentencepiece_bpe(vocabulary, unknown=0, space_prefix=prefix)
    start = SPACE if prefix else ""
    for text in texts(seed):
        expected = around_special(
            text, lambda part: best_merges(start + part.replace(" ", SPACE), vocabulary)
        )
        assert tokenizer.encode(text).tokens == expected, repr(text)


@pytest.mark.parametrize(("prefix", "merge"), [(True, False), (False, False), (True, True), (False, True)])
def test_unigram_takes_the_most_likely_cut(prefix: bool, merge: bool) -> None:
    vocabulary = make_vocabulary(3, with_bytes=False)
    tokenizer = unigram(vocabulary, unknown=0, space_prefix=prefix, merge_spaces=merge)

    def spaced(part: str) -> str:
        if merge:
            part = " ".join(word for word in part.split(" ") if word)
        return (" " + part if part.strip(" ") and (prefix or merge) else part).replace(" ", SPACE)

    for text in texts(4):
        expected = around_special(
            text, lambda part: most_likely(spaced(part), vocabulary) if spaced(part) else []
        )
        assert [tokenizer.id_to_token(token) for token in tokenizer.encode(text).ids] == expected, repr(text)


def test_text_comes_back() -> None:
    vocabulary = make_vocabulary(1, with_bytes=True)
    tokenizer = sentencepiece_bpe(vocabulary, unknown=0, space_prefix=True)
    for text in ("a cab", "  a", "é👍 b", "a\n", " "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


# by the patterns of the models' own tokenizer.json
CUTS = {
    "llama-bpe": ["I", "'m", "ĠHERE", "'S", "ĠĠ", "Ġ", "123", "45", "(x", ")ĊĊ", "Ġa", "ĠâĤ¬", "Ġ"],
    "qwen2": ["I", "'m", "ĠHERE", "'S", "ĠĠ", "Ġ", "1", "2", "3", "4", "5", "(x", ")ĊĊ", "Ġa", "ĠâĤ¬", "Ġ"],
    "tekken": ["I", "'m", "ĠHERE", "'S", "ĠĠ", "Ġ", "1", "2", "3", "4", "5", "(x", ")ĊĊ", "Ġa", "ĠâĤ¬", "Ġ"],
    "smollm": [
        "I",
        "'m",
        "ĠHERE",
        "'",
        "S",
        "ĠĠĠ",
        "1",
        "2",
        "3",
        "4",
        "5",
        "(",
        "x",
        ")",
        "ĊĊ",
        "Ġa",
        "ĠâĤ¬",
        "Ġ",
    ],
    "gpt-2": ["I", "'m", "ĠHERE", "'", "S", "ĠĠ", "Ġ12345", "(", "x", ")", "ĊĊ", "Ġa", "ĠâĤ¬", "Ġ"],
}


@pytest.mark.parametrize("name", CUTS)
def test_a_text_is_cut_as_its_split_says(name: str) -> None:
    pieces = alphabet_tokenizer(name).pre_tokenizer.pre_tokenize_str("I'm HERE'S   12345(x)\n\n a € ")
    assert [piece for piece, _ in pieces] == CUTS[name]


def alphabet_tokenizer(name: str, *words: str) -> Tokenizer:
    tokens = ["<s>", *"abcdefghijklmnopqrstuvwxyz", *words]
    types = [TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1)
    return byte_level(Vocabulary(tokens, types, [0.0] * len(tokens), frozenset({0})), [], split_of(name))


def test_whole_words_are_tokens_only_where_the_split_says_so() -> None:
    assert alphabet_tokenizer("llama-bpe", "king").encode("king").tokens == ["king"]
    assert alphabet_tokenizer("dbrx", "king").encode("king").tokens == [*"king"]


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_loses_no_text(name: str) -> None:
    text = "Où est-il? \r\n\t def f(x): return 3.14 # ½ नमस्ते 👍\u00a0\n\n  end  "
    pieces = alphabet_tokenizer(name).pre_tokenizer.pre_tokenize_str(text)
    assert sum(end - start for _, (start, end) in pieces) == len(text)


def changed(vocabulary: Vocabulary, **tokens: float) -> Vocabulary:
    more = [*vocabulary.tokens, *tokens], [*vocabulary.types, *[TokenType.NORMAL] * len(tokens)]
    return Vocabulary(*more, [*vocabulary.scores, *tokens.values()], vocabulary.special)


def test_what_no_list_of_merges_can_say_is_refused() -> None:
    whole = make_vocabulary(0, with_bytes=True)
    with pytest.raises(ModelImportError, match=r"'bbbbbb' and 'cccccc'|'cccccc' and 'bbbbbb'"):
        sentencepiece_bpe(changed(whole, bbb=5.0, ccc=6.0, bbbbbb=7.0, cccccc=7.0), 0, space_prefix=True)
    with pytest.raises(ModelImportError, match=r"'aX' holds 'X', which is no token"):
        sentencepiece_bpe(changed(whole, aX=1.0), 0, space_prefix=True)
    with pytest.raises(ModelImportError, match=r"lacks 256 of 256 byte tokens, the first is <0x00>"):
        sentencepiece_bpe(make_vocabulary(0, with_bytes=False), 0, space_prefix=True)
    with pytest.raises(ModelImportError, match="unigram vocabulary with byte tokens"):
        unigram(whole, 0, space_prefix=True, merge_spaces=False)
    with pytest.raises(ModelImportError, match="has the token 'a' twice"):
        changed(whole, a=1.0)
    with pytest.raises(ModelImportError, match=r"tokenizer.ggml.pre = 'lama-bpe'.*did you mean 'llama-bpe'"):
        split_of("lama-bpe")
