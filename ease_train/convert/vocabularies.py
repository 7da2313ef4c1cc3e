"""Tokenizers from the bare vocabulary that a GGUF file holds, each as llama.cpp reads it.

Byte-level BPE (`gpt2`, with the splits that `tokenizer.ggml.pre` names), SentencePiece's BPE (`llama`) and
its unigram model (`t5`). Splits are those of the models' own tokenizer.json; llama.cpp writes tekken's
without combining marks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ease_common.errors import ModelImportError, did_you_mean

SPACE = "▁"  # how SentencePiece writes one
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + LINES
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + LINES
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Split:
    """How text is cut before byte-level BPE merges: at each pattern in turn, the matches being pieces of
    their own.

    `whole_words`: a piece that is a token is that token, whatever the merges say. `starts`: a start token
    stands before a text unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    starts: bool = False


_DIGITS = Split((r"\p{N}", GPT2))
_LLAMA3 = Split((LLAMA3,), whole_words=True, starts=True)
SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), Split((QWEN2,))),
    "tekken": Split((TEKKEN,), whole_words=True, starts=True),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), Split((GPT2,))),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, what each is, and, for SentencePiece's, their scores.

    `special` are the ids that stand for no text of a user's (control tokens, the unknown one).
    """

    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    special: frozenset[int]

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            (twice, _), *_ = Counter(self.tokens).most_common(1)
            raise ModelImportError(f"the vocabulary has the token {twice!r} twice; expected each once")

    def of(self, *types: TokenType) -> Iterator[tuple[int, str]]:
        """(id, token) of the tokens of these types that are not special."""
        for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in types and number not in self.special:
                yield number, token


def split_of(name: str) -> Split:
    """The split that `tokenizer.ggml.pre` names. Raises ModelImportError."""
    if name not in SPLITS:
        hint = did_you_mean(name, SPLITS)
        raise ModelImportError(
            f"tokenizer.ggml.pre = '{name}': how this tokenizer splits text is not known here; {hint}"
        )
    return SPLITS[name]


def byte_level(vocabulary: Vocabulary, merges: Sequence[str], split: Split) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it. Raises ModelImportError."""
    pairs = [_pair(merge) for merge in merges]
    tokenizer = _tokenizer(
        models.BPE, vocab=_numbered(vocabulary), merges=pairs, ignore_merges=split.whole_words
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, vocabulary)


