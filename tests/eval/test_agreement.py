"""Prompt files: what is read, and which line is named where one cannot be."""

import gzip
import re
from pathlib import Path

import pytest

from ease_common.errors import RequestError
from ease_eval.measure.agreement import read_prompts


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    """The line separators of Unicode end no line of JSON."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a\u2028b"}\n\n{"turns": ["first", "second"]}\n{"question": "why?"}\n', encoding="utf-8"
    )
    assert read_prompts(file, 10) == ["a\u2028b", "first", "why?"]
    assert read_prompts(file, 2) == ["a\u2028b", "first"]


@pytest.mark.parametrize("line", ["{", '{"turns": 5}', '{"turns": []}', "[1]"])
def test_a_bad_line_is_named_by_its_place_in_the_file(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n\n\n{line}\n', encoding="utf-8")
    with pytest.raises(RequestError, match=re.escape(f"{file}, line 4: ")):
        read_prompts(file, 10)


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a"}\n' * 50)
    file = tmp_path / "prompts.jsonl.gz"
    for damaged in (whole[:-10], whole[:12] + bytes(8) + whole[20:], b"no archive"):
        file.write_bytes(damaged)
        with pytest.raises(RequestError, match="cannot read prompts from"):
            read_prompts(file, 10)
