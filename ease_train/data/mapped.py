"""A local file's texts, memory-mapped: read once into a copy that `datasets` keeps, and from there ever
after.

    texts = mapped_texts(Path("corpus.jsonl"))
    print(len(texts), texts[0])

The copy is known by the file's content (its sha256), form and reader: a file that was replaced is read anew,
whatever its times say, and one that was moved is not. Copies stand in the `ease` folder of the cache of
`datasets` ($HF_HOME/datasets); making one removes those whose file is gone or has another content by now.
"""

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import DataError
from ease_train.data.text_files import READER, file_form, file_texts

TEXTS_AT_ONCE = 1000
WRITTEN_AT_ONCE = 100  # texts that are in memory while the copy is made
SOURCE_FILE = "source.txt"  # in a copy's folder: where its file is


class Texts(Sequence[str]):
    """Some rows of a column `text` that stays on the disk; a text is in memory while it is used.

    `numbers` are the rows, in order. Shape: (texts,) int64.
    """

    def __init__(self, rows: Any, numbers: NDArray[np.int64] | None = None) -> None:
        self.rows = rows
        self.numbers = np.arange(len(rows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Texts": ...
    def __getitem__(self, place: int | slice) -> "str | Texts":
        if isinstance(place, slice):
            return Texts(self.rows, self.numbers[place])
        return str(self.rows[int(self.numbers[place])]["text"])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), TEXTS_AT_ONCE):
            yield from self.rows[self.numbers[start : start + TEXTS_AT_ONCE].tolist()]["text"]


def mapped_texts(path: Path) -> Texts:
    """Every text of a file that is not blank.

    Raises DataError where it, or its copy's place, cannot be used.
    """
    import datasets  # slow to import, and only reading text needs it

    datasets.disable_progress_bars()
    suffixes = "".join(file_form(path))
    sha256 = sum_of_file(path)
    absolute = str(path.resolve())
    copies = Path(datasets.config.HF_DATASETS_CACHE) / "ease"
    copy = copies / f"{sha256}-{READER}{suffixes}"
    try:
        made_before = copy.is_dir()
        copy.mkdir(parents=True, exist_ok=True)
        (copy / SOURCE_FILE).write_text(absolute, encoding="utf-8")
        if not made_before:
            _remove_old(copies, absolute, copy)
        rows = datasets.Dataset.from_generator(
            _rows,
            features=datasets.Features({"text": datasets.Value("large_string")}),
            cache_dir=str(copy),
            gen_kwargs={"path": str(path), "sha256": sha256},
            fingerprint=sha256[:32],
            writer_batch_size=WRITTEN_AT_ONCE,
        )
    except (OSError, datasets.exceptions.DatasetsError) as error:
        shutil.rmtree(copy, ignore_errors=True)
        causes = list(_causes(error))
        if ours := next((cause for cause in causes if isinstance(cause, DataError)), None):
            raise ours from None
        reason = next(
            (cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), str(error)
        )
        remedy = "set HF_HOME to a folder that can be written and has room for the text"
        raise DataError(f"cannot keep a copy of {path} in {copies}: {reason}; {remedy}") from None
    return Texts(rows)


def sum_of_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _rows(path: str, sha256: str) -> Iterator[dict[str, str]]:
    texts = (text for text in file_texts(Path(path)) if text.strip())
    first = next(texts, None)
    if first is None:
        raise DataError(f"{path} has no text")
    yield from ({"text": text} for text in itertools.chain([first], texts))


def _remove_old(copies: Path, source: str, new: Path) -> None:
    """Remove the copies of what this file was before, and those of files that are gone."""
    for copy in copies.iterdir():
        noted = copy / SOURCE_FILE
        known = noted.read_text(encoding="utf-8") if noted.is_file() else ""
        if copy != new and (known == source or not Path(known).is_file()):
            shutil.rmtree(copy, ignore_errors=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
