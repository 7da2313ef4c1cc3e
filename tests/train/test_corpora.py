"""Local files as documents, their splits, and what is said of a bad one."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ease_train.corpora import DOCUMENT_CHARACTERS, SPLITS, load_documents
from ease_train.errors import DataError

DOCUMENTS = [f"document number {i}" for i in range(45)]


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def all_splits(path: Path) -> dict[str, list[str]]:
    return {split: load_documents(str(path), split) for split in SPLITS}


EXPECTED = {
    "validation": [DOCUMENTS[i] for i in (0, 20, 40)],
    "test": [DOCUMENTS[i] for i in (10, 30)],
    "train": [text for i, text in enumerate(DOCUMENTS) if i % 20 not in (0, 10)],
}


def test_jsonl_is_split_by_document(tmp_path: Path) -> None:
    assert all_splits(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": DOCUMENTS, "other": list(range(45))}), path)
    assert all_splits(path) == EXPECTED


def test_gzip(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path = tmp_path / "b.jsonl.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert all_splits(path) == EXPECTED


def test_text_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 150 for i in range(160)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    splits = all_splits(path)
    documents = [text for split in splits.values() for text in split]
    assert all(len(text) < 2 * DOCUMENT_CHARACTERS for text in documents)
    found = sorted(paragraph.strip() for text in documents for paragraph in text.split("\n\n"))
    assert found == sorted(paragraph.strip() for paragraph in paragraphs)


def test_the_default_corpus() -> None:
    chapters = {split: load_documents("kjv", split) for split in SPLITS}
    assert sum(map(len, chapters.values())) == 1189
    assert chapters["validation"][0].startswith("Genesis 1\nIn the beginning God created the heaven and the earth.")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "empty.txt", "empty.txt is empty"),
        ("\n\n \n\n", "blank.txt", "has no text in its split 'train'"),
        ("a few words\n", "short.txt", "only 1 documents: too few to split by document; expected at least 20"),
        ('{"content": "x"}\n', "column.jsonl", "expected a column 'text', found content"),
        ('{"text": "x"\n', "broken.jsonl", "cannot read"),
        ("not a table", "broken.parquet", "cannot read"),
        ("x", "what.csv", "expected a .txt, .jsonl or .parquet file (also .gz)"),
    ],
)
def test_bad_file(tmp_path: Path, content: str, name: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_documents(str(path), "train")
    assert message in str(error.value)
    assert name in str(error.value) or "documents" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_file_and_no_such_split(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no data file at .*missing\.txt; expected \.txt, \.jsonl or \.parquet, or one of: kjv, wikitext-2"
    ):
        load_documents(str(tmp_path / "missing.txt"), "train")
    with pytest.raises(DataError, match="unknown split 'trian'; did you mean 'train'"):
        load_documents("kjv", "trian")


def test_a_hub_set_without_a_network_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^cannot read nobody/nothing: [^\n]+$"):
        load_documents("nobody/nothing", "train")
