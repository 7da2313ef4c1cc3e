"""The commands of ease-eval that measure a bundle on a corpus: table, report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ease_eval.files import write_whole
from ease_eval.table import Amounts, Table, cells, make_table
from ease_runtime.commands import ThresholdList
from ease_runtime.engine import CATCH_UPS
from ease_runtime.llm import LLM
from ease_runtime.policy import POLICIES
from ease_train.corpora import load_documents

# COLUMNS of the table for a terminal of 80 columns
NARROW_COLUMNS = ("at", "catch-up", "ppl", "vs off", "depth", "tok/s", "p50\nms", "p95\nms", "speed\n-up", "ideal", "of\nideal")

REPORT_DOCUMENTS = 24  # that depth by position and reliability are drawn from
PASSAGE_LEAST = 32  # tokens of a document that the passage may begin with

MEASURE_FLAGS = (
    click.option(
        "--data", default="kjv", show_default=True, help="kjv, wikitext-2, a local .txt/.jsonl/.parquet file, or a data set on the hub."
    ),
    click.option("--split", default="test", show_default=True, help="train, validation or test."),
    click.option("--policy", default="max-prob", show_default=True, help=f"What confidence is: {', '.join(POLICIES)}."),
    click.option(
        "--thresholds", type=ThresholdList(), default="0.5,0.7,0.9", show_default=True, help="A row each; each for every early exit."
    ),
    click.option(
        "--exit-thresholds", type=ThresholdList(), multiple=True, help="One more row: a threshold an exit, like off,0.5; may be repeated."
    ),
    click.option(
        "--catch-up",
        "catch_ups",
        multiple=True,
        default=("recompute",),
        show_default=True,
        help=f"{' or '.join(CATCH_UPS)}; may be repeated.",
    ),
    click.option("--scored-tokens", default=Amounts.scored_tokens, show_default=True, help="Tokens whose perplexity is measured."),
    click.option("--texts", default=Amounts.num_texts, show_default=True, help="Documents that are decoded for the clock."),
    click.option("--prompt-tokens", default=Amounts.prompt_tokens, show_default=True, help="Tokens of each text's prompt."),
    click.option("--new-tokens", default=Amounts.new_tokens, show_default=True, help="Tokens decoded after each prompt."),
    click.option("--rounds", default=Amounts.num_rounds, show_default=True, help="Timed rounds, after one to warm up."),
    click.option("--threads", default=0, help="CPU threads; 0 takes all."),
)


def measure_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is measured, and how much of it: the arguments of `measured`."""
    for flag in reversed(MEASURE_FLAGS):
        command = flag(command)
    return command


def measured(
    bundle: Path,
    *,
    data: str,
    split: str,
    policy: str,
    thresholds: tuple[float | None, ...],
    exit_thresholds: tuple[tuple[float | None, ...], ...],
    catch_ups: tuple[str, ...],
    scored_tokens: int,
    texts: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
) -> tuple[LLM, list[list[int]], Table]:
    """A bundle, a corpus's documents as its ids, and what was measured of them."""
    amounts = Amounts(scored_tokens, texts, prompt_tokens, new_tokens, rounds)
    llm = LLM(bundle, num_threads=threads)
    documents = [llm.encode(text) for text in load_documents(data, split)]
    result = make_table(
        bundle,
        llm,
        documents,
        source=data,
        split=split,
        policy=policy,
        thresholds=[*(t for t in thresholds if t is not None), *exit_thresholds],  # off is always the first row
        catch_ups=catch_ups,
        amounts=amounts,
        num_threads=threads,
    )
    return llm, documents, result


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@measure_flags
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure here.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the table here.")
def table(bundle: Path, json_file: Path | None, markdown_file: Path | None, **given: Any) -> None:
    """Perplexity, depth and real speed for each threshold, off first."""
    _, _, result = measured(bundle, **given)
    for file, text in ((json_file, result.to_json()), (markdown_file, result.markdown())):
        if file:
            write_whole(file, text)
    render(result, Console())


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@measure_flags
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The HTML file; figures go to a folder of its name."
)
def report(bundle: Path, out: Path, **given: Any) -> None:
    """Measure as table does, and write one HTML file: figures, tables, a passage coloured by depth."""
    from ease_eval.report import make_report  # matplotlib takes a second to import

    llm, documents, result = measured(bundle, **given)
    shown = [ids for ids in documents if len(ids) > PASSAGE_LEAST][:REPORT_DOCUMENTS]
    write_whole(out, make_report(llm, result, shown, out))
    click.echo(f"{out}: written, with its figures in {out.with_suffix('')}")


def render(result: Table, console: Console) -> None:
    """The table on the terminal, narrow enough for 80 columns."""
    policy = result.rows[0].policy
    shown = RichTable(title=f"{result.bundle} on {result.data} ({result.split}), {policy}", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in NARROW_COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        shown.add_row(*(cell.removeprefix(f"{policy} ") for cell in cells(row)))
    console.print(shown)
