"""The picture of a text: well-formed whatever was said, text whole, colours by exit, bars by confidence."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from ease_runtime.cli.main import main
from ease_runtime.cli.picture import BAR, COLUMNS, MARGIN, lay_out, picture
from ease_runtime.generation import TokenEvent

SVG = "{http://www.w3.org/2000/svg}"


def event(text: str, depth: int = 4, confidence: float = 0.5, drafter: str = "") -> TokenEvent:
    return TokenEvent(7, text, depth, confidence, -0.5, drafter=drafter)


def spans(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}tspan"))


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        (" the", " the"),
        ("<b>&\"'", "<b>&\"'"),
        ("a\nb", "a↵b"),
        ("\x00\x1b\ud800", "���"),
        ("東京", "東京"),
        ("", ""),
    ],
)
def test_a_token_s_text_is_drawn_whole(text: str, drawn: str) -> None:
    (span,) = spans(picture("p", [[event(text)]], (2, 4)))
    assert (span.text or "") == drawn


@pytest.mark.parametrize("prompt", ["", "And", "<&>\x07", "word " * 500, "x" * 500])
def test_a_long_or_odd_prompt_is_cut(prompt: str) -> None:
    lines = [
        one.text or ""
        for one in ElementTree.fromstring(picture(prompt, [], (2, 4))).iter(f"{SVG}text")
        if one.get("class") == "prompt"
    ]
    assert len(lines) <= 3
    assert all(len(line) <= COLUMNS + 1 for line in lines)
    assert any(line.startswith("…") for line in lines) == (len(prompt) >= 500)


def test_colours_are_exits_and_bars_are_confidences() -> None:
    events = [event("a", 2, 0.25), event("b", 3, 1.5), event("c", 4, 0.5), event("d", 6, 0.0)]
    root = ElementTree.fromstring(picture("p", [events], (2, 4, 6)))
    boxes = [one for one in root.iter(f"{SVG}rect") if one.get("height") == "24.0"]
    colours = [box.get("fill") for box in boxes]
    assert colours[1] == colours[2], "a token between two exits has the next one's colour"
    assert len(set(colours)) == 3
    bars = [one for one in root.iter(f"{SVG}rect") if one.get("height") == f"{BAR}"][
        2:
    ]  # behind the legend's
    widths = [float(bar.get("width") or 0) for bar in bars]
    shares = [filled / track for track, filled in zip(widths[::2], widths[1::2], strict=True)]
    assert shares == pytest.approx([0.25, 1.0, 0.5, 0.0], abs=0.03)


def test_titles_have_the_numbers() -> None:
    (title,) = ElementTree.fromstring(picture("p", [[event("a", 2, 0.25, "ngram")]], (2, 4))).iter(
        f"{SVG}title"
    )
    assert title.text == "layer 2, confidence 0.250, log-probability -0.50, drafted by ngram"


def test_words_stay_together_and_lines_fit() -> None:
    events = [event(text) for text in [" in", "divis", "ible"] * 30 + ["x" * 30] * 4]
    lines = lay_out(events)
    assert [placed.event for line in lines for placed in line] == events
    assert all(line[-1].column + line[-1].width <= COLUMNS for line in lines)
    assert [line[0].text for line in lines[:5]] == [" in"] * 5
    assert [len(line) for line in lay_out([event("a\n"), event("b")])] == [1, 1]


def test_generate_draws(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "said.svg"
    command = ["generate", str(tiny_bundle), "--prompt", "And the king", "--max-tokens", "8", "--json"]
    early = [*command, "--threshold", "0", "--catch-up", "propagate", "--picture"]
    done = CliRunner().invoke(main, [*early, str(out)])
    assert done.exit_code == 0, done.output
    tokens = json.loads(done.stdout)["tokens"]
    assert len(spans(out.read_text(encoding="utf-8"))) == len(tokens) == 8
    viewbox = ElementTree.parse(out).getroot().get("viewBox") or ""
    assert float(viewbox.split()[2]) > 2 * MARGIN
    refused = CliRunner().invoke(main, [*early, str(tmp_path / "none" / "said.svg")])
    assert refused.exit_code == 1
    assert "is no directory; make it first" in refused.stderr


def test_indentation_stands_on_its_line() -> None:
    """Code looks like code: a break is one with the blanks after it as a token, and not as a box."""
    first, second = lay_out([event("if x:"), event("\n   "), event(" y")])
    assert [(one.text, one.column) for one in first] == [("if x:", 0), ("↵", 5)]
    assert [(one.text, one.column) for one in second] == [(" y", 3)]
