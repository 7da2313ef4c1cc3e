"""ease-eval: measure a bundle."""

import os
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ease_eval.table import Amounts, Table, cells, make_table
from ease_runtime.commands import ErrorGroup, ThresholdList
from ease_runtime.engine import CATCH_UPS
from ease_runtime.errors import EaseError, RequestError
from ease_runtime.policy import POLICIES
from ease_train.errors import TrainError

# COLUMNS of the table for a terminal of 80 columns
NARROW_COLUMNS = ("at", "catch-up", "ppl", "vs off", "depth", "tok/s", "p50\nms", "p95\nms", "speed\n-up", "ideal", "of\nideal")


class EvalGroup(ErrorGroup):
    errors = (EaseError, TrainError)


@click.group(cls=EvalGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Measure what early exits cost in perplexity and save in time."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data", default="kjv", show_default=True, help="kjv, wikitext-2, a local .txt/.jsonl/.parquet file, or a data set on the hub."
)
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option("--policy", default="max-prob", show_default=True, help=f"What confidence is: {', '.join(POLICIES)}.")
@click.option("--thresholds", type=ThresholdList(), default="0.5,0.7,0.9", show_default=True, help="A row each; each for every early exit.")
@click.option(
    "--exit-thresholds", type=ThresholdList(), multiple=True, help="One more row: a threshold an exit, like off,0.5; may be repeated."
)
@click.option(
    "--catch-up", "catch_ups", multiple=True, default=("recompute",), show_default=True, help=f"{' or '.join(CATCH_UPS)}; may be repeated."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure here.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the table here.")
@click.option("--scored-tokens", default=Amounts.scored_tokens, show_default=True, help="Tokens whose perplexity is measured.")
@click.option("--texts", default=Amounts.num_texts, show_default=True, help="Documents that are decoded for the clock.")
@click.option("--prompt-tokens", default=Amounts.prompt_tokens, show_default=True, help="Tokens of each text's prompt.")
@click.option("--new-tokens", default=Amounts.new_tokens, show_default=True, help="Tokens decoded after each prompt.")
@click.option("--rounds", default=Amounts.num_rounds, show_default=True, help="Timed rounds, after one to warm up.")
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
def table(
    bundle: Path,
    data: str,
    split: str,
    policy: str,
    thresholds: tuple[float | None, ...],
    exit_thresholds: tuple[tuple[float | None, ...], ...],
    catch_ups: tuple[str, ...],
    json_file: Path | None,
    markdown_file: Path | None,
    scored_tokens: int,
    texts: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
) -> None:
    """Perplexity, depth and real speed for each threshold, off first."""
    result = make_table(
        bundle,
        source=data,
        split=split,
        policy=policy,
        thresholds=[*(t for t in thresholds if t is not None), *exit_thresholds],  # off is always the first row
        catch_ups=catch_ups,
        amounts=Amounts(scored_tokens, texts, prompt_tokens, new_tokens, rounds),
        num_threads=threads,
    )
    for file, text in ((json_file, result.to_json()), (markdown_file, result.markdown())):
        if file:
            write_whole(file, text)
    render(result, Console())


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all. Raises RequestError."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(f"could not write {file}: {error.strerror}") from None


def render(result: Table, console: Console) -> None:
    """The table on the terminal, narrow enough for 80 columns."""
    policy = result.rows[0].policy
    shown = RichTable(title=f"{result.bundle} on {result.data} ({result.split}), {policy}", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in NARROW_COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        shown.add_row(*(cell.removeprefix(f"{policy} ") for cell in cells(row)))
    console.print(shown)


if __name__ == "__main__":
    main()
