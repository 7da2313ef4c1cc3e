"""The commands of ease-eval about machines: compare, advise."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ease_common.commands import given_flags
from ease_common.errors import RequestError
from ease_common.files import write_whole
from ease_common.lists import FiniteFloat, FiniteRange, list_of
from ease_eval.cli.measure import JSON_FLAG, POLICY_FLAG, Measurement, measure_flags, narrow_table
from ease_eval.measure.advice import Advice
from ease_eval.measure.advice import advise as make_advice
from ease_eval.measure.agreement import read_prompts
from ease_eval.measure.documents import first_tokens
from ease_eval.measure.table import choose_texts, quality_cells
from ease_eval.peers.compare import (
    COLUMNS,
    FLOATS,
    LOOKUP,
    RUNTIMES,
    Comparison,
    ComparisonSettings,
    Workload,
    cells,
    compare_peers,
)
from ease_eval.provenance import provenance
from ease_eval.results import as_json
from ease_runtime.cli.commands import BundleName, ThresholdFlag
from ease_runtime.engine.engine import CATCH_UPS
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies.thresholds import Thresholds
from ease_train.data.corpora import load_documents, sum_of

WINDOW = 512  # tokens that are scored together
# those of COLUMNS that a terminal of 80 columns shows, one table a workload, by what they are called there
NARROW_COLUMNS = {
    "runtime": "runtime",
    "precision": "precision",
    "tokens/s": "tok/s",
    "ease is": "ease\nis",
    "first token ms": "first\nms",
    "load s": "load\ns",
    "resident MB": "MB",
    "perplexity": "ppl",
    "same texts": "same\ntexts",
}


@click.command()
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=BundleName())
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="The same model as a Hugging Face directory.",
)
@click.option(
    "--gguf",
    "ggufs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The same model for llama.cpp; may be given again, for several precisions.",
)
@click.option(
    "--runtimes",
    **list_of(click.Choice((*RUNTIMES, LOOKUP)), "NAME[,NAME...]"),
    default=[",".join(RUNTIMES)],
    show_default=True,
    help="Those beside EASE; lookup: with drafts from text, EASE's --draft auto too.",
)
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    default=".venv-peers/bin/python",
    show_default=True,
    help="That of the peers.",
)
@click.option(
    "--threshold",
    type=ThresholdFlag(),
    help="One more row of ours: early exits at this threshold, or one an exit.",
)
@POLICY_FLAG
@click.option("--catch-up", default="recompute", show_default=True, help=f"{', '.join(CATCH_UPS)}.")
@click.option(
    "--exit",
    "exit_layer",
    type=int,
    help="Layer of transformers' assistant_early_exit; the bundle's middle exit by default.",
)
@click.option(
    "--data",
    default="kjv",
    show_default=True,
    help="A corpus, as for table, whose texts' beginnings are the prompts.",
)
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Or a file of prompts, as for agreement.")
@click.option("--texts", default=4, show_default=True, help="Prompts.")
@click.option(
    "--prompt-tokens",
    "lengths",
    **list_of(click.IntRange(1), "N[,N...]"),
    default=["32"],
    show_default=True,
    help="Tokens of a prompt at most; several make a row of each runtime for each.",
)
@click.option(
    "--batch",
    "batch_sizes",
    **list_of(click.IntRange(1), "N[,N...]"),
    default=["1"],
    show_default=True,
    help="Rows that answer a prompt at once, likewise.",
)
@click.option(
    "--scored-tokens",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Tokens of --data whose perplexity in every runtime stands beside its speed.",
)
@click.option(
    "--new-tokens",
    default=ComparisonSettings.new_tokens,
    show_default=True,
    help="Tokens generated after each.",
)
@click.option(
    "--rounds",
    default=ComparisonSettings.rounds,
    show_default=True,
    help="Timed rounds, after one to warm up.",
)
@click.option(
    "--timeout",
    type=FiniteRange(0, min_open=True),
    default=ComparisonSettings.answer_seconds,
    show_default=True,
    help="Seconds after which a runtime that does not answer is ended.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ComparisonSettings.work,
    show_default=True,
    help="Where peers put models that they build.",
)
@click.option("--threads", default=0, help="CPU threads of each; 0 takes all.")
@click.option(
    "--device",
    type=click.Choice(list(FLOATS)),
    default=ComparisonSettings.device,
    show_default=True,
    help="Of all but llama.cpp. On cuda the peers need onnxruntime-genai-cuda and a CUDA build of torch.",
)
@JSON_FLAG
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table here.",
)
def compare(
    bundles: tuple[Path, ...],
    data: str,
    split: str,
    prompts: Path | None,
    texts: int,
    lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    scored_tokens: int,
    threshold: Thresholds | None,
    policy: str,
    catch_up: str,
    timeout: float,
    json_file: Path | None,
    markdown_file: Path | None,
    **given: Any,
) -> None:
    """Generate beside transformers, onnxruntime-genai and llama.cpp: the same weights and prompts, in turns.

    Further bundles are the same model in other forms. What is said of EASE is said of the first.

    The other runtimes live in a virtual environment of their own: make peers. One that is not there, or
    fails, is named and left out.
    """
    for unused in given_flags("policy", "catch_up") if threshold is None else ():
        raise RequestError(f"{unused} has no effect without --threshold, which asks for a row of early exits")
    for unused in given_flags("data", "split") if prompts and not scored_tokens else ():
        raise RequestError(f"{unused} has no effect beside --prompts; leave one out")
    if threshold is not None and not threshold:
        raise RequestError("--threshold off asks no exit; EASE at full depth is always a row")
    settings: dict[str, Any] | None = (
        {"threshold": threshold.to_json(), "policy": policy, "catch_up": catch_up} if threshold else None
    )
    bundle, *others = bundles
    plan = ComparisonSettings(
        bundle, others=tuple(others), settings=settings, answer_seconds=timeout, **given
    )
    llm = LLM(bundle, device=plan.device, num_threads=plan.threads)
    if settings:
        llm.engine.check(llm.policy(Options(**settings)), catch_up)
    longest = max(lengths) + plan.new_tokens
    if longest > llm.stack.max_positions:
        raise RequestError(
            f"--prompt-tokens and --new-tokens are {longest} together, more than this model's context of "
            f"{llm.stack.max_positions}"
        )
    source = provenance(bundle, llm, plan.threads)
    documents: list[list[int]] = []
    if scored_tokens or not prompts:
        corpus = load_documents(data, split)
        documents = [llm.encode_text(text) for text in corpus]
        source |= {"data_sha256": sum_of(corpus)}
    if prompts:
        begun = [llm.encode(text) for text in read_prompts(prompts, texts)]
    else:
        begun = beginnings(documents, texts, max(lengths))
    workloads = [
        Workload([ids[:length] for ids in begun], batch_size)
        for length in lengths
        for batch_size in batch_sizes
    ]
    scored = windows(documents, scored_tokens)
    del llm  # its memory is for the others
    result = compare_peers(plan, workloads, scored, tell=lambda line: click.echo(line, err=True))
    source |= {"checkpoint": str(plan.checkpoint), "prompts": str(prompts or f"{data} ({split})")}
    for file, text in ((json_file, result.to_json(source)), (markdown_file, result.markdown())):
        if file:
            write_whole(file, text)
    show_comparison(result, Console())


def beginnings(documents: Sequence[list[int]], num_texts: int, length: int) -> list[list[int]]:
    """Texts of one length from documents spread evenly over the corpus; one that is short is gone on
    with by those after it.

    Raises RequestError where the corpus is shorter.
    """
    joined = [token for ids in documents for token in ids]
    starts = np.cumsum([0, *(len(ids) for ids in documents)])
    starts = starts[starts <= len(joined) - length]
    if not len(starts):
        raise RequestError(f"the corpus has {len(joined)} tokens, fewer than --prompt-tokens {length}")
    places = np.linspace(0, len(starts) - 1, min(num_texts, len(starts))).round().astype(int)
    return [joined[start : start + length] for start in starts[places]]


def windows(documents: Sequence[list[int]], scored_tokens: int) -> list[list[int]]:
    """The first tokens of a corpus in pieces of at most WINDOW, each of which is scored by itself."""
    pieces: list[list[int]] = []
    for ids in documents:
        for start in range(0, len(ids) - 1, WINDOW):
            piece = ids[start : start + WINDOW + 1][: scored_tokens + 1]
            if scored_tokens < 1:
                return pieces
            pieces.append(piece)
            scored_tokens -= len(piece) - 1
    return pieces


def show_comparison(result: Comparison, console: Console) -> None:
    """A table a workload, a line a runtime; those without figures after it."""
    for workload in dict.fromkeys((row.prompt_tokens, row.batch_size) for row in result.rows):
        rows = [row for row in result.rows if (row.prompt_tokens, row.batch_size) == workload]
        prompt_tokens, batch_size = workload
        shown = RichTable(
            box=box.SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
            title=f"prompts of {prompt_tokens} tokens, batch {batch_size}",
        )
        for column, heading in NARROW_COLUMNS.items():
            text = column in COLUMNS[:2]
            shown.add_column(heading, justify="left" if text else "right", no_wrap=column == COLUMNS[0])
        for row in rows:
            if row.error is None:
                named = dict(zip(COLUMNS, cells(row), strict=True))
                shown.add_row(*(named[column] for column in NARROW_COLUMNS))
        console.print(shown)
    for line in dict.fromkeys(f"{row.runtime}: {row.error}" for row in result.rows if row.error is not None):
        click.echo(line)


@click.command()
@click.argument("bundle", type=BundleName())
@measure_flags
@click.option(
    "--tolerance",
    type=FiniteFloat(),
    default=0.05,
    show_default=True,
    help="Share of the tokens that may be said unlike at full depth.",
)
@click.option(
    "--show", default=10, show_default=True, help="Sets of exits that are shown, the fastest first."
)
@JSON_FLAG
def advise(bundle: Path, tolerance: float, show: int, json_file: Path | None, **given: Any) -> None:
    """What each exit of a bundle is good for, and which of them are worth having on this machine.

    Costs are timed here, call by call; the predictions that follow from them stand beside measured speed-ups.
    Give a model exits at many layers (ease-train import --exits 5,10,15,20,25) to see where it should have
    them.
    """
    asked = Measurement.of(bundle, **given)
    amounts = asked.amounts
    settings = asked.settings()
    chosen = choose_texts(asked.encoded, amounts, asked.llm.stack.max_positions)
    scored = [document.ids for document in first_tokens(asked.documents, amounts.scored_tokens)]
    advice = make_advice(asked.llm, scored, chosen, settings, tolerance, amounts.num_rounds)
    if json_file:
        text = {"data": asked.data, "data_sha256": asked.data_sha256, "split": asked.split}
        source = {**provenance(bundle, asked.llm, asked.threads), **text, **asdict(amounts)}
        write_whole(json_file, json.dumps({**source, **as_json(advice)}, indent=2) + "\n")
    show_advice(advice, show, Console())


def show_advice(advice: Advice, num_shown: int, console: Console) -> None:
    """Exits, predictions, sets of exits."""
    exits = narrow_table(
        "exit", "says as\nfull depth", "confidence", "when\nright", "when\nwrong", "told\napart", "ppl"
    )
    for one in advice.exits:
        figures = (one.mean_confidence, one.confidence_when_right, one.confidence_when_wrong, one.separation)
        exits.add_row(
            str(one.layer),
            f"{one.agreement:.3f}",
            *(number(value, "{:.3f}") for value in figures),
            quality_cells(one.perplexity, 1.0)[0],
        )
    console.print(exits)
    console.print(
        f"suitability {advice.suitability:.3f}: the share of the layers that an oracle over these exits "
        "would save",
        highlight=False,
    )
    checked = narrow_table("threshold", "catch-up", "depth", "predicted", "measured", "error")
    for row in advice.predictions:
        speeds = (f"{row.predicted_speedup:.2f}x", f"{row.measured_speedup:.2f}x", f"{row.error:+.1%}")
        checked.add_row(str(row.threshold), row.catch_up, f"{row.mean_depth:.2f}", *speeds)
    console.print(checked)
    best = narrow_table("exits", "threshold", "unlike", "depth", "predicted", "oracle\ndepth", "oracle")
    for place in advice.placements[:num_shown]:
        speeds = (
            f"{place.predicted_speedup:.2f}x",
            f"{place.oracle_mean_depth:.2f}",
            f"{place.oracle_speedup:.2f}x",
        )
        depth = (number(place.threshold, "{:.3f}"), f"{place.disagreement:.3f}", f"{place.mean_depth:.2f}")
        best.add_row(",".join(map(str, place.exits)), *depth, *speeds)
    console.print(best)
    fastest = advice.placements[0]
    if fastest.threshold is None or fastest.predicted_speedup <= 1.0:
        verdict = (
            f"no set of these exits is predicted to be faster than full depth with {advice.tolerance:g} of "
            "the tokens unlike it"
        )
    else:
        verdict = (
            f"best: exits after {','.join(map(str, fastest.exits))} at {fastest.threshold:g}; ease-eval "
            "calibrate gives a guarantee"
        )
    console.print(verdict, highlight=False)


def number(value: float | None, form: str) -> str:
    """A figure, or a dash."""
    return "–" if value is None else form.format(value)
