"""Text to tokens to blocks: tokenizers trained on the corpus, and the packed blocks that training reads."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ease_common.errors import DataError
from ease_common.files import settle
from ease_train.training.config import TokenizerConfig

END = "<|end|>"  # stands before every document, so that a document's first token is predicted too
UNKNOWN = "<|unknown|>"
DOCUMENTS_AT_ONCE = 1000  # that are encoded
LONG_RUN = re.compile(r"\S{1000}(?=\S)")


def train_tokenizer(documents: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer for these documents: byte-level BPE, or one token a character."""
    if config.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.bpe_vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(in_parts(documents), trainer)
        return tokenizer
    characters: set[str] = set()
    for text in documents:
        characters.update(text)
    vocabulary = {token: i for i, token in enumerate([END, UNKNOWN, *sorted(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END, UNKNOWN])
    return tokenizer


def in_parts(documents: Iterable[str]) -> Iterator[str]:
    """Documents, cut where so many characters stand without a space that BPE's training would take the square
    of their number in time: scripts without spaces, base64, DNA.
    """
    for text in documents:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def num_ids(tokenizer: Tokenizer) -> int:
    """How many rows an embedding needs for every id that a tokenizer gives."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokens_without_row(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """What to say of a tokenizer that gives ids past the end of an embedding of `vocab_size` rows; None for
    one that does not.
    """
    if num_ids(tokenizer) <= vocab_size:
        return None
    beyond = sorted(
        (token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size
    )
    named = ", ".join(repr(token) for _, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    lacks = f"the tokenizer has {len(beyond)} tokens that the model, of {vocab_size} rows, knows nothing of"
    return f"{lacks} (ids from {beyond[0][0]}: {named}); a text with one of them is refused"


def check_rows(stream: NDArray[np.int32], tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """Raise DataError when a text has tokens past the end of an embedding of `vocab_size` rows."""
    if num_ids(tokenizer) > vocab_size and len(beyond := stream[stream >= vocab_size]):
        token = f"{tokenizer.id_to_token(int(beyond[0]))!r} (id {beyond[0]})"
        remedy = "take it out of the text, or give the model rows for it"
        raise DataError(
            f"{what} has {len(beyond)} tokens past the model's vocabulary of {vocab_size}, the first is "
            f"{token}; {remedy}"
        )


def encode_stream(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    separator: int | None = None,
    *,
    parse_special: bool = False,
) -> NDArray[np.int32]:
    """All documents as one stream of ids, `separator` (END by default) before each. Shape: (tokens,).

    Special tokens that a document mentions are text, unless `parse_special`.
    """
    return np.concatenate(list(encoded_parts(tokenizer, documents, separator, parse_special=parse_special)))


def encoded_parts(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    separator: int | None = None,
    *,
    parse_special: bool = False,
) -> Iterator[NDArray[np.int32]]:
    """The stream of `encode_stream`, some documents at a time. Shape of each: (tokens,)."""
    end = tokenizer.token_to_id(END) if separator is None else separator
    rest = iter(documents)
    while texts := list(itertools.islice(rest, DOCUMENTS_AT_ONCE)):
        tokenizer.encode_special_tokens = not parse_special
        try:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            tokenizer.encode_special_tokens = False
        yield np.concatenate([np.array([end, *encoding.ids], dtype=np.int32) for encoding in encodings])


def cached_stream(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    folder: Path | None,
    separator: int | None = None,
    *,
    parse_special: bool = False,
) -> NDArray[np.int32]:
    """`encode_stream`, kept in `folder` under the sum of what goes in, and read from there the next time.

    A file there (plain int32) is written part by part, and mapped, not read. Without a folder nothing is
    kept. Raises DataError when the folder cannot be written.
    """
    if folder is None:
        return encode_stream(tokenizer, documents, separator, parse_special=parse_special)
    digest = hashlib.sha256(f"{separator}:{parse_special}:{tokenizer.to_str()}".encode())
    for text in documents:
        digest.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
    path = folder / f"{digest.hexdigest()[:32]}.int32"
    if not path.is_file():
        _write_stream(path, encoded_parts(tokenizer, documents, separator, parse_special=parse_special))
    stream: NDArray[np.int32] = np.memmap(path, dtype=np.int32, mode="r")
    return stream


def _write_stream(path: Path, parts: Iterable[NDArray[np.int32]]) -> None:
    """Write a stream whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for part in parts:
                file.write(part.data)
        settle(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror or error
        raise DataError(
            f"could not keep tokens in {path.parent}: {reason}; use another --cache, or none"
        ) from None


def pack(stream: NDArray[np.int32], length: int, at_least: int, what: str) -> NDArray[np.int32]:
    """Cut a stream into blocks of length + 1 that overlap by one token: inputs are block[:-1], targets
    block[1:].

    The blocks are read-only views of the stream, which may be larger than memory. Shape: (tokens,) ->
    (blocks, length + 1). Raises DataError when there are fewer than `at_least` blocks, which is at least 1.
    """
    num_blocks = (len(stream) - 1) // length
    if num_blocks < at_least:
        found = f"{len(stream)} tokens: {num_blocks} blocks of {length}, expected at least {at_least}"
        raise DataError(f"{what} has {found}; use a shorter sequence_length or more text")
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length][:num_blocks]
