"""Write what docs/policies.md, docs/options.md and docs/recipe.md say of the code out of its docstrings and
help texts; with --check, fail when they have drifted.

python docs/make_reference.py [--check]
"""

import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ease_runtime.options import FLAGS, Options
from ease_runtime.policies import POLICIES, ThresholdPolicy
from ease_runtime.policies.budget import Budget
from ease_runtime.policies.thresholds import Thresholds
from ease_runtime.text.grammar import JsonSchema, LarkGrammar, Regex
from ease_train.training.config import SECTIONS

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
MARKED = re.compile(r"(<!-- from docstrings -->\n).*?(<!-- end -->)", re.S)
KINDS = {
    Thresholds: "thresholds",
    JsonSchema: "JSON schema",
    LarkGrammar: "grammar",
    Regex: "regular expression",
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
}
ASKS = {
    "head": "Asks the exit's head.",
    "gate": "Asks the exit's gate.",
    "similarity": "Compares the states around the exit's segment.",
}
MADE = "Made from the code's help texts by `make docs`; `make check` fails when it has drifted.\n"


def paragraphs(documented: Any) -> str:
    """A docstring as Markdown: a line a paragraph."""
    text = inspect.getdoc(documented) or ""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def policy_parts() -> Iterator[str]:
    """A heading and the docstring of each policy, then of what any of them may have."""
    for name, policy in POLICIES.items():
        file = Path(inspect.getfile(policy)).relative_to(ROOT)
        yield f"### {name}\n\n{ASKS[policy.asks]} {paragraphs(policy)}\n\n`{file}`"
    yield f"### Decay\n\n{paragraphs(ThresholdPolicy).split(chr(10) * 2)[-1]}"
    yield f"### Depth budget\n\n{paragraphs(Budget)}"


def policies_page(old: str) -> str:
    """The page with its marked part written anew."""
    parts = "\n\n".join(policy_parts())
    return MARKED.sub(lambda found: f"{found[1]}\n{parts}\n\n{found[2]}", old)


def cell(value: Any) -> str:
    """A value in a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def kind_of(hint: Any) -> str:
    """A type as a reader may say it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"list: {kind_of(inner[0])}"
    if origin in (dict, Mapping):
        return f"table: {kind_of(inner[0])} to {kind_of(inner[1])}"
    return KINDS[inner[0] if inner else hint]  # X | None is an X that may be left out


def options_page(old: str) -> str:
    """Every field of Options."""
    lines = [
        "# Options of a request",
        "",
        f"{MADE}",
        "One dataclass, `ease_runtime.Options`: the flags of `ease-run`, the keys of a line of `ease-run "
        'batch`, and in the server the fields beside OpenAI\'s, those of leaving early in `"ease": {...}`.',
        "",
        "| option | flag | kind | default | what it does |",
        "|---|---|---|---|---|",
    ]
    hints = typing.get_type_hints(Options)
    flags = {field: flag for flag, field in FLAGS.items()}
    for f in fields(Options):
        flag = flags.get(f.name, f.name).replace("_", "-")
        default = "–" if f.default in (MISSING, None, ()) else f"`{f.default}`"
        told = cell(f.metadata["help"])
        lines.append(f"| `{f.name}` | `--{flag}` | {kind_of(hints[f.name])} | {default} | {told} |")
    return "\n".join(lines) + "\n"


def recipe_page(old: str) -> str:
    """Every setting of a recipe, a table a section."""
    lines = ["# Recipes, key by key", "", MADE]
    lines.append(
        "A recipe is a TOML file; `config.json` of a checkpoint has the same tables under `recipe` (and, as "
        "it was before a run's own options, under `base`). Beside these it has `name`, `description`, "
        "`paper`, and in a file `extends`, the recipe whose settings hold where it says nothing."
    )
    for table, section in SECTIONS.items():
        lines += ["", f"## {table}", "", "| key | kind | default | what it is |", "|---|---|---|---|"]
        for path, f, hint in section.settings():
            default = f.default_factory() if f.default is MISSING else f.default  # type: ignore[misc]
            shown = "–" if default in (None, (), {}) else f"`{cell(default)}`"
            name, kind = ".".join(path), kind_of(hint)
            lines.append(f"| `{name}` | {kind} | {shown} | {cell(f.metadata.get('help', ''))} |")
    return "\n".join(lines) + "\n"


PAGES = {"policies.md": policies_page, "options.md": options_page, "recipe.md": recipe_page}


def main(check: bool) -> None:
    for name, page in PAGES.items():
        file = FOLDER / name
        old = file.read_text(encoding="utf-8") if file.is_file() else ""
        new = page(old)
        if not check:
            file.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{file} is not what the code says now; run: make docs")


if __name__ == "__main__":
    main("--check" in sys.argv)
