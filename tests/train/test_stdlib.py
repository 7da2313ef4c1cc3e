"""The standard library as a corpus: which files, in which split, and that no two splits hold the
same code.
"""

import sysconfig
from pathlib import Path

import pytest

from ease_common.errors import DataError
from ease_train.data.corpora import SPLITS, load_documents
from ease_train.data.stdlib import library_files, split_of, without_copies


def code(name: str, lines: int = 40) -> str:
    return "".join(f"{name} = {name} + {number}\n" for number in range(lines))


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "a.py": code("a"),
        "package/b.py": code("b"),
        "latin.py": b"# coding: latin-1\n" + code("caf\u00e9").encode("latin-1"),
        "blank.py": "\n\n",
        "broken.py": b"\xff\xfe = 1\n",
        "a.txt": code("t"),
        "encodings/cp1252.py": code("c"),
        "pydoc_data/topics.py": code("p"),
        "lib2to3/pygram.py": code("l"),
        "_sysconfigdata__linux.py": code("s"),
        "site-packages/mine.py": code("m"),
        "test/test_a.py": code("ta"),
        "package/tests/test_b.py": code("tb"),
        "idlelib/idle_test/test_c.py": code("tc"),
    }
    return write(tmp_path, files)


def test_which_files_there_are(library: Path) -> None:
    files = dict(library_files(False, library))
    assert list(files) == ["a.py", "latin.py", "package/b.py"]
    assert "caf\u00e9 = " in files["latin.py"]
    with_tests = [path for path, _ in library_files(True, library)]
    assert with_tests == sorted(
        [*files, "test/test_a.py", "package/tests/test_b.py", "idlelib/idle_test/test_c.py"]
    )


def test_a_library_without_tests_or_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no standard library as \.py files in .*; run EASE with another Python"
    ):
        library_files(False, tmp_path)
    write(tmp_path, {"a.py": code("a"), "test/support/__init__.py": code("s")})
    with pytest.raises(DataError, match=r"this Python has no tests in .*test; use python-stdlib"):
        library_files(True, tmp_path)


def test_copies_go_and_the_largest_stays() -> None:
    one = code("a")
    other = code("b")
    texts = {
        "copy.py": one,
        "original.py": one + code("c", 12),
        "indented.py": "if x:\n" + "".join(f"    {line}\n\n" for line in one.splitlines()),
        "other.py": other,
        "mixed.py": other[: len(other) // 3] + code("d"),
    }
    assert sorted(without_copies(texts)) == ["indented.py", "mixed.py", "other.py"]


def test_the_split_is_the_path_s_alone() -> None:
    paths = [f"package/module_{number}.py" for number in range(4000)]
    splits = [split_of(path) for path in paths]
    assert [split_of(path) for path in reversed(paths)] == splits[::-1]
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.015)
    known = {"json/decoder.py": "train", "heapq.py": "train", "ast.py": "test"}
    assert {path: split_of(path) for path in known} == known


def test_this_python_s_library() -> None:
    splits = {split: load_documents("python-stdlib", split) for split in SPLITS}
    files = library_files(False)
    assert sum(map(len, splits.values())) == len(files) > 300
    assert min(map(len, splits.values())) >= 10
    heapq = (Path(sysconfig.get_path("stdlib")) / "heapq.py").read_text(encoding="utf-8")
    assert heapq in splits[split_of("heapq.py")]
