"""The running Python's standard library as a corpus: a document a file, read where it is installed, nothing
downloaded.

    for path, text in library_files(tests=False):
        print(path, split_of(path), len(text))  # json/decoder.py train 12473

Left out are tables (encodings, pydoc_data, generated sysconfig data), lib2to3, what is blank or cannot be
decoded, and files of which half or more stands in a larger one. With `tests` there are also test/ and the
other folders of tests, which many distributions lack.
"""

import functools
import hashlib
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ease_common.errors import DataError

LEFT_OUT = {"encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}
LINES = 5  # in a row, that two files share
SHARED = 0.5  # of a file's runs of lines, which make it a copy


@functools.cache
def library_files(tests: bool, folder: Path | None = None) -> tuple[tuple[str, str], ...]:
    """Path below the library's folder, and text, of each file, in the order of paths; no two of them are
    near-duplicates.

    Raises DataError when this Python has no library, or no tests, as files.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found = dict(_readable(folder, tests))
    if not found:
        raise DataError(
            f"this Python has no standard library as .py files in {folder}; run EASE with another Python"
        )
    if tests and not any(path.startswith("test/test_") for path in found):
        raise DataError(
            f"this Python has no tests in {folder / 'test'}; use python-stdlib, or a Python that has them"
        )
    return tuple(sorted(without_copies(found).items()))


def split_of(path: str) -> str:
    """The split that a file belongs to, by its path's sum: the same in every version of Python, with and
    without tests.
    """
    number = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20
    return {0: "validation", 10: "test"}.get(number, "train")


def without_copies(texts: dict[str, str]) -> dict[str, str]:
    """The texts of which less than SHARED stands in one larger text: runs of LINES lines that are not blank,
    indentation aside.
    """
    first: dict[int, str] = {}  # the largest text with this run
    kept = {}
    for name, text in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])):
        runs = _runs(text)
        shared = Counter(first[run] for run in runs if run in first)
        if max(shared.values(), default=0) < SHARED * len(runs):
            kept[name] = text
            first |= dict.fromkeys(runs - first.keys(), name)
    return kept


def _runs(text: str) -> set[int]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {hash(tuple(lines[start : start + LINES])) for start in range(max(1, len(lines) - LINES + 1))}


def _readable(folder: Path, tests: bool) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        parts = set(path.relative_to(folder).parts)
        if parts & LEFT_OUT or path.name.startswith("_sysconfigdata") or (parts & TESTS and not tests):
            continue
        try:
            with tokenize.open(path) as file:  # as its coding line says
                text = file.read()
        except (OSError, SyntaxError, UnicodeError):
            continue  # tests have files that are wrong on purpose
        if text.strip():
            yield path.relative_to(folder).as_posix(), text
