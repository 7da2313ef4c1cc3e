"""The commands of ease-eval that measure a bundle on a corpus: table, ppl, depth, latency, report."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ease_common.commands import given_flags
from ease_common.errors import RequestError
from ease_common.files import write_whole
from ease_common.lists import list_of
from ease_common.progress import told
from ease_eval.journal import Journal
from ease_eval.measure.documents import Document, first_tokens
from ease_eval.measure.latency import Setting
from ease_eval.measure.table import (
    SEED,
    Amounts,
    Quality,
    SettingName,
    Speed,
    Table,
    batch_cells,
    choose_texts,
    make_settings,
    make_table,
    measure_quality,
    measure_speed,
    quality_cells,
)
from ease_eval.provenance import provenance
from ease_eval.results import as_json
from ease_runtime.cli.commands import DEVICE_FLAG, EXACT_FLAG, BundleName, ThresholdFlag, ThresholdRows
from ease_runtime.engine.engine import CATCH_UPS
from ease_runtime.llm import LLM
from ease_runtime.policies import POLICIES
from ease_runtime.policies.thresholds import Thresholds
from ease_train.data.corpora import SOURCES, load_documents, sum_of

# COLUMNS of the table for a terminal of 80 columns
NARROW_COLUMNS = (
    "at",
    "catch-up",
    "ppl",
    "vs off",
    "depth",
    "tok/s",
    "p50\nms",
    "p95\nms",
    "speed\n-up",
    "ideal",
    "of\nideal",
)

REPORT_DOCUMENTS = 24  # whose beginnings, of --scored-tokens together, reliability is drawn from
PASSAGE_LEAST = 32  # tokens of a document that the passage may begin with

PARSE_SPECIAL = click.option(
    "--parse-special",
    is_flag=True,
    help="Special tokens written in the documents are real ones (chats); otherwise they are text.",
)


def refuse_fixed(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The policy of a command that sets thresholds. Raises RequestError for the one that has none."""
    if value == "fixed":
        raise RequestError(
            "policy 'fixed' has no thresholds to measure; try it: ease-run generate --policy fixed "
            "--exit LAYER"
        )
    return value


THRESHOLD_POLICIES = tuple(name for name in POLICIES if name != "fixed")
POLICY_FLAG = click.option(
    "--policy",
    default="max-prob",
    show_default=True,
    callback=refuse_fixed,
    help=f"What confidence is: {', '.join(THRESHOLD_POLICIES)}, or your own module:Class.",
)
MEASURE_FLAGS = (
    click.option("--data", default="kjv", show_default=True, help=SOURCES),
    click.option("--split", default="test", show_default=True, help="train, validation or test."),
    PARSE_SPECIAL,
    POLICY_FLAG,
    click.option(
        "--thresholds",
        type=ThresholdRows(),
        multiple=True,
        default=("0.5,0.7,0.9",),
        show_default=True,
        help="A row each; each for every early exit.",
    ),
    click.option(
        "--exit-thresholds",
        type=ThresholdFlag(),
        multiple=True,
        help="One more row: a threshold an exit, like off,0.5; may be repeated.",
    ),
    click.option(
        "--catch-up",
        "catch_ups",
        **list_of(click.STRING, "NAME[,NAME...]"),
        default=("recompute",),
        show_default=True,
        help=f"{' or '.join(CATCH_UPS)}; may be repeated.",
    ),
    click.option(
        "--scored-tokens",
        default=Amounts.scored_tokens,
        show_default=True,
        help="Tokens whose perplexity is measured.",
    ),
    click.option(
        "--texts",
        default=Amounts.num_texts,
        show_default=True,
        help="Documents that are decoded for the clock.",
    ),
    click.option(
        "--prompt-tokens",
        default=Amounts.prompt_tokens,
        show_default=True,
        help="Tokens of each text's prompt.",
    ),
    click.option(
        "--new-tokens",
        default=Amounts.new_tokens,
        show_default=True,
        help="Tokens decoded after each prompt.",
    ),
    click.option(
        "--rounds", default=Amounts.num_rounds, show_default=True, help="Timed rounds, after one to warm up."
    ),
    click.option("--threads", default=0, help="CPU threads; 0 takes all."),
    DEVICE_FLAG,
    EXACT_FLAG,
)


JSON_FLAG = click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure here."
)


