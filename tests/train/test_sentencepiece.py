"""A vocabulary of SentencePiece's: what is imported cuts texts as SentencePiece itself does."""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import source_models
from ease_common.errors import ModelImportError
from ease_train.convert.huggingface import import_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
sentencepiece = pytest.importorskip("sentencepiece")
WORDS = ("the", "there", "then", "other", "mother", "thing", "things", "nothing", "singing", "raining")
LETTERS = "aehinorst  .,<>\n\té日\ufb01\uff26🙂"  # a ligature and a wide F among them
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def trained(model_type: str, **settings: Any) -> bytes:
    """A vocabulary of 300 pieces, or of letters."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8)) + "." for _ in range(500)]
    written = io.BytesIO()
    size = {} if model_type == "char" else {"vocab_size": 300, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type=model_type,
        minloglevel=2,
        **size,
        **settings,
    )
    return written.getvalue()


def directory(folder: Path, vocabulary: bytes, tokenizer_class: str | None) -> Path:
    """A Llama with a tokenizer.model alone, whose configuration names a class."""
    source_models.write_model(source_models.make_model("llama2"), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(vocabulary)
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMES, "add_bos_token": True, **named}))
    return folder


def some_texts(letters: str = LETTERS) -> list[str]:
    draw = random.Random(1)
    worded = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(150))
    lettered = ("".join(draw.choices(letters, k=draw.randint(0, 16))) for _ in range(300))
    return [*worded, *lettered]


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", None])
@pytest.mark.parametrize(
    "settings",
    [
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"byte_fallback": True},  # NFKC: ligatures and wide letters are written as plain ones
        {"normalization_rule_name": "identity", "user_defined_symbols": ["<sep>", "ther"]},  # unknown letters
    ],
)
def test_a_unigram_model_cuts_texts_as_sentencepiece_does(
    settings: dict[str, Any], tokenizer_class: str | None, tmp_path: Path
) -> None:
    vocabulary = trained("unigram", **settings)
    source = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    checkpoint = import_model(str(directory(tmp_path / "hf", vocabulary, tokenizer_class)))
    tokenizer = checkpoint.tokenizer
    assert checkpoint.text_format.start_id == source.bos_id()
    assert source.eos_id() in checkpoint.text_format.stop_ids
    for text in some_texts():
        ids = source.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        if source.unk_id() not in ids:
            assert tokenizer.decode(ids) == source.decode(ids), text


def test_a_tokenizer_json_of_a_unigram_model_is_read_as_one_whatever_class_is_named(tmp_path: Path) -> None:
    """transformers 5 makes BPE of it where the class is Llama's."""
    vocabulary = trained("unigram", byte_fallback=True, normalization_rule_name="identity")
    source = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    folder = directory(tmp_path / "hf", vocabulary, "LlamaTokenizer")
    import_model(str(folder)).tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    tokenizer = import_model(str(folder)).tokenizer
    for text in some_texts():
        assert tokenizer.encode(text, add_special_tokens=False).ids == source.encode(text), text


def test_a_vocabulary_of_letters_is_refused_and_what_reading_one_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = directory(tmp_path / "hf", trained("char"), "LlamaTokenizer")
    with pytest.raises(ModelImportError, match=r"tokenizer.model is a vocabulary by char, expected bpe or"):
        import_model(str(folder))
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(
        ModelImportError, match=r"tokenizer.model needs sentencepiece to be read: pip install 'ease-lm\[hf\]'"
    ):
        import_model(str(folder))
