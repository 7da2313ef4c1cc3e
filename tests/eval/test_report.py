"""The report: one file, nothing from elsewhere, and the statistics in it by hand."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ease_common.files import write_whole
from ease_eval.cli.main import main
from ease_eval.measure.reliability import bins, expected_error, fit_temperature, scale

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL = [
    "--scored-tokens",
    "300",
    "--texts",
    "2",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "16",
    "--rounds",
    "2",
]


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out.html"
    command = [
        "report",
        str(tiny_bundle),
        "--data",
        str(corpus_file),
        "--split",
        "train",
        "--thresholds",
        "0,0.4",
        "--out",
        str(out),
    ]
    modes = ["--catch-up", "recompute", "--catch-up", "verify", "--batch", "2"]
    result = CliRunner().invoke(main, [*command, *modes, *SMALL])
    assert result.exit_code == 0, result.output
    return out


def test_one_file_that_loads_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    assert "@import" not in text
    assert "url(http" not in text
    assert text.count("<svg") == 2 * 4
    assert text.count('<div class="passage"') == 5
    assert [table.count("<tr>") - 1 for table in text.split("<table")[1:]] == [5, 5, 5], (
        "rows, times, batches"
    )
    assert "layer 2, confidence 0." in text


def test_what_json_has_is_shown(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for shown in (
        "GB/s",
        "<th>heads</th>",
        "drafts accepted",
        "tokens/s of all",
        "drafted by exit",
        "drafts accepted (exit",
    ):
        assert shown in text, shown
    assert "Nothing: the bundle has no certificate" in text


def test_a_certificate_is_shown(tiny_bundle: Path, corpus_file: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    promise = {"policy": "max-prob", "catch_up": "recompute", "thresholds": "off,0.5", "risk": "disagreement"}
    counts = {"num_fit_documents": 4, "num_test_documents": 8, "data": "psalms", "split": "validation"}
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["calibration"] = {**promise, **counts, "delta": 0.1, "epsilon": 0.05}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    out = tmp_path / "out.html"
    command = [
        "report",
        str(bundle),
        "--data",
        str(corpus_file),
        "--split",
        "train",
        "--out",
        str(out),
        *SMALL,
    ]
    result = CliRunner().invoke(main, [*command, "--thresholds", "0.4"])
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    assert "disagreement of at most 0.1, but for a chance of 0.05" in text
    assert "max-prob off,0.5, recompute" in text
    assert "psalms (validation): 4 to fit, 8 to test" in text


def test_figures_for_papers(report: Path) -> None:
    folder = report.with_suffix("")
    names = ["depth-by-position", "depth-shares", "perplexity-speed", "reliability"]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    ]
    assert all(path.read_bytes()[:4] in (b"\x89PNG", b"<svg") for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open it with")
def test_in_a_browser(report: Path) -> None:
    """Light and dark, at a phone's width: no errors, no requests, nothing wider than the page, and the slider
    moves the passage.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive Chromium with")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = chromium.new_context(
                color_scheme=scheme, viewport={"width": 390, "height": 800}
            ).new_page()
            troubles: list[str] = []
            page.on("pageerror", lambda error, found=troubles: found.append(str(error)))
            page.on(
                "request",
                lambda request, found=troubles: (
                    found.append(request.url) if not request.url.startswith("file:") else None
                ),
            )
            page.goto(report.as_uri())
            page.evaluate(
                "document.getElementById('at').value = 2; "
                "document.getElementById('at').dispatchEvent(new Event('input'))"
            )
            assert page.locator(".passage:visible").get_attribute("data-row") == "2"
            assert page.locator("#name").inner_text() == "recompute 0.4"
            assert page.locator(f"figure.{scheme}").first.is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert troubles == []
        chromium.close()


def test_calibration_error_by_hand() -> None:
    """Two bins: three tokens at 0.9 of which two agree, one at 0.15 that does not."""
    confidence = np.array([0.9, 0.9, 0.9, 0.15])
    agrees = np.array([True, True, False, False])
    means, shares, counts = bins(confidence, agrees)
    assert (means, shares, counts) == (pytest.approx([0.15, 0.9]), pytest.approx([0.0, 2 / 3]), [1, 3])
    assert expected_error(confidence, agrees) == pytest.approx((3 * (0.9 - 2 / 3) + 0.15) / 4)
    assert bins(np.array([1.0]), np.array([True])) == ([1.0], [1.0], [1])


def test_a_known_temperature_is_found() -> None:
    dice = np.random.default_rng(0)
    truth = dice.uniform(0.05, 0.95, 20000)
    agrees = dice.random(20000) < truth
    overconfident = scale(truth, 0.5)  # log-odds doubled
    assert fit_temperature(overconfident, agrees) == pytest.approx(2.0, rel=0.08)
    assert expected_error(scale(overconfident, 2.0), agrees) < 0.02 < expected_error(overconfident, agrees)


def test_a_report_without_a_suffix_is_refused_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Its figures would take the name of the file."""
    result = CliRunner().invoke(
        main, ["report", str(tiny_bundle), "--data", "kjv", "--out", str(tmp_path / "report")]
    )
    assert result.exit_code != 0
    assert "give a free name that ends in .html" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    link = tmp_path / "link.json"
    pipe = tmp_path / "pipe"
    real.write_text("old", encoding="utf-8")
    link.symlink_to(real)
    write_whole(link, "new")
    assert (real.read_text(encoding="utf-8"), link.is_symlink()) == ("new", True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "through")
    assert (os.read(reader, 100), pipe.is_fifo()) == (b"through", True)
    os.close(reader)
