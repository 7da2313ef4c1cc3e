"""Local files as documents, their splits, and what is said of a bad one."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ease_common.errors import DataError
from ease_train.data import mapped
from ease_train.data.corpora import SPLITS, load_documents, sum_of
from ease_train.data.text_files import DOCUMENT_CHARACTERS, file_texts

DOCUMENTS = [f"document number {i}" for i in range(45)]


@pytest.fixture(autouse=True)
def copies(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the copies of files stand: each test's own folder."""
    from datasets import config  # not before the session says that there is no hub

    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", cache)
    return cache / "ease"


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def all_splits(path: Path) -> dict[str, list[str]]:
    return {split: list(load_documents(str(path), split)) for split in SPLITS}


def said_of(path: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        load_documents(str(path), split)
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)]
)
def test_compressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path = tmp_path / f"b.JSONL{suffix}"
    path.write_bytes(compress(plain.read_bytes()))
    assert all_splits(path) == EXPECTED
    path.write_bytes(compress(plain.read_bytes())[:-9])
    assert "cannot read" in said_of(path)
    path.write_bytes(plain.read_bytes())
    assert "cannot read" in said_of(path)  # though these very bytes are kept already, as a plain file's


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("rows", [DOCUMENTS, [{"text": text, "id": i} for i, text in enumerate(DOCUMENTS)]])
def test_json_is_a_list_of_rows(tmp_path: Path, rows: list[Any], indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    assert all_splits(path) == EXPECTED


def test_json_may_be_lines_after_all(tmp_path: Path) -> None:
    assert all_splits(write_jsonl(tmp_path / "a.json", DOCUMENTS)) == EXPECTED


@pytest.mark.parametrize(
    "later", [{"title": "x"}, {"date": "unknown"}, {"meta": {"a": 1, "b": [2]}}, {"more": 1}, {"meta": "x"}]
)
def test_other_columns_may_be_anything(tmp_path: Path, later: dict[str, Any]) -> None:
    first = {"title": None, "date": "2024-01-01 00:00:00", "meta": {"a": 1}}
    rows = [{**(later if i > 30 else first), "text": text} for i, text in enumerate(DOCUMENTS)]
    assert all_splits(write_rows(tmp_path / "a.jsonl", rows)) == EXPECTED


def test_texts_that_look_like_dates_are_texts(tmp_path: Path) -> None:
    dates = [f"2024-01-{i % 28 + 1:02d} 10:00:00" for i in range(60)]
    assert load_documents(str(write_jsonl(tmp_path / "a.jsonl", dates)), "validation")[0] == dates[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_of_an_encoding_are_obeyed_and_no_text(tmp_path: Path, encoding: str) -> None:
    texts = [f"caf\u00e9 \U0001f600 {i}" for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts).encode(encoding)
    )
    assert list(file_texts(path)) == texts
    plain = tmp_path / "a.txt"
    plain.write_bytes("\r\n\r\n".join(texts).encode(encoding))
    assert list(file_texts(plain)) == ["\n\n".join(texts) + "\n"]


def test_paragraphs_stay_as_far_apart_as_they_were(tmp_path: Path) -> None:
    text = "one\n\n\n\ntwo\n \nthree\x0c\n\n\n\nfour\u2028five\n"
    (tmp_path / "a.txt").write_text("\n\n" + text + "\n\n", encoding="utf-8")
    assert list(file_texts(tmp_path / "a.txt")) == [text]


def test_what_is_between_two_documents_belongs_to_neither(tmp_path: Path) -> None:
    long = "x" * DOCUMENT_CHARACTERS
    (tmp_path / "a.txt").write_text(f"{long}\n\n\n\n{long}\n\nrest", encoding="utf-8")
    assert list(file_texts(tmp_path / "a.txt")) == [f"{long}\n", f"{long}\n", "rest\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_replaced_file_is_read_anew_whatever_its_time(tmp_path: Path, name: str, copies: Path) -> None:
    path = tmp_path / name

    def write(word: str) -> None:
        rows = [f"{word} number {i} " * 400 for i in range(30)]
        text = (
            "".join(json.dumps({"text": row}) + "\n" for row in rows) if "json" in name else "\n\n".join(rows)
        )
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith("gz") else text.encode())
        os.utime(path, ns=(10**18, 10**18))

    for word in ("old", "new", "old"):
        write(word)
        assert {text.split()[0] for split in all_splits(path).values() for text in split} == {word}
        assert len(list(copies.iterdir())) == 1  # what it was before is not kept


def test_a_moved_file_is_not_read_again_and_one_that_is_gone_is_not_kept(
    tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    moved = tmp_path / "b.jsonl"
    assert all_splits(path) == EXPECTED
    path.rename(moved)
    with monkeypatch.context() as patched:
        patched.setattr(mapped, "file_texts", lambda _: pytest.fail("read again"))
        assert all_splits(moved) == EXPECTED
    moved.unlink()
    other = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS[:30])
    assert load_documents(str(other), "test")[0] == DOCUMENTS[10]
    assert [copy.name.split("-")[0] for copy in copies.iterdir()] == [
        hashlib.sha256(other.read_bytes()).hexdigest()
    ]


def test_documents_stay_on_the_disk(tmp_path: Path) -> None:
    documents = load_documents(str(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)), "train")
    assert list(documents[3:9:2]) == EXPECTED["train"][3:9:2]
    assert (documents[-1], len(documents)) == (DOCUMENTS[-1], 40)
    assert all(Path(file["filename"]).stat().st_size for file in documents.rows.cache_files)  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        documents[40]