def sentencepiece_bpe(vocabulary: Vocabulary, unknown: int, space_prefix: bool) -> Tokenizer:
    """SentencePiece's BPE, as Llama 2 and Mistral have it: the pair whose union scores best is merged first.

    Characters that are no tokens are spelt in bytes. Raises ModelImportError for what cannot be said as a
    list of merges.
    """
    if missing := {f"<0x{byte:02X}>" for byte in range(256)} - {
        token for _, token in vocabulary.of(TokenType.BYTE)
    }:
        lacks = f"{len(missing)} of 256 byte tokens, the first is {min(missing)}"
        raise ModelImportError(f"the vocabulary lacks {lacks}; other characters could not be written")
    _check_characters(vocabulary)
    tokenizer = _tokenizer(
        models.BPE,
        vocab=_numbered(vocabulary),
        merges=_merges(vocabulary),
        unk_token=vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = [normalizers.Prepend(SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = _spaces_back(space_prefix)
    return _with_added(tokenizer, vocabulary)


def unigram(vocabulary: Vocabulary, unknown: int, space_prefix: bool, merge_spaces: bool) -> Tokenizer:
    """A unigram model, as T5 has it: the most likely of all ways to cut a text. Raises ModelImportError."""
    if any(vocabulary.of(TokenType.BYTE)):
        raise ModelImportError(
            "a unigram vocabulary with byte tokens cannot be imported: its readers disagree about them"
        )
    _check_characters(vocabulary)
    worst = min((vocabulary.scores[number] for number, _ in vocabulary.of(TokenType.NORMAL)), default=0.0)
    scores = [
        0.0
        if kind == TokenType.USER_DEFINED
        else worst
        if number in vocabulary.special
        else vocabulary.scores[number]
        for number, kind in enumerate(vocabulary.types)
    ]
    tokenizer = _tokenizer(
        models.Unigram, vocab=list(zip(vocabulary.tokens, scores, strict=True)), unk_id=unknown
    )
    tokenizer.normalizer = normalizers.Sequence(_spacing(space_prefix, merge_spaces))
    tokenizer.decoder = _spaces_back(space_prefix or merge_spaces)
    return _with_added(tokenizer, vocabulary)


def _spacing(space_prefix: bool, merge_spaces: bool) -> list[Any]:
    """Spaces as llama.cpp writes them for a unigram model: none is put before a text of spaces alone."""
    before_words = [normalizers.Replace(Regex(r"\A(?= *[^ ])"), " ")] if space_prefix or merge_spaces else []
    single = (
        [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
        if merge_spaces
        else []
    )
    return [*single, *before_words, normalizers.Replace(" ", SPACE)]


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of a line of `tokenizer.ggml.merges`: a space stands between them.

    Raises ModelImportError.
    """
    at = merge.find(" ", 1)
    if at < 0:
        raise ModelImportError(
            f"tokenizer.ggml.merges holds {merge!r}, expected two tokens with a space between"
        )
    return merge[:at], merge[at + 1 :]


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair whose union is a token, the best union first.

    Raises ModelImportError where two unions score alike.

    A user-defined token is found before anything is merged, but for one whose spaces are written as
    SentencePiece's.
    """
    symbols = {token: number for number, token in vocabulary.of(TokenType.NORMAL, TokenType.UNUSED)}
    symbols |= {token: number for number, token in vocabulary.of(TokenType.USER_DEFINED) if SPACE in token}
    ways: dict[str, list[tuple[str, str]]] = {}
    for token in symbols:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        if known := [(left, right) for left, right in cuts if left in symbols and right in symbols]:
            ways[token] = known
    best_first = sorted(ways, key=lambda token: -vocabulary.scores[symbols[token]])
    for one, other in pairwise(best_first):
        if (score := vocabulary.scores[symbols[one]]) == vocabulary.scores[symbols[other]]:
            raise ModelImportError(
                f"the tokens {one!r} and {other!r} have the same score {score}: which is merged first is "
                "not said; "
                "convert the model again from its tokenizer.model"
            )
    return [pair for token in best_first for pair in ways[token]]


def _check_characters(vocabulary: Vocabulary) -> None:
    """Refuse a token with a character that is none, which SentencePiece's trainer never leaves: merges would
    lack an id.
    """
    symbols = {
        token for _, token in vocabulary.of(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    }
    for _, token in vocabulary.of(TokenType.NORMAL, TokenType.UNUSED):
        if strange := next((character for character in token if character not in symbols), None):
            raise ModelImportError(
                f"the token {token!r} holds {strange!r}, which is no token: no vocabulary of SentencePiece's"
            )


def _spaces_back(strip_first: bool) -> Any:
    first = [decoders.Strip(" ", 1, 0)] if strip_first else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first])


def _numbered(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: number for number, token in enumerate(vocabulary.tokens)}


def _tokenizer(model: Any, **settings: Any) -> Tokenizer:
    try:
        return Tokenizer(model(**settings))
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelImportError(
            f"the vocabulary cannot be read: {str(error).strip().splitlines()[0]}"
        ) from None


def _with_added(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Tokenizer:
    """Special and user-defined tokens are found in the text before anything else is done to it."""
    special = [
        AddedToken(vocabulary.tokens[number], normalized=False, special=True)
        for number in sorted(vocabulary.special)
    ]
    added = [AddedToken(token, normalized=False) for _, token in vocabulary.of(TokenType.USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    return tokenizer
