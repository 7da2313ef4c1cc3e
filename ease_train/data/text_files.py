"""The texts of a local file, row by row: .txt, .jsonl, .json and .parquet, of which only the column `text` is
read.

    for text in file_texts(Path("corpus.jsonl.gz")):
        print(len(text))

A .txt file is cut into documents of about DOCUMENT_CHARACTERS characters, at empty lines; what stands inside
a document stays as it is. .txt, .tokens, .jsonl and .json may be compressed (.gz, .bz2, .xz). Text is UTF-8,
or UTF-16 and UTF-32 that begin with their mark. Whatever cannot be read is a DataError that names the row,
which in text is the line.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ease_common.errors import DataError

READER = 1  # raised whenever the same file would give other documents, so that kept copies are made again
DOCUMENT_CHARACTERS = 4000
EXPECTED = ".txt, .tokens, .jsonl or .json (also .gz, .bz2, .xz), or .parquet"
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does, and so comes first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNREADABLE = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)
NAMED_COLUMNS = 8


def file_form(path: Path) -> tuple[str, str]:
    """The suffixes that say how a file is read: of its form and of its compression ("" for none), in small
    letters.

    Raises DataError for others.
    """
    last = path.suffix.lower()
    form, compression = (Path(path.stem).suffix.lower(), last) if last in OPENERS else (last, "")
    if form not in READERS or (form == ".parquet" and compression):
        raise DataError(f"{path}: expected a file that ends in {EXPECTED}")
    return form, compression


def file_texts(path: Path) -> Iterator[str]:
    """Every text of a file. Raises DataError where it cannot be read, naming the row."""
    form, _ = file_form(path)
    yield from READERS[form](path)


def file_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line, whose end is "\\n". Raises DataError for what is no text."""
    number = 0
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as raw:
            encoding = _encoding(path, raw.peek(4)[:4])
            # A byte that is no UTF-8 comes through as half a surrogate pair, so that its line is known.
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            with io.TextIOWrapper(raw, encoding, errors) as lines:
                for number, line in enumerate(lines, 1):
                    _check_bytes(line, f"{path}, row {number}")
                    yield number, line
    except UNREADABLE as error:
        place = f", after row {number}" if number else ""
        raise DataError(f"cannot read {path}{place}: {_reason(error)}") from None


def _encoding(path: Path, head: bytes) -> str:
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" in (head[:1], head[1:2]):
        order = "BE" if head[:1] == b"\0" else "LE"
        raise DataError(
            f"{path}: UTF-16 without its mark, expected UTF-8; convert it: iconv -f UTF-16{order} -t UTF-8 "
            "FILE > NEW"
        )
    return "utf-8-sig"


def _check_bytes(line: str, where: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        remedy = "convert it, if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8 FILE > NEW"
        raise DataError(
            f"{where}: byte 0x{byte:02X} at character {error.start + 1} is no UTF-8; {remedy}"
        ) from None


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _documents(path: Path) -> Iterator[str]:
    """A plain text's documents.

    Empty lines between two documents belong to neither; a document ends with one line end.
    """
    document: list[str] = []
    size = 0  # of its paragraphs
    for _, line in file_lines(path):
        if line != "\n":
            document.append(line)
            size += len(line)
        elif document and document[-1] != "\n":
            size -= 1
            if size >= DOCUMENT_CHARACTERS:
                yield "".join(document)
                document = []
                size = 0
            else:
                document.append(line)
        elif document:
            document.append(line)
    if document:
        yield "".join(document).rstrip("\n") + "\n"


def json_rows(path: Path) -> Iterator[Any]:
    """What stands on each line that is not blank. Raises DataError where that is no JSON."""
    yield from (row for _, row in _numbered_rows(path))


def _numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in file_lines(path):
        if line.strip():
            yield number, _parsed(line.strip(), f"{path}, row {number}")


def _json_lines(path: Path) -> Iterator[str]:
    yield from (_text_of(row, f"{path}, row {number}") for number, row in _numbered_rows(path))


def _json(path: Path) -> Iterator[str]:
    """A list of rows, which is in memory whole, or one object a line after all."""
    first = next((line.strip() for _, line in file_lines(path) if line.strip()), "")
    if first.startswith("{") and first.endswith("}"):
        yield from _json_lines(path)
        return
    rows = _parsed("".join(line for _, line in file_lines(path)), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects with 'text', or one such object a line")
    for number, row in enumerate(rows, 1):
        yield _text_of(row, f"{path}, row {number}")


def _parsed(source: str, where: str) -> Any:
    try:
        return json.loads(source, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: no JSON: {error.msg} ({place}); mend or drop it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read as JSON: {_reason(error)}; mend or drop it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs) and sum(key == "text" for key, _ in pairs) > 1:
        raise ValueError("'text' stands in it more than once")
    return found


def _text_of(row: Any, where: str) -> str:
    """A row's text: it is an object that has one, or itself a string."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise DataError(f"{where}: {_short(row)}, expected an object with 'text'")
    if "text" not in row:
        raise DataError(f"{where}: expected a column 'text', found {_listed(row)}")
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{where}: text is {_short(text)}, expected a string; mend or drop the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: text holds half of a surrogate pair, {half}; mend or drop the row"
        ) from None
    return text


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def _listed(columns: Any) -> str:
    names = sorted(columns)
    more = f" and {len(names) - NAMED_COLUMNS} more" if len(names) > NAMED_COLUMNS else ""
    return (", ".join(names[:NAMED_COLUMNS]) or "none") + more


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow  # comes with datasets
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "text" not in schema.names:
                raise DataError(f"{path}: expected a column 'text', found {_listed(schema.names)}")
            kind = schema.field("text").type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if str(values) not in ("string", "large_string", "string_view", "null"):
                raise DataError(f"{path}: its column 'text' is of the type {kind}, expected strings")
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _text_of({"text": text}, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        place = f", after row {number}" if number else ""
        raise DataError(f"cannot read {path}{place}: {_reason(error)}") from None


READERS = {
    ".txt": _documents,
    ".tokens": _documents,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