def measure_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is measured, and how much of it: the arguments of `Measurement.of`."""
    for flag in reversed(MEASURE_FLAGS):
        command = flag(command)
    return command


@dataclass(frozen=True)
class Measurement:
    """A bundle, a corpus's documents with its ids, and what is to be measured of them."""

    bundle: Path
    llm: LLM
    documents: list[Document]
    data: str
    split: str
    policy: str
    thresholds: list[Thresholds]
    catch_ups: tuple[str, ...]
    amounts: Amounts
    threads: int
    device: str
    exact: bool
    data_sha256: str  # of the split's documents, all of them

    @classmethod
    def of(
        cls,
        bundle: Path,
        *,
        data: str,
        split: str,
        parse_special: bool,
        policy: str,
        thresholds: tuple[tuple[Thresholds, ...], ...],
        exit_thresholds: tuple[Thresholds, ...],
        catch_ups: tuple[str, ...],
        scored_tokens: int,
        texts: int,
        prompt_tokens: int,
        new_tokens: int,
        rounds: int,
        threads: int,
        device: str,
        exact: bool,
    ) -> "Measurement":
        """From the flags of a command."""
        amounts = Amounts(scored_tokens, texts, prompt_tokens, new_tokens, rounds)
        llm = LLM(bundle, device=device, num_threads=threads, exact=exact)
        corpus = load_documents(data, split)
        documents = [Document.of(llm, text, parse_special=parse_special) for text in corpus]
        rows = [
            row for row in (*chain.from_iterable(thresholds), *exit_thresholds) if row
        ]  # off is always the first row
        if not all(exit_thresholds):
            raise RequestError("--exit-thresholds with off alone asks no exit; off is always the first row")
        if len(llm.stack.exit_layers) == 1:
            click.echo("note: this bundle has no early exit: full depth alone is measured", err=True)
        return cls(
            bundle=bundle,
            llm=llm,
            documents=documents,
            data=data,
            split=split,
            policy=policy,
            thresholds=rows,
            catch_ups=catch_ups,
            amounts=amounts,
            threads=threads,
            device=device,
            exact=exact,
            data_sha256=sum_of(corpus),
        )

    @property
    def num_documents(self) -> int:
        """Of the split, all of them."""
        return len(self.documents)

    @property
    def encoded(self) -> list[Sequence[int]]:
        """The documents' ids."""
        return [document.ids for document in self.documents]

    @property
    def source(self) -> dict[str, Any]:
        """Where figures come from, and what was asked for, as JSON has it."""
        names = ("data", "data_sha256", "num_documents", "split", "policy", "thresholds", "catch_ups")
        asked = {name: as_json(getattr(self, name)) for name in names}
        return {
            **provenance(self.bundle, self.llm, self.threads),
            **asked,
            "amounts": asdict(self.amounts),
            "seed": SEED,
        }

    def table(
        self,
        journal: Journal | None = None,
        batches: Sequence[int] = (),
        beside: Mapping[Path, LLM] | None = None,
    ) -> Table:
        """Everything."""
        return make_table(
            self.bundle,
            self.llm,
            self.documents,
            source=self.data,
            data_sha256=self.data_sha256,
            split=self.split,
            policy=self.policy,
            thresholds=self.thresholds,
            catch_ups=self.catch_ups,
            amounts=self.amounts,
            num_threads=self.threads,
            batches=batches,
            journal=journal,
            beside=beside,
        )

    def beside(self, path: Path) -> LLM:
        """Another bundle, loaded as this one is."""
        return LLM(path, device=self.device, num_threads=self.threads, exact=self.exact)

    def settings(self) -> list[Setting]:
        """Off and what was asked for. Raises RequestError where this bundle cannot run it."""
        settings = make_settings(self.policy, self.thresholds, self.catch_ups, self.llm.stack.exit_layers)
        for setting in settings:
            self.llm.engine.check(setting.policy, setting.catch_up)
        return settings

    def qualities(self) -> list[Quality]:
        """What is said, without the clock."""
        documents = list(first_tokens(self.documents, self.amounts.scored_tokens))
        return measure_quality(self.llm, documents, self.settings(), Journal(None, {}, told))


