"""The tables of docs/experiments are what their JSON files say."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs/experiments")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """experiments/pages.py, over a copy of the pages in the working directory."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("pages")


@pytest.fixture
def training_tables(pages: ModuleType) -> ModuleType:
    """experiments/training_tables.py over the same copy."""
    return importlib.import_module("training_tables")


@pytest.fixture
def plots(pages: ModuleType) -> ModuleType:
    """experiments/plots.py over the same copy."""
    return importlib.import_module("plots")


def check(pages: ModuleType, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(pages.main, ["--check", *flags])
    return result.exit_code, result.output


def test_pages_say_what_their_json_says(pages: ModuleType) -> None:
    assert check(pages) == (0, "")


def test_an_altered_figure_is_found_and_written_anew(pages: ModuleType) -> None:
    page = FOLDER / "small.md"
    right = page.read_text(encoding="utf-8")
    page.write_text(
        right.replace("| off,0.7 | recompute | 25.57 |", "| off,0.7 | recompute | 24.57 |"), encoding="utf-8"
    )
    code, output = check(pages)
    assert code == 1
    assert "small.md and its JSON differ; write its tables anew" in output
    CliRunner().invoke(pages.main, [])
    assert page.read_text(encoding="utf-8") == right


def test_a_table_without_its_marker_is_found(pages: ModuleType) -> None:
    page = FOLDER / "small.md"
    page.write_text(page.read_text(encoding="utf-8").replace("<!-- table: gate -->", ""), encoding="utf-8")
    assert "small.md has the tables [], its JSON gives ['gate']" in check(pages)[1]


def test_a_missing_json_is_named(pages: ModuleType) -> None:
    (FOLDER / "small-gate.json").unlink()
    code, output = check(pages)
    assert code == 1
    assert "small-gate.json is missing" in output


def test_a_mean_over_too_few_seeds_is_refused(training_tables: ModuleType) -> None:
    run = {
        "method": "standard",
        "protocol": {"name": "original"},
        "seed": 42,
        "epochs": [{"ppl": 8.0}],
        "more_validation": 8.0,
    }
    (FOLDER / "original.json").write_text(json.dumps({"runs": [run]}), encoding="utf-8")
    with pytest.raises(
        importlib.import_module("tables").PageError,
        match=r"'original' has the seeds \[\], expected \[42, 43, 44, 45, 46\]",
    ):
        training_tables.original_tables()


@pytest.mark.parametrize(
    ("protocol", "seed", "message"),
    [
        (
            "final norm",
            44,
            "standard under 'final norm' has the seeds [42, 43, 45, 46], expected [42, 43, 44, 45, 46]",
        ),
        (
            "200 epochs without a stop",
            44,
            "standard under '200 epochs without a stop' has the seeds [42, 43], expected [42, 43, 44]",
        ),
    ],
)
def test_a_protocol_without_one_of_its_seeds_is_refused(
    pages: ModuleType, protocol: str, seed: int, message: str
) -> None:
    path = FOLDER / "original.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    kept = [
        run
        for run in runs
        if (run["method"], run["protocol"]["name"], run["seed"]) != ("standard", protocol, seed)
    ]
    path.write_text(json.dumps({"runs": kept}), encoding="utf-8")
    code, output = check(pages)
    assert (code, len(kept)) == (1, len(runs) - 1)
    assert message in output


def test_figures_are_those_of_their_json(plots: ModuleType) -> None:
    assert check(plots) == (0, "")


def test_a_figure_of_other_figures_is_found_and_drawn_anew(plots: ModuleType) -> None:
    source = FOLDER / "scale.json"
    figure = FOLDER / "scale.svg"
    found = json.loads(source.read_text(encoding="utf-8"))
    found["rows"][0]["verify_half_90"] += 1.0
    source.write_text(json.dumps(found), encoding="utf-8")
    before = figure.read_text(encoding="utf-8")
    code, output = check(plots)
    assert code == 1
    assert (
        "scale.svg was not drawn from scale.json as they are; draw it: python experiments/plots.py" in output
    )
    assert CliRunner().invoke(plots.main, []).exit_code == 0
    assert figure.read_text(encoding="utf-8").split("\n", 1)[1] != before.split("\n", 1)[1]


def test_a_figure_that_no_page_shows_is_found(plots: ModuleType) -> None:
    page = FOLDER / "scale.md"
    page.write_text(page.read_text(encoding="utf-8").replace("](scale.svg)", "]()"), encoding="utf-8")
    assert "scale.md does not show scale.svg" in check(plots)[1]


def rows_of(*points: tuple[float, float, float]) -> list[dict[str, float | None]]:
    """Rows of a table by speed-up, perplexity over full depth's 20, and threshold; full depth first."""
    return [{"speedup": 1.0, "ppl": 20.0, "ppl_ratio": 1.0, "mean_depth": 9.0, "threshold": None}] + [
        {"speedup": speedup, "ppl": 20.0 * ratio, "ppl_ratio": ratio, "threshold": threshold}
        for speedup, ratio, threshold in points
    ]


def test_the_area_under_a_curve_is_that_of_its_best_points(training_tables: ModuleType) -> None:
    """Half the time costs 22: 21 on average from there.

    A point that is slower and worse than another changes nothing.
    """
    rows = rows_of((2.0, 1.1, 0.0))
    assert training_tables.area(rows, 0.5) == pytest.approx(21.0)
    assert training_tables.area([*rows, *rows_of((1.0, 1.4, 0.9))], 0.5) == pytest.approx(21.0)
    assert training_tables.area(rows, 0.75) == pytest.approx(20.5)


def test_the_least_depth_within_a_tolerance(training_tables: ModuleType) -> None:
    """By one criterion or the best of them; full depth where nothing else is good enough; nothing for a model
    without early exits.
    """
    points = [
        {"criterion": "max-prob", "ppl_ratio": 1.04, "mean_depth": 5.0},
        {"criterion": "max-prob", "ppl_ratio": 1.2, "mean_depth": 3.0},
        {"criterion": "entropy", "ppl_ratio": 1.05, "mean_depth": 4.5},
    ]
    run = {"rows": rows_of((2.0, 1.04, 0.0)), "criteria": points}
    assert training_tables.least_depth(run, 0.05) == 4.5
    assert training_tables.least_depth(run, 0.05, "max-prob") == 5.0
    assert training_tables.least_depth(run, 0.01) == 9.0
    assert training_tables.least_depth({"rows": rows_of(), "criteria": []}, 0.05) is None
    assert (training_tables.best_speed(run, 0.05), training_tables.best_speed(run, 0.01)) == (2.0, 1.0)
