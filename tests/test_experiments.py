"""The tables of docs/experiments are what their JSON files say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """experiments/pages.py over a copy of the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    spec = importlib.util.spec_from_file_location("pages", ROOT / "experiments" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in (ROOT / "docs" / "experiments").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    module.FOLDER = tmp_path
    return module


def check(pages: ModuleType, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(pages.main, ["--check", *flags])
    return result.exit_code, result.output


def test_pages_say_what_their_json_says(pages: ModuleType) -> None:
    assert check(pages) == (0, "")


def test_an_altered_figure_is_found_and_written_anew(pages: ModuleType) -> None:
    page = pages.FOLDER / "small.md"
    right = page.read_text(encoding="utf-8")
    page.write_text(right.replace("| off,0.7 | recompute | 25.57 |", "| off,0.7 | recompute | 24.57 |"), encoding="utf-8")
    code, output = check(pages)
    assert code == 1
    assert "small.md and its JSON differ; write its tables anew" in output
    CliRunner().invoke(pages.main, [])
    assert page.read_text(encoding="utf-8") == right


def test_a_table_without_its_marker_is_found(pages: ModuleType) -> None:
    page = pages.FOLDER / "small.md"
    page.write_text(page.read_text(encoding="utf-8").replace("<!-- table: gate -->", ""), encoding="utf-8")
    assert "small.md has the tables [], its JSON gives ['gate']" in check(pages)[1]


def test_a_missing_json_is_named(pages: ModuleType) -> None:
    (pages.FOLDER / "small-gate.json").unlink()
    code, output = check(pages)
    assert code == 1
    assert "small-gate.json is missing" in output


def test_a_mean_over_too_few_seeds_is_refused(pages: ModuleType) -> None:
    sys.modules.pop("original", None)
    run = {"method": "standard", "protocol": {"name": "original"}, "seed": 42, "epochs": [{"ppl": 8.0}], "more_validation": 8.0}
    (pages.FOLDER / "original.json").write_text(json.dumps({"runs": [run]}), encoding="utf-8")
    with pytest.raises(pages.PageError, match=r"'original' has the seeds \[\], expected \[42, 43, 44, 45, 46\]"):
        pages.original_tables()
