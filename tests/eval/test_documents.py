"""Bytes of scored text, and characters that a tokenizer does not know: counted in the text, not in what its
tokens decode to.
"""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ease_eval.cli.main import main
from ease_eval.measure.documents import Document, coverage
from ease_runtime.engine.mock import MockStack
from ease_runtime.llm import TextEngine
from ease_runtime.text.unknown import unknown_id
from ease_train.data.corpora import load_documents

TEXT = "the 日本 sea 👍 "


def by_character(alphabet: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<s>", "<?>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def by_byte() -> Tokenizer:
    """Byte-level, with a post-processor that trims the spaces from the tokens' places, as Llama 3's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_bytes_are_the_texts() -> None:
    tokenizer = by_character("abcdefghijklmnopqrstuvwxyz ")
    found = coverage(tokenizer, [Document(TEXT, [0, *ids_of(tokenizer, TEXT)])])
    assert (found.num_bytes, found.num_tokens) == (len(TEXT.encode()), len(TEXT))
    assert (found.num_unknown, found.num_lost) == (3, 0)
    assert found.unknown_share == 3 / len(TEXT)


@pytest.mark.parametrize("num_ids", [1, 2, 5, 6, 7, 11, 18, 21])
@pytest.mark.parametrize("start", [[], [256]])
def test_a_byte_is_a_byte_wherever_the_tokens_are_cut(num_ids: int, start: list[int]) -> None:
    """Also within a character, with and without a start token: byte tokens stand for a byte each."""
    tokenizer = by_byte()
    ids = [*start, *ids_of(tokenizer, TEXT)][:num_ids]
    assert coverage(tokenizer, [Document(TEXT, ids)]).num_bytes == pytest.approx(len(ids) - 1)


def test_a_text_whose_case_is_lost_has_all_its_bytes() -> None:
    tokenizer = by_character("abcdefghijklmnopqrstuvwxyz ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    text = "Été À"
    found = coverage(tokenizer, [Document(text, [0, *ids_of(tokenizer, text)])])
    assert (found.num_bytes, found.num_unknown, found.num_lost) == (len(text.encode()), 0, 0)


def test_characters_that_a_tokenizer_drops_are_told() -> None:
    tokenizer = Tokenizer(
        models.BPE({"a": 0, "b": 1}, [])
    )  # no unknown token: what it does not know is left out
    text = "axb ya"
    found = coverage(tokenizer, [Document(text, [7, *ids_of(tokenizer, text)])])
    assert (found.num_tokens, found.num_bytes, found.num_unknown, found.num_lost) == (3, 6, 0, 2)
    assert found.unknown_share == 2 / 5


def test_the_unknown_token_of_each_kind_of_model() -> None:
    assert unknown_id(by_character("ab")) == 1
    assert unknown_id(by_byte()) is None
    assert unknown_id(Tokenizer(models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1))) == 1
    assert unknown_id(Tokenizer(models.Unigram([("a", -1.0)]))) is None
    assert unknown_id(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))) == 0


def test_bits_per_byte_of_a_command(tiny_bundle: Path, tmp_path: Path) -> None:
    """From the perplexity and the text's own bytes."""
    data = tmp_path / "data.jsonl"
    out = tmp_path / "ppl.json"
    rows = [{"text": f"And the king {i} 日本 went"} for i in range(30)]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    result = CliRunner().invoke(main, ["ppl", str(tiny_bundle), "--data", str(data), "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    off = json.loads(out.read_text())["rows"][0]
    bits = sum(off["depth_counts"].values()) * math.log2(off["ppl"])
    assert bits / off["bits_per_byte"] == pytest.approx(
        sum(len(text.encode()) for text in load_documents(str(data), "test"))
    )
    assert off["unknown_share"] == 0.0


def test_a_prompt_of_unknown_characters_is_told() -> None:
    llm = TextEngine(MockStack(), by_character("abcdefgh"))
    generation = llm.submit("aéb")
    assert generation.choices[0].sequence.notes == [
        "1 of the prompt's 3 tokens stand for characters that this tokenizer does not know"
    ]
    assert llm.submit("ab").choices[0].sequence.notes == []
