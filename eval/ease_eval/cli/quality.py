"""The commands of ease-eval about what is said: calibrate, agreement, tasks, lm-eval."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ease_common.commands import given_flags
from ease_common.errors import RequestError
from ease_common.files import write_whole
from ease_common.lists import FiniteFloat
from ease_common.progress import told
from ease_eval.cli.measure import PARSE_SPECIAL, POLICY_FLAG
from ease_eval.journal import Journal
from ease_eval.measure.agreement import compare, read_prompts
from ease_eval.measure.calibrate import RISKS, Certificate, write_certificate
from ease_eval.measure.calibrate import calibrate as run_calibration
from ease_eval.provenance import provenance
from ease_eval.results import as_json
from ease_eval.tasks.grading import FILTERS
from ease_eval.tasks.task_files import ExactMatch, TaskFile, read_tasks
from ease_eval.tasks.tasks import SEED, TaskResult, run_task
from ease_runtime.bundle.manifest import MANIFEST_FILE
from ease_runtime.cli.commands import DEVICE_FLAG, EXACT_FLAG, BundleName
from ease_runtime.cli.flags import option_flags, read_flags
from ease_runtime.cli.show import drafts_line
from ease_runtime.engine.engine import UP_TO_ROUNDING
from ease_runtime.engine.sequence import DraftCount
from ease_runtime.generation import add_drafts
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_train.data.corpora import load_documents, sum_of

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", default="kjv", show_default=True, help="A corpus, as for table.")
@click.option(
    "--split",
    default="validation",
    show_default=True,
    help="Documents to calibrate on; not those of the table.",
)
@PARSE_SPECIAL
@click.option(
    "--delta", type=FiniteFloat(), default=0.05, show_default=True, help="The risk to hold, in (0, 1)."
)
@click.option(
    "--epsilon",
    type=FiniteFloat(),
    default=0.05,
    show_default=True,
    help="The chance to be wrong about that.",
)
@click.option(
    "--risk",
    default="disagreement",
    show_default=True,
    help=f"{' or '.join(RISKS)}: tokens said differently, or nats lost a token.",
)
@POLICY_FLAG
@click.option("--catch-up", default="recompute", show_default=True, help="propagate or recompute.")
@click.option(
    "--documents",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Documents at most; a third fits candidates, the others test them.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Tokens of each document at most.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Of the division into documents to fit and to test."
)
@click.option("--dry-run", is_flag=True, help="Only show it; leave the bundle as it is.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the certificate here, too.",
)
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
@DEVICE_FLAG
def calibrate(
    bundle: Path,
    data: str,
    split: str,
    parse_special: bool,
    delta: float,
    epsilon: float,
    risk: str,
    policy: str,
    catch_up: str,
    documents: int,
    tokens: int,
    seed: int,
    dry_run: bool,
    json_file: Path | None,
    threads: int,
    device: str,
) -> None:
    """Find thresholds that hold a tolerance with a guarantee, and write them into the bundle."""
    llm = LLM(bundle, device=device, num_threads=threads)
    length = min(tokens, llm.stack.max_positions)
    corpus = load_documents(data, split)
    texts = corpus[:documents]
    encoded = [
        ids[: length + 1]
        for text in texts
        if len(ids := llm.encode_text(text, parse_special=parse_special)) > 1
    ]
    certificate = run_calibration(
        llm.engine,
        encoded,
        policy=policy,
        catch_up=catch_up,
        risk=risk,
        delta=delta,
        epsilon=epsilon,
        data=data,
        split=split,
        seed=seed,
        each=told,
    )
    certificate = replace(certificate, data_sha256=sum_of(corpus))
    if json_file:
        write_whole(json_file, json.dumps(as_json(certificate), indent=2) + "\n")
    show_certificate(certificate, Console())
    if not dry_run:
        write_certificate(bundle, certificate)
        click.echo(f"written into {bundle / MANIFEST_FILE}: used where no threshold is given")


def show_certificate(certificate: Certificate, console: Console) -> None:
    """The candidates tested, in order, and what they allow to promise."""
    shown = RichTable(
        title=f"{certificate.risk} on {certificate.data} ({certificate.split})",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for column in ("thresholds", "risk", "p-value", "mean depth", ""):
        shown.add_column(column, justify="right")
    for candidate in certificate.tested:
        verdict = "holds" if candidate.p_value <= certificate.epsilon else "not shown"
        shown.add_row(
            str(candidate.thresholds),
            f"{candidate.risk:.4f}",
            f"{candidate.p_value:.2g}",
            f"{candidate.mean_depth:.2f}",
            verdict,
        )
    console.print(shown)
    if certificate.thresholds is not None:
        console.print(
            f"{certificate.risk} is at most {certificate.delta:g} with probability "
            f"{1 - certificate.epsilon:g} over the choice of "
            f"{certificate.num_test_documents} documents like these",
            highlight=False,
        )


@click.command()
@click.argument("bundle", type=BundleName())
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="A text file, one a line, or .jsonl (also .gz).",
)
@click.option("--limit", default=50, show_default=True, help="Prompts at most.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure here."
)
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
@DEVICE_FLAG
@option_flags(without=("n", "logprobs"))
def agreement(
    bundle: Path, prompts: Path, limit: int, json_file: Path | None, threads: int, device: str, **flags: Any
) -> None:
    """Compare what early exits say with what full depth says, prompt by prompt.

    Exit code 1 when verify differs.
    """
    options = read_flags(flags)
    llm = LLM(bundle, device=device, num_threads=threads, exact=True)
    texts = read_prompts(prompts, limit)
    llm.check(llm.prepare(options))
    if not llm.drafts_or_leaves(options):
        raise RequestError(
            "no token leaves early or is drafted: both sides would be full depth; give a threshold "
            "(--threshold 0.7) or a drafter (--draft ngram)"
        )
    found = compare(llm, texts, options)
    if json_file:
        write_whole(json_file, json.dumps([asdict(one) for one in found], indent=2) + "\n")
    same = sum(one.first_difference is None for one in found)
    click.echo(
        f"{same} of {len(found)} texts are those of full depth; mean ROUGE-L "
        f"{sum(o.rouge_l for o in found) / len(found):.3f}"
    )
    for one in found:
        if one.first_difference is not None:
            click.echo(f"  parts at token {one.first_difference} of {one.num_tokens}: {one.prompt[:60]!r}")
    drafts: dict[str, DraftCount] = {}
    for one in found:
        add_drafts(drafts, one.drafters)
    if drafts:
        click.echo(drafts_line(drafts, sum(one.num_tokens for one in found)))
    verify = llm.prepare(options).catch_up == "verify"
    if verify and not llm.stack.exact:
        click.echo(UP_TO_ROUNDING)
    if verify and same < len(found):
        raise RequestError(f"verify differs from full depth on {len(found) - same} of {len(found)} prompts")


@click.command()
@click.argument("bundle", type=BundleName())
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--limit", default=1000, show_default=True, help="Items of each file at most.")
@click.option(
    "--shots",
    default=0,
    show_default=True,
    help="The first items of a file, solved, stand before each of the others.",
)
@click.option("--chat", is_flag=True, help="Ask in the bundle's chat template, where an answer is generated.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Every figure and answer; a killed run goes on.",
)
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
@DEVICE_FLAG
@EXACT_FLAG
@option_flags(without=("n", "logprobs"))
def tasks(
    bundle: Path,
    files: tuple[Path, ...],
    limit: int,
    shots: int,
    chat: bool,
    json_file: Path | None,
    threads: int,
    device: str,
    exact: bool,
    **flags: Any,
) -> None:
    """Answer local task files through the exit policy, beside full depth: multiple choice, exact match, last
    word.

    A line is a JSON object: "question" (or "context"), "choices" and "answer"; "question" and an "answer"
    that ends in "#### 42"; or a "text" whose last word is asked. A line that is none of these is named and
    left out.
    """
    options = read_flags(flags)
    found = [read_tasks(file, limit) for file in dict.fromkeys(files)]
    for fault in (fault for task in found for fault in task.faults):
        click.echo(f"warning: {fault}; left out", err=True)
    llm = LLM(bundle, device=device, num_threads=threads, exact=exact)
    asked = {
        **provenance(bundle, llm, threads),
        "options": as_json(options),
        "shots": shots,
        "chat": chat,
        "limit": limit,
        "seed": SEED,
    }
    asked["filters"] = FILTERS
    for note in without_effect(found, options, chat):
        click.echo(f"note: {note}", err=True)
    with Journal(json_file, asked, told) as journal:
        if journal.num_read:
            click.echo(f"{journal.num_read} answers are there from a run before", err=True)
        results = [run_task(llm, task, options, journal, shots, chat) for task in found]
        if json_file:
            write_whole(
                json_file,
                json.dumps({**asked, "tasks": [asdict(result) for result in results]}, indent=2) + "\n",
            )
    for fault in (
        fault
        for task, result in zip(found, results, strict=True)
        for fault in result.faults[len(task.faults) :]
    ):
        click.echo(f"warning: {fault}; left out", err=True)
    show_tasks(results, llm.stack.exit_layers[-1], Console())
    for note in llm.notes(llm.prepare(options)):
        click.echo(note)


def without_effect(tasks: list[TaskFile], options: Options, chat: bool) -> list[str]:
    """What to tell of flags that change nothing in the answers to some task files."""
    kinds = {type(task.items[0]) for task in tasks}
    notes = []
    if ExactMatch not in kinds:
        of_answers = given_flags("max_tokens", "stop", *SAMPLING, *(["chat"] if chat else []))
        notes = [
            f"{flag} has no effect: these files ask for likelihoods, and nothing is generated"
            for flag in of_answers
        ]
    if options.catch_up == "verify" and kinds - {ExactMatch}:
        notes.append(
            "verify says what full depth says: likelihoods under it are full depth's, and nothing is "
            "measured for it"
        )
    return notes


def show_tasks(results: list[TaskResult], num_layers: int, console: Console) -> None:
    """A line a file."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in ("file", "kind", "items", "right", "95 %", "full depth", "agree", f"depth/{num_layers}"):
        shown.add_column(column, justify="left" if column in ("file", "kind") else "right")
    for one in results:
        low, high = one.accuracy_interval
        figures = (
            f"{one.accuracy:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{one.full_depth_accuracy:.3f}",
            f"{one.agreement:.3f}",
        )
        shown.add_row(Path(one.file).name, one.kind, str(one.num_items), *figures, f"{one.mean_depth:.2f}")
    console.print(shown)
    for one in results:
        if one.filters:
            console.print(
                f"{Path(one.file).name}: answers found by {' and '.join(one.filters)} (lm_eval's gsm8k)",
                highlight=False,
            )
        if one.strict_accuracy is not None:
            strict = (
                f"by strict-match {one.strict_accuracy:.3f} are right, {one.full_depth_strict_accuracy:.3f} "
                "at full depth"
            )
            console.print(f"{Path(one.file).name}: {strict}", highlight=False)


@click.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """EleutherAI's lm_eval with bundles as its model "ease"; takes what lm_eval takes.

    \b
    ease-eval lm-eval run --model ease --model_args bundle=BUNDLE,threshold=0.7 \\
        --tasks lambada_openai

    In model_args, an exit each has thresholds like off/0.7; what else stands there are options of ease-run
    generate.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import ease_eval.tasks.harness  # noqa: F401  (it registers the model)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{error.name} is not installed; install: pip install 'ease-lm[lm-eval]'"
        ) from None
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