BATCH_FLAG = click.option(
    "--batch", "batches", **list_of(click.INT, "N[,N...]"), help="Also decode this many texts at once."
)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=BundleName())
@measure_flags
@BATCH_FLAG
@click.option(
    "--beside",
    type=BundleName(),
    multiple=True,
    help="A row for this bundle, say of a plain smaller model: full depth, in the same rounds; repeatable.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every figure here; a killed run goes on.",
)
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table here.",
)
def table(
    bundles: tuple[Path, ...],
    batches: tuple[int, ...],
    beside: tuple[Path, ...],
    json_file: Path | None,
    markdown_file: Path | None,
    **given: Any,
) -> None:
    """Perplexity, depth and real speed for each threshold, off first.

    Several bundles, say of one model in several precisions, give a table each; the JSON is then {"tables":
    [...]}.
    """
    tables: list[Table] = []
    with ExitStack() as open_journals:
        for bundle in bundles:
            measurement = Measurement.of(bundle, **given)
            others = {path: measurement.beside(path) for path in beside}
            part = (
                json_file and json_file.with_name(f"{json_file.name}.{len(tables)}")
                if len(bundles) > 1
                else json_file
            )
            journal = open_journals.enter_context(
                Journal(
                    part, measurement.source | {"batches": batches, "beside": list(map(str, beside))}, told
                )
            )
            if journal.num_read:
                click.echo(f"{journal.num_read} parts of {bundle} are there from a run before", err=True)
            tables.append(measurement.table(journal, batches, others))
            warn_of_unknown(tables[-1].rows[0])
            render(tables[-1], Console())
        whole = (
            tables[0].to_json()
            if len(tables) == 1
            else json.dumps({"tables": [as_json(one) for one in tables]}, indent=2) + "\n"
        )
        for file, text in ((json_file, whole), (markdown_file, "\n".join(one.markdown() for one in tables))):
            if file:
                write_whole(file, text)


@click.command()
@click.argument("bundle", type=BundleName())
@measure_flags
@JSON_FLAG
def ppl(bundle: Path, json_file: Path | None, **given: Any) -> None:
    """Perplexity under each threshold, off first, without the clock."""
    note_unused("texts", "prompt_tokens", "new_tokens", "rounds")
    if "verify" in given["catch_ups"]:
        click.echo(
            "note: verify says what full depth says: its perplexity is off's, and nothing is measured for it",
            err=True,
        )
    measurement = Measurement.of(bundle, **given)
    rows = measurement.qualities()
    warn_of_unknown(rows[0])
    write_rows(measurement, rows, json_file)
    shown = narrow_table("at", "catch-up", "ppl", "vs off", "95 %", "bits/byte", "depth")
    for row in rows:
        low, high = (quality_cells(row.ppl, ratio)[1].removesuffix(" %") for ratio in row.ppl_ratio_interval)
        figures = (
            *quality_cells(row.ppl, row.ppl_ratio),
            f"{low}..{high}",
            f"{row.bits_per_byte:.3f}",
            f"{row.mean_depth:.2f}",
        )
        shown.add_row(*label(row), *figures)
    Console().print(shown)


