"""What models of code complete: lines that are as in the file, and functions that are valid Python.

    python experiments/completions.py packages DIR          # three packages, as DIR/NAME.jsonl
    python experiments/completions.py complete BUNDLE...    # adds to docs/experiments/code-completions.json
    python experiments/completions.py speed BUNDLE          # drafts: docs/experiments/code-drafts.json

Lines and functions are drawn from the test split of python-stdlib, the same for every bundle. A line's prompt
is its file up to a space somewhere past its middle; a function's ends with its `def` line; both are cut to
the last CONTEXT tokens. The space, or the line break, is the model's to say, since it is one token with what
follows. Greedy, with the catch-up `propagate`; `verify` says what full depth says.
"""

import ast
import json
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from drafts import Modes, Task, compare, row_of

from ease_common.files import write_whole
from ease_runtime.cli.commands import ThresholdFlag
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies.thresholds import Thresholds
from ease_train.data.corpora import load_documents

OUT = Path("docs/experiments/code-completions.json")
DRAFTS = Path("docs/experiments/code-drafts.json")
PACKAGES = ("bottle==0.13.4", "requests==2.32.5", "attrs==25.3.0")  # none is a copy of the library's modules
FILES = 19  # of a package, the largest: fewer than a source needs to be divided into splits
CONTEXT = 320  # tokens of a prompt
LINE_TOKENS, FUNCTION_TOKENS = 32, 160
LINES, FUNCTIONS = 300, 100
LINE = re.compile(r" *[^\s#].{15,70}\n")
DEFINITION = re.compile(r" *def \w+\(.*\):\n")


@dataclass(frozen=True)
class Place:
    """What a completion is asked at, and what the file says there."""

    before: str
    after: str


@dataclass(frozen=True)
class Row:
    """What one bundle completes at one threshold."""

    bundle: str
    threshold: str
    mean_depth: float
    lines: int
    same_lines: float  # share whose rest is the file's, to the last character
    functions: int
    ended: float  # share of functions that came to an end within FUNCTION_TOKENS tokens
    valid: float  # share of those that parse


def sources() -> list[list[str]]:
    """The lines of each file of the test split."""
    return [text.splitlines(keepends=True) for text in load_documents("python-stdlib", "test")]


def line_places() -> list[Place]:
    """Lines of code, to be gone on with from a space past their middle."""
    found = []
    for lines in sources():
        for at, line in enumerate(lines[10:], 10):
            cut = line.find(" ", len(line) // 2)
            if LINE.fullmatch(line) and cut > 0 and line[cut:].strip():
                found.append(Place("".join(lines[:at]) + line[:cut], line[cut:]))
    return random.Random(0).sample(found, LINES)


def function_places() -> list[Place]:
    """Functions, to be written from the end of their `def` line on."""
    found = []
    for lines in sources():
        for at, line in enumerate(lines[10:], 10):
            if DEFINITION.fullmatch(line):
                found.append(Place("".join(lines[: at + 1]).removesuffix("\n"), "".join(lines[at + 1 :])))
    return random.Random(0).sample(found, FUNCTIONS)


def same_line(place: Place, said: str) -> bool:
    """Whether the rest of the line is the file's, to the last character."""
    return "\n" in said and said.partition("\n")[0] == place.after.rstrip("\n")


def body(place: Place, said: str) -> str | None:
    """The function as completed, up to the first line outside it; None where it had no end."""
    head = place.before.rpartition("\n")[2]
    indent = len(head) - len(head.lstrip())
    lines = said.split("\n")[1:-1]  # the last may be the half of one
    for at, line in enumerate(lines):
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return textwrap.dedent("\n".join([head, *lines[:at]]) + "\n")
    return None


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def completer(llm: LLM, threshold: str) -> tuple[Callable[[str, int], str], list[int]]:
    """A function from a prompt to its completion, and the depths of all tokens that it said so far."""
    depths: list[int] = []

    def complete(before: str, tokens: int) -> str:
        options = Options(max_tokens=tokens, threshold=threshold, catch_up="propagate")
        answer = llm.complete(llm.encode(before)[-CONTEXT:], options)
        depths.extend(answer.depths)
        return answer.text

    return complete, depths


def row(bundle: Path, threshold: str, lines: Sequence[Place], functions: Sequence[Place]) -> Row:
    complete, depths = completer(LLM(bundle), threshold)
    same = [same_line(place, complete(place.before, LINE_TOKENS)) for place in lines]
    bodies = [body(place, complete(place.before, FUNCTION_TOKENS)) for place in functions]
    ended = [source for source in bodies if source is not None]
    return Row(
        bundle.name,
        threshold,
        sum(depths) / len(depths),
        len(lines),
        sum(same) / len(same),
        len(functions),
        len(ended) / len(functions),
        sum(map(parses, ended)) / len(ended),
    )


def package_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        files = [info for info in archive.infolist() if info.filename.endswith(".py") and info.file_size]
        largest = sorted(files, key=lambda info: (-info.file_size, info.filename))[:FILES]
        return [archive.read(info).decode() for info in sorted(largest, key=lambda info: info.filename)]


@click.group()
def main() -> None:
    """Completions of code."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def packages(folder: Path) -> None:
    """Fetch the packages, a .jsonl file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as wheels:
            asked = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", wheels, package]
            subprocess.run([sys.executable, "-m", "pip", *asked], check=True)
            texts = package_files(next(Path(wheels).glob("*.whl")))
        rows = (json.dumps({"text": text}) + "\n" for text in texts)
        write_whole(folder / f"{package.partition('==')[0]}.jsonl", "".join(rows))


@main.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--threshold", "thresholds", multiple=True, default=("off",))
def complete(bundles: tuple[Path, ...], thresholds: tuple[str, ...]) -> None:
    """Add rows to the JSON; those that are there stay."""
    lines, functions = line_places(), function_places()
    rows = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
    done = {(one["bundle"], one["threshold"]) for one in rows}
    for bundle in bundles:
        for threshold in thresholds:
            if (bundle.name, threshold) not in done:
                rows.append(asdict(row(bundle, threshold, lines, functions)))
                click.echo(rows[-1])
                write_whole(OUT, json.dumps(rows, indent=2) + "\n")


@main.command()
@click.argument("bundle")
@click.option("--threshold", type=ThresholdFlag(), default="0.5", show_default=True)
@click.option("--count", default=24, show_default=True, help="Functions.")
def speed(bundle: str, threshold: Thresholds, count: int) -> None:
    """What drafts of the exit and from text gain over full depth, whose answer all have, on functions."""
    llm = LLM(bundle)
    places = function_places()[:count]
    prompts = [Task("functions", "code", llm.encode(place.before)[-CONTEXT:]) for place in places]
    ways = Modes(llm, ("off", "exit", "ngram", "auto"), threshold)
    for mode in ways.engines:  # first-time allocations
        ways.run(prompts[-1], mode)
    found = [compare(ways, task) for task in prompts]
    rows = [row_of(bundle, "functions", mode, found) for mode in ("exit", "ngram", "auto")]
    for one in rows:
        click.echo(json.dumps(one))
    write_whole(DRAFTS, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
