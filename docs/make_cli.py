"""Write docs/cli.md from every command's --help; with --check, fail when it has drifted.

python docs/make_cli.py [--check]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

import ease_eval.cli.main
import ease_export.cli
import ease_runtime.cli.main
import ease_train.cli

PROGRAMS = {
    "ease-train": ease_train.cli.main,
    "ease-export": ease_export.cli.main,
    "ease-run": ease_runtime.cli.main.main,
    "ease-eval": ease_eval.cli.main.main,
}
PAGE = Path(__file__).parent / "cli.md"
HEADER = "# Commands\n\nMade from `--help` by `make docs`; `make check` fails when it has drifted.\n"


def help_texts(
    name: str, command: click.Command, parent: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """A command's full name and its help, then those of its subcommands."""
    context = click.Context(command, info_name=name, parent=parent, max_content_width=110, terminal_width=110)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for sub_name in command.list_commands(context):
            sub = command.get_command(context, sub_name)
            assert sub is not None
            yield from help_texts(sub_name, sub, context)


def page() -> str:
    parts = [HEADER]
    for name, program in PROGRAMS.items():
        for path, text in help_texts(name, program):
            parts.append(f"## {path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not what --help says now; run: make docs")