@click.command()
@click.argument("bundle", type=BundleName())
@measure_flags
@JSON_FLAG
def depth(bundle: Path, json_file: Path | None, **given: Any) -> None:
    """How deep tokens go under each threshold: mean, shares, and along a text."""
    note_unused("texts", "prompt_tokens", "new_tokens", "rounds")
    if "verify" in given["catch_ups"]:
        raise RequestError(
            "the depths of verify are those of its drafts, which are decoded, not scored: ease-eval "
            "latency or table"
        )
    measurement = Measurement.of(bundle, **given)
    rows = measurement.qualities()
    write_rows(measurement, rows, json_file)
    layers = measurement.llm.stack.exit_layers
    shown = narrow_table(
        "at", "catch-up", "depth", *(f"layer {layer}" for layer in layers), "first\nhalf", "second\nhalf"
    )
    for row in rows:
        total = sum(row.depth_counts.values())
        half = max(1, len(row.depth_by_position) // 2)
        shares = (f"{100 * row.depth_counts.get(layer, 0) / total:.1f} %" for layer in layers)
        halves = (row.depth_by_position[:half], row.depth_by_position[half:] or row.depth_by_position)
        shown.add_row(
            *label(row),
            f"{row.mean_depth:.2f}",
            *shares,
            *(f"{sum(part) / len(part):.2f}" for part in halves),
        )
    Console().print(shown)


@click.command()
@click.argument("bundle", type=BundleName())
@measure_flags
@JSON_FLAG
def latency(bundle: Path, json_file: Path | None, **given: Any) -> None:
    """What tokens take under each threshold on the wall clock, prefill and decoding apart."""
    note_unused("scored_tokens")
    measurement = Measurement.of(bundle, **given)
    settings = measurement.settings()
    amounts = measurement.amounts
    texts = choose_texts(measurement.encoded, amounts, measurement.llm.stack.max_positions)
    found, _ = measure_speed(measurement.llm, settings, texts, amounts.num_rounds, Journal(None, {}, told))
    rows = [
        TimedSetting(s.policy.name, s.policy.thresholds, s.catch_up, **vars(speed))
        for s, (speed, _) in zip(settings, found, strict=True)
    ]
    write_rows(measurement, rows, json_file)
    shown = narrow_table(
        "at", "catch-up", "tok/s", "p50\nms", "p95\nms", "p99\nms", "prefill\nms", "speed\n-up", "depth"
    )
    for row in rows:
        times = (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99, row.prefill_ms_p50)
        figures = (
            f"{row.tokens_per_second:.0f}",
            *(f"{value:.2f}" for value in times),
            f"{row.speedup:.2f}x",
            f"{row.decoded_mean_depth:.2f}",
        )
        shown.add_row(*label(row), *figures)
    Console().print(shown)


@dataclass(frozen=True)
class TimedSetting(Speed, SettingName):
    """A row of `latency`."""


def note_unused(*names: str) -> None:
    """Say of flags that were given what the running command does not measure."""
    for flag in given_flags(*names):
        click.echo(f"note: {flag} has no effect on {click.get_current_context().info_name}", err=True)


def write_rows(
    measurement: Measurement, rows: Sequence[Quality | TimedSetting], json_file: Path | None
) -> None:
    """A command's rows as JSON, with where they come from."""
    if json_file:
        write_whole(
            json_file,
            json.dumps({**measurement.source, "rows": [as_json(row) for row in rows]}, indent=2) + "\n",
        )


def warn_of_unknown(off: Quality) -> None:
    """Say that the text has characters which the tokenizer does not know, where it has."""
    if off.unknown_share:
        text = (
            f"{off.unknown_share:.1%} of the scored tokens stand for characters that this tokenizer does not "
            "know"
        )
        click.echo(
            f"warning: {text}: perplexity counts them as any other token; bits a byte are over the bytes "
            "of the text",
            err=True,
        )


def label(row: Quality | TimedSetting) -> tuple[str, str]:
    """A row's threshold and catch-up."""
    if not row.threshold:
        return "off", "–"
    return str(row.threshold), row.catch_up


def narrow_table(*columns: str, title: str | None = None) -> RichTable:
    """An empty table, figures to the right."""
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    return shown


@click.command()
@click.argument("bundle", type=BundleName())
@measure_flags
@BATCH_FLAG
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The HTML file; figures go to a folder of its name.",
)
def report(bundle: Path, out: Path, batches: tuple[int, ...], **given: Any) -> None:
    """Measure as table does, and write one HTML file: figures, tables, a passage coloured by depth, the
    bundle's certificate.
    """
    from ease_eval.measure.report import make_report  # matplotlib takes a second to import

    if not out.suffix or out.with_suffix("").is_file():
        raise RequestError(
            f"the figures of {out} would go to a folder {out.with_suffix('')}; give a free name that "
            "ends in .html"
        )
    measurement = Measurement.of(bundle, **given)
    long_enough = [ids for ids in measurement.encoded if len(ids) > PASSAGE_LEAST][:REPORT_DOCUMENTS]
    if not long_enough:
        raise RequestError(
            f"no document has more than {PASSAGE_LEAST} tokens to show a passage of; give longer ones: --data"
        )
    result = measurement.table(Journal(None, {}, told), batches)
    warn_of_unknown(result.rows[0])
    share = max(PASSAGE_LEAST, measurement.amounts.scored_tokens // len(long_enough))
    beginnings = [ids[: share + 1] for ids in long_enough]
    write_whole(out, make_report(measurement.llm, result, beginnings, out))
    click.echo(f"{out}: written, with its figures in {out.with_suffix('')}")


def render(result: Table, console: Console) -> None:
    """The table on the terminal, narrow enough for 80 columns."""
    policy = result.rows[0].policy
    shown = narrow_table(
        *NARROW_COLUMNS, title=f"{result.bundle} on {result.data} ({result.split}), {policy}"
    )
    for texts in result.cells():
        shown.add_row(*(text.removeprefix(f"{policy} ") for text in texts))
    console.print(shown)
    if result.batches:
        together = narrow_table("batch", "at", "catch-up", "tok/s", "speed-up")
        for one in result.batches:
            together.add_row(*batch_cells(one))
        console.print(together)