def test_the_sum_is_that_of_the_texts(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "b.parquet")
    sums = {sum_of(load_documents(str(path), "test")) for path in (plain, tmp_path / "b.parquet")}
    assert sums == {sum_of(EXPECTED["test"])}
    assert sum_of(["ab", "c"]) != sum_of(["a", "bc"])


def test_a_short_file_evaluates_whole_and_trains_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:19])
    for split in ("validation", "test"):
        assert list(load_documents(str(path), split)) == DOCUMENTS[:19]
    assert (
        f"{path} has only 19 documents: too few to split by document and train on one part; expected at "
        "least 20" in said_of(path)
    )


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, copies: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    copies.parent.rmdir()
    copies.parent.write_text("a file, where the folder should be")
    message = said_of(path)
    assert message.startswith(f"cannot keep a copy of {path} in {copies}: ")
    assert message.endswith("set HF_HOME to a folder that can be written and has room for the text")


def test_a_full_disk_leaves_no_copy(tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import arrow_writer

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with monkeypatch.context() as patched:
        patched.setattr(arrow_writer.ArrowWriter, "write_examples_on_file", full)
        assert "No space left on device; set HF_HOME" in said_of(path)
    assert list(copies.iterdir()) == []
    assert all_splits(path) == EXPECTED


def test_a_copy_that_was_cut_off_is_made_again(tmp_path: Path, copies: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert all_splits(path) == EXPECTED
    copy = next(copies.iterdir())
    shutil.rmtree(copy / "generator")  # what a killed first reading leaves: the folder, and its source
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
    assert chapters["validation"][0].startswith(
        "Genesis 1\nIn the beginning God created the heaven and the earth."
    )


GOOD = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:30])


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "empty.txt", "txt has no text"),
        ("\n\n \n\n", "blank.txt", "txt has no text"),
        ("a few words\n", "short.txt", "has only 1 documents: too few to split by document"),
        (
            '{"content": "x", "id": 3}\n',
            "column.jsonl",
            ", row 1: expected a column 'text', found content, id",
        ),
        ('{"text": "x"\n', "broken.jsonl", ", row 1: no JSON: Expecting ',' delimiter (column 13)"),
        (
            GOOD + '\n{"text": "cut of\n' + GOOD,
            "cut.jsonl",
            ", row 32: no JSON: Unterminated string starting at (column 10)",
        ),
        (
            GOOD + '{"text": null}\n',
            "null.jsonl",
            ", row 31: text is null, expected a string; mend or drop the row",
        ),
        (GOOD + '{"id": 7}\n', "missing.jsonl", ", row 31: expected a column 'text', found id"),
        (GOOD + '{"text": 12}\n', "number.jsonl", ", row 31: text is 12, expected a string"),
        (GOOD + "[1]\n", "list.jsonl", ", row 31: [1], expected an object with 'text'"),
        (
            GOOD + '{"text": "half \\ud83d"}\n',
            "half.jsonl",
            ", row 31: text holds half of a surrogate pair, \\ud83d",
        ),
        (
            GOOD + '{"text": "a", "text": "b"}\n',
            "twice.jsonl",
            ", row 31: cannot be read as JSON: 'text' stands in it more than once",
        ),
        (GOOD + "[" * 99999 + "\n", "deep.jsonl", ", row 31: cannot be read as JSON: "),
        (
            GOOD.encode() + '{"text": "d\u00e9j\u00e0"}\n'.encode("latin-1"),
            "l.jsonl",
            ", row 31: byte 0xE9 at character 12 is no UTF-8",
        ),
        (
            "one\n\ncaf\u00e9\n".encode("latin-1"),
            "latin.txt",
            ", row 3: byte 0xE9 at character 4 is no UTF-8; convert it",
        ),
        (
            "one two".encode("utf-16-le"),
            "le.txt",
            "UTF-16 without its mark, expected UTF-8; convert it: iconv -f UTF-16LE",
        ),
        (
            "one two".encode("utf-16-be"),
            "be.txt",
            "UTF-16 without its mark, expected UTF-8; convert it: iconv -f UTF-16BE",
        ),
        (b"\xff\xfeo\0n", "odd.txt", "truncated data"),
        ('[{"text": "x"}, {"text": null}]', "null.json", ", row 2: text is null"),
        (
            '{\n"data": []}',
            "object.json",
            "expected a list of objects with 'text', or one such object a line",
        ),
        (
            '[{"text": "x"},\n{"text": "y]',
            "cut.json",
            ": no JSON: Unterminated string starting at (line 2, column 10)",
        ),
        ("not a table", "broken.parquet", "cannot read"),
        (
            "x",
            "what.csv",
            "expected a file that ends in .txt, .tokens, .jsonl or .json (also .gz, .bz2, .xz), or .parquet",
        ),
        ("x", "notes.txt.csv", "expected a file that ends in .txt"),
        ("x", ".a.json.bak", "expected a file that ends in .txt"),
        ("x", "a.parquet.gz", "expected a file that ends in .txt"),
    ],
)
def test_bad_file(tmp_path: Path, content: str | bytes, name: str, message: str, copies: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    said = said_of(path)
    assert message in said
    assert name in said
    assert not list(copies.glob("*")) or "too few to split" in said


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([*DOCUMENTS, None], ", row 46: text is null, expected a string"),
        ([[text] for text in DOCUMENTS], "its column 'text' is of the type list<"),
        ([text.encode() for text in DOCUMENTS], "its column 'text' is of the type binary, expected strings"),
    ],
)
def test_bad_parquet(tmp_path: Path, column: list[Any], message: str) -> None:
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert message in said_of(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"doc": column}), tmp_path / "b.parquet")
    assert said_of(tmp_path / "b.parquet").endswith("b.parquet: expected a column 'text', found doc")


def test_strings_of_every_arrow_type(tmp_path: Path) -> None:
    strings = pyarrow.array(DOCUMENTS)
    for number, column in enumerate((strings.cast(pyarrow.large_string()), strings.dictionary_encode())):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": column}), path)
        assert all_splits(path) == EXPECTED


def test_no_such_file_and_no_such_split(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no data file at .*missing\.txt; say with --data where it is \(\.txt, .*\), or give one of: "
        r"kjv, wikitext-2",
    ):
        load_documents(str(tmp_path / "missing.txt"), "train")
    with pytest.raises(DataError, match="unknown split 'trian'; did you mean 'train'"):
        load_documents("kjv", "trian")


def test_a_hub_set_without_a_network_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^cannot read nobody/nothing: [^\n]+$"):
        load_documents("nobody/nothing", "train")
