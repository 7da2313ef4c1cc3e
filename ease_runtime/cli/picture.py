"""A text as a picture: its tokens in the colours of the layers where they left, confidence as a bar below.

    picture(prompt, [events], exit_layers=(4, 8, 12))  # SVG, which says every number where a pointer rests

Plain SVG of the standard library's XML: nothing to install, and its text can be selected.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from rich.cells import cell_len

from ease_runtime.generation import TokenEvent

COLUMNS = 84  # cells of a line
CELL = 8.6  # all lengths in CSS pixels
LINE = 40.0
BOX = 24.0
BAR = 5.0
MARGIN = 24.0
PROMPT_LINES = 3  # of the prompt, its last ones
FONT = "ui-monospace, 'DejaVu Sans Mono', 'Cascadia Mono', Menlo, Consolas, monospace"
STYLE = f"""
text {{ font: 14px {FONT}; fill: #1f2328; white-space: pre; }}
text.small {{ font-size: 12px; fill: #59636e; }}
text.prompt {{ fill: #818b98; }}
"""
NEWLINE = "↵"
HUES = (165.0, 285.0)  # of the first early exit and of the last


@dataclass(frozen=True)
class Placed:
    """A token on a line, from a column on."""

    event: TokenEvent
    text: str
    column: int

    @property
    def width(self) -> int:
        """In cells; a token without a text of its own, such as a part of a character, is one wide."""
        return max(1, cell_len(self.text))


def picture(prompt: str, answers: Sequence[Sequence[TokenEvent]], exit_layers: Sequence[int]) -> str:
    """The SVG of a prompt's answers, each from a new line on."""
    drawing = Drawing(exit_layers)
    drawing.legend()
    lines = [
        part
        for line in prompt.splitlines(keepends=True)
        for part in textwrap.wrap(printable(line), COLUMNS, drop_whitespace=False)
    ]
    cut = lines[-PROMPT_LINES:]
    for number, line in enumerate(cut):
        drawing.add_prompt(("…" if number == 0 and len(cut) < len(lines) else "") + line)
    drawing.y += 4
    for answer in answers:
        for placed in lay_out(answer):
            drawing.add_line(placed)
    drawing.summary([event for answer in answers for event in answer])
    return drawing.as_svg()


def printable(text: str) -> str:
    """A text in one line, without what XML and a line have no place for."""
    return "".join(
        NEWLINE if c == "\n" else " " if c == "\t" else c if c.isprintable() else "�" for c in text
    )


def words(events: Sequence[TokenEvent]) -> Iterator[list[TokenEvent]]:
    """Tokens that no line's end should part: a space begins another word, a newline ends one."""
    word: list[TokenEvent] = []
    for event in events:
        if word and (event.text[:1].isspace() or "\n" in word[-1].text):
            yield word
            word = []
        word.append(event)
    if word:
        yield word


def before_indentation(text: str) -> str:
    """A token's text without the blanks that the next line begins with."""
    return text.rstrip(" \t") if "\n" in text else text


def lay_out(events: Sequence[TokenEvent]) -> list[list[Placed]]:
    """Tokens on lines of COLUMNS cells."""
    lines: list[list[Placed]] = [[]]
    column = 0
    for word in words(events):
        texts = [printable(before_indentation(event.text)) for event in word]
        width = sum(max(1, cell_len(text)) for text in texts)
        if column and column + width > COLUMNS:
            lines.append([])
            column = 0
        for event, text in zip(word, texts, strict=True):
            placed = Placed(event, text, column)
            if column and column + placed.width > COLUMNS:
                lines.append([])
                placed = Placed(event, placed.text, 0)
            lines[-1].append(placed)
            column = placed.column + placed.width
        if "\n" in word[-1].text:
            lines.append([])
            column = min(len(word[-1].text) - len(before_indentation(word[-1].text)), COLUMNS // 2)
    return [line for line in lines if line]


class Drawing:
    """An SVG that grows downwards."""

    def __init__(self, exit_layers: Sequence[int]) -> None:
        self.exit_layers = tuple(exit_layers)
        self.root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
        ElementTree.SubElement(self.root, "style").text = STYLE
        self.ground = self._rect("#ffffff", 0, 0, 0, 0, radius=10)
        self.y = MARGIN
        self.columns = COLUMNS

    def colour(self, depth: int) -> str:
        """The hue and saturation of a depth: between two exits that of the next one, grey for the last."""
        early = self.exit_layers[:-1]
        place = next((k for k, layer in enumerate(early) if depth <= layer), None)
        if place is None:
            return "215, 12%"
        share = place / (len(early) - 1) if len(early) > 1 else 0.0
        return f"{HUES[0] + share * (HUES[1] - HUES[0]):.0f}, 60%"

    def legend(self) -> None:
        """What colours and bars mean."""
        x = MARGIN
        x = self._small("left after layer", x) + CELL
        for layer in self.exit_layers:
            width = (len(str(layer)) + 2) * CELL
            self._rect(f"hsl({self.colour(layer)}, 88%)", x, self.y, width, 18)
            text = self._text(str(layer), x + CELL, self.y + 13)
            text.set("class", "small")
            x += width + 6
        x = self._small("bar: confidence, from 0 to 1", x + 2 * CELL) + CELL
        self._bar(self.colour(self.exit_layers[0]), x, self.y + 8, 60, 0.7)
        self.y += LINE

    def add_prompt(self, line: str) -> None:
        """A line of what the answer goes on from."""
        self._text(line, MARGIN, self.y + 17).set("class", "prompt")
        self._grow(cell_len(line))
        self.y += BOX

    def add_line(self, placed: Sequence[Placed]) -> None:
        """A line of tokens: boxes and bars first, then its text as one that can be selected as such."""
        if not placed:
            return
        for token in placed:
            x, width = MARGIN + token.column * CELL, token.width * CELL - 1.2
            colour = self.colour(token.event.depth)
            self._rect(f"hsl({colour}, 88%)", x, self.y, width, BOX)
            self._bar(colour, x, self.y + BOX + 2, width, token.event.confidence)
        text = ElementTree.SubElement(self.root, "text", y=f"{self.y + 17:g}")
        for token in placed:
            span = ElementTree.SubElement(text, "tspan", x=f"{MARGIN + token.column * CELL:.1f}")
            fit(span, token.text)
            ElementTree.SubElement(span, "title").text = numbers(token.event)
        self._grow(placed[-1].column + placed[-1].width)
        self.y += LINE

    def summary(self, events: Sequence[TokenEvent]) -> None:
        """How many tokens left where."""
        if not events:
            return
        mean = sum(event.depth for event in events) / len(events)
        shares = ", ".join(
            f"{sum(event.depth == layer for event in events) / len(events):.0%} at {layer}"
            for layer in self.exit_layers
        )
        self._small(
            f"{len(events)} tokens, mean depth {mean:.2f} of {self.exit_layers[-1]} layers ({shares})", MARGIN
        )
        self.y += BOX

    def as_svg(self) -> str:
        """The picture's XML."""
        width, height = 2 * MARGIN + self.columns * CELL, self.y + MARGIN / 2
        self.root.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
        self.root.set("width", f"{width:.0f}")
        self.root.set("height", f"{height:.0f}")
        self.ground.set("width", "100%")
        self.ground.set("height", "100%")
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"

    def _grow(self, columns: int) -> None:
        self.columns = max(self.columns, columns)

    def _small(self, content: str, x: float) -> float:
        """A small text; where it ends."""
        self._text(content, x, self.y + 13, cell=7.4).set("class", "small")
        return x + len(content) * 7.4

    def _text(self, content: str, x: float, y: float, cell: float = CELL) -> ElementTree.Element:
        made = ElementTree.SubElement(self.root, "text", x=f"{x:.1f}", y=f"{y:.1f}")
        fit(made, content, cell)
        return made

    def _bar(self, colour: str, x: float, y: float, width: float, share: float) -> None:
        self._rect(f"hsl({colour}, 88%)", x, y, width, BAR, radius=2)
        self._rect(f"hsl({colour}, 38%)", x, y, width * min(max(share, 0.0), 1.0), BAR, radius=2)

    def _rect(
        self, fill: str, x: float, y: float, width: float, height: float, radius: float = 3
    ) -> ElementTree.Element:
        made = ElementTree.SubElement(self.root, "rect", fill=fill)
        for name, size in (("x", x), ("y", y), ("width", width), ("height", height), ("rx", radius)):
            made.set(name, f"{size:.1f}")
        return made


def fit(element: ElementTree.Element, text: str, cell: float = CELL) -> None:
    """Give an element its text, as wide as its cells in whatever font there is."""
    element.text = text
    if text:
        element.set("textLength", f"{cell_len(text) * cell:.1f}")
        element.set("lengthAdjust", "spacingAndGlyphs")


def numbers(event: TokenEvent) -> str:
    """What a token's title says."""
    sure = f"confidence {event.confidence:.3f}, log-probability {event.logprob:.2f}"
    drafted = f", drafted by {event.drafter}" if event.drafter else ""
    return f"layer {event.depth}, {sure}{drafted}"
