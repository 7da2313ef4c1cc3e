"""The table: for each setting, off first, what it costs in perplexity and saves in time.

table = make_table(bundle, llm, documents, source="kjv", split="test", thresholds=[0.5, 0.7, 0.9],
catch_ups=["recompute"]) print(table.markdown())
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError
from ease_common.progress import Each, silently
from ease_eval.journal import Journal
from ease_eval.measure.documents import Document, coverage, first_tokens
from ease_eval.measure.latency import Setting, Text, Timings, ideal_seconds, measure, time_batches
from ease_eval.measure.perplexity import Scores, record_exits, score_documents
from ease_eval.measure.weights import bytes_read
from ease_eval.provenance import provenance
from ease_eval.results import as_json
from ease_runtime.bundle.manifest import MANIFEST_FILE, sha256_of
from ease_runtime.engine.engine import CATCH_UPS
from ease_runtime.engine.layout import Call, SegmentShape
from ease_runtime.llm import LLM
from ease_runtime.policies import ThresholdPolicy, make_policy
from ease_runtime.policies.thresholds import OFF, Thresholds

SEED = 0  # of the bootstrap
POSITION_BIN = 16
HEAD_GRAPHS = ("exit", "gate", "block", "similarity")  # what an exit costs beside the layers before it
EXIT_TOKENS = 4000  # that every exit is asked about, for the bounds


@dataclass(frozen=True)
class SettingName:
    """Which setting a row is about."""

    policy: str
    threshold: Thresholds
    catch_up: str


@dataclass(frozen=True)
class Quality(SettingName):
    """What one setting says of the scored tokens.

    What `verify` says is what off says: its perplexity is off's; in a table its depths are those of the
    decoded tokens.
    """

    ppl: float
    mean_depth: float
    depth_fraction: float
    ppl_ratio: float  # against off
    ppl_ratio_interval: tuple[float, float]  # 95 %, bootstrap over documents, off's and this row's together
    bits_per_byte: float  # of the scored text itself, not of what its tokens decode to
    unknown_share: float  # of the scored tokens: those for characters that the tokenizer does not know
    depth_counts: dict[int, int]  # tokens by depth
    depth_by_position: list[
        float
    ]  # mean depth of each POSITION_BIN positions of the documents, up to the context


@dataclass(frozen=True)
class Pace:
    """What the decoded tokens take: medians over rounds."""

    tokens_per_second: float
    latency_ms_p50: float
    latency_ms_p95: float
    speedup: float  # measured, against off in the same rounds
    speedup_range: tuple[float, float]  # smallest and largest over the rounds


@dataclass(frozen=True)
class Speed(Pace):
    """What one setting takes for the decoded tokens, and where that time goes."""

    gb_per_second: float  # of weights that the row's calls read
    latency_ms_p99: float
    ideal_speedup: float  # from separately timed graph calls, off's over this row's
    measured_over_ideal: float  # speedup / ideal_speedup
    engine_efficiency: float  # ideal seconds of the row's own calls / its measured seconds
    head_share: float  # of those ideal seconds: exits and heads, with their gates and layers of their own
    prefill_ms_p50: float
    prefill_ms_p95: float
    decoded_mean_depth: float  # of the tokens that were timed
    layers_run: float  # by a decoded token: those of pending and of rejected ones count too
    drafted: int  # verify: drafts that full depth judged
    accepted: int


@dataclass(frozen=True)
class TableRow(Speed, Quality):
    """One setting: quality over the scored tokens, times over the decoded ones."""


@dataclass(frozen=True)
class ExitQuality:
    """What one exit says of every token, had all come that far: bounds that no policy over these exits can
    leave.
    """

    layer: int
    ppl: float
    agreement: float  # share of the tokens that full depth would say the same


@dataclass(frozen=True)
class BesideRow(Pace):
    """Another bundle with the same tokenizer, a plain smaller model say, at full depth on the same text and
    in the same rounds; its ratios are against the table's bundle at full depth.
    """

    bundle: str
    manifest_sha256: str
    num_layers: int
    ppl: float
    ppl_ratio: float
    ppl_ratio_interval: tuple[float, float]  # 95 %, bootstrap over documents


@dataclass(frozen=True)
class BatchFigures:
    """One setting over several texts at once, each row of the batch at its own depth."""

    batch: int
    threshold: Thresholds
    catch_up: str
    tokens_per_second: float  # of all texts together
    speedup: float  # against off at the same batch, median over rounds
    speedup_range: tuple[float, float]


@dataclass(frozen=True)
class Table:
    """All rows, and what they were measured on."""

    bundle: str
    manifest_sha256: str
    data: str
    split: str
    device: str
    num_threads: int
    num_scored_tokens: int
    num_decoded_tokens: int
    num_rounds: int
    source: dict[str, Any]
    versions: dict[str, str]
    exits: tuple[ExitQuality, ...]
    oracle_mean_depth: float  # had each token left at the first exit that says what full depth says
    precision: str
    seed: int  # of the bootstrap
    position_bin: int
    peak_memory_mb: float | None  # of the process, with the text's tokens and all
    batches: tuple[BatchFigures, ...]
    rows: tuple[TableRow, ...]
    data_sha256: str = ""  # of the split's documents, where it is known
    num_documents: int = 0  # of the split
    beside: tuple[BesideRow, ...] = ()
    exact: bool = False  # whether off, too, ran so that passes of one and of several tokens give equal bits

    def to_json(self) -> str:
        """The table as JSON text, every figure unrounded."""
        return json.dumps(as_json(self), indent=2) + "\n"

    def cells(self) -> list[list[str]]:
        """Every row as the texts of COLUMNS, those beside last."""
        return [*map(cells, self.rows), *map(beside_cells, self.beside)]

    def markdown(self) -> str:
        """The table as Markdown, with a line on what was measured."""
        lines = [
            f"{self.data} ({self.split}), {self.num_scored_tokens} tokens scored, "
            f"{self.num_decoded_tokens} decoded in each of "
            f"{self.num_rounds} rounds, {self.device}, threads: {self.num_threads or 'all'}.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---:|" * len(COLUMNS),
        ]
        lines += ["| " + " | ".join(texts) + " |" for texts in self.cells()]
        return "\n".join(lines) + "\n"


COLUMNS = (
    "threshold",
    "catch-up",
    "perplexity",
    "vs off",
    "mean depth",
    "tokens/s",
    "p50 ms",
    "p95 ms",
    "speed-up",
    "ideal",
    "measured/ideal",
)


def quality_cells(ppl: float, ppl_ratio: float) -> tuple[str, str]:
    """Perplexity, and its change; as powers of ten where a reduced head met tokens that it cannot say."""
    if ppl >= 1e6:
        return f"{ppl:.0e}", f"{(ppl_ratio - 1) * 100:+.0e} %"
    return f"{ppl:.2f}", f"{(ppl_ratio - 1) * 100:+.1f} %"


def cells(row: TableRow) -> list[str]:
    """A row as the texts of COLUMNS."""
    threshold = f"{row.policy} {row.threshold}" if row.threshold else "off"
    return [
        threshold,
        row.catch_up if row.threshold else "–",
        *quality_cells(row.ppl, row.ppl_ratio),
        f"{row.mean_depth:.2f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.latency_ms_p50:.2f}",
        f"{row.latency_ms_p95:.2f}",
        f"{row.speedup:.2f}x",
        f"{row.ideal_speedup:.2f}x",
        f"{row.measured_over_ideal:.2f}",
    ]


def batch_cells(figures: BatchFigures) -> list[str]:
    """A batch's figures as texts: rows, threshold, catch-up, tokens a second of all, speed-up."""
    return [
        str(figures.batch),
        str(figures.threshold),
        figures.catch_up if figures.threshold else "–",
        f"{figures.tokens_per_second:.0f}",
        f"{figures.speedup:.2f}x ({figures.speedup_range[0]:.2f}–{figures.speedup_range[1]:.2f})",
    ]


def beside_cells(row: BesideRow) -> list[str]:
    """Another bundle's row as the texts of COLUMNS."""
    return [
        f"beside: {Path(row.bundle).name}",
        "–",
        *quality_cells(row.ppl, row.ppl_ratio),
        f"{row.num_layers:.2f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.latency_ms_p50:.2f}",
        f"{row.latency_ms_p95:.2f}",
        f"{row.speedup:.2f}x",
        "–",
        "–",
    ]


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    scored_tokens: int = 20000
    num_texts: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 128
    num_rounds: int = 5

    def __post_init__(self) -> None:
        for name, least in (
            ("scored_tokens", 2),
            ("num_texts", 1),
            ("prompt_tokens", 1),
            ("new_tokens", 2),
            ("num_rounds", 1),
        ):
            if getattr(self, name) < least:
                raise RequestError(f"{name} = {getattr(self, name)}, expected at least {least}")


def make_table(
    bundle: Path,
    llm: LLM,
    documents: Sequence[Document],
    *,
    source: str,
    split: str,
    policy: str | type[ThresholdPolicy] | ThresholdPolicy = "max-prob",
    thresholds: Sequence[Any],
    catch_ups: Sequence[str],
    amounts: Amounts | None = None,
    num_threads: int = 0,
    batches: Sequence[int] = (),
    journal: Journal | None = None,
    data_sha256: str = "",
    beside: Mapping[Path, LLM] | None = None,
) -> Table:
    """Measure a bundle, loaded as `llm`, on a corpus's documents, and the bundles `beside` it at full depth
    in the same rounds. Raises RequestError.

    What a journal has of a run before is not measured again.
    """
    beside = beside or {}
    for path, other in beside.items():
        check_beside(llm, path, other)
    amounts = amounts or Amounts()
    journal = journal or Journal(None, {})
    settings = make_settings(policy, thresholds, catch_ups, llm.stack.exit_layers)
    for setting in settings:
        llm.engine.check(setting.policy, setting.catch_up)
    for batch in batches:
        if batch < 1:
            raise RequestError(f"batch {batch} is below 1")
    scored = list(first_tokens(documents, amounts.scored_tokens))
    texts = choose_texts([document.ids for document in documents], amounts, llm.stack.max_positions)
    qualities = measure_quality(llm, scored, settings, journal)
    speeds, paces = measure_speed(
        llm, settings, texts, amounts.num_rounds, journal, beside=list(beside.values())
    )
    others = measure_beside(beside, scored, qualities[0], journal)
    exits, oracle = journal.once(
        "exits", lambda: exit_figures(llm, [d.ids for d in first_tokens(scored, EXIT_TOKENS)])
    )
    several = []
    for size in batches:
        several += journal.once(
            f"batch {size}",
            partial(measure_batch, llm, settings, texts, amounts.num_rounds, size, journal.each),
        )
    return Table(
        **provenance(bundle, llm, num_threads),
        data=source,
        data_sha256=data_sha256,
        num_documents=len(documents),
        split=split,
        num_scored_tokens=sum(len(document.ids) - 1 for document in scored),
        num_decoded_tokens=len(texts) * (amounts.new_tokens - 1),
        num_rounds=amounts.num_rounds,
        exits=tuple(ExitQuality(**one) for one in exits),
        oracle_mean_depth=oracle,
        seed=SEED,
        position_bin=POSITION_BIN,
        peak_memory_mb=peak_memory_mb(),
        batches=tuple(read_batch(one) for one in several),
        beside=tuple(BesideRow(**vars(pace), **other) for pace, other in zip(paces, others, strict=True)),
        rows=tuple(make_row(*pair) for pair in zip(qualities, speeds, strict=True)),
    )


def read_batch(figures: dict[str, Any]) -> BatchFigures:
    """From what JSON has."""
    return BatchFigures(**ranged(figures) | {"threshold": Thresholds.of(figures["threshold"])})


def make_row(quality: Quality, measured: tuple[Speed, dict[int, int]]) -> TableRow:
    """A row of both; the depths of verify are those of its drafts."""
    speed, decoded = measured
    if quality.catch_up == "verify" and quality.threshold:
        depth = sum(layer * count for layer, count in decoded.items()) / sum(decoded.values())
        fraction = depth * quality.depth_fraction / quality.mean_depth
        quality = replace(
            quality, mean_depth=depth, depth_fraction=fraction, depth_counts=decoded, depth_by_position=[]
        )
    return TableRow(**vars(quality), **vars(speed))


def measure_quality(
    llm: LLM, documents: Sequence[Document], settings: Sequence[Setting], journal: Journal
) -> list[Quality]:
    """Every setting's figures over the documents' tokens; off comes first."""
    encoded = [document.ids for document in documents]
    covered = coverage(llm.tokenizer, documents)
    scored = Scored(encoded, covered.num_bytes, covered.unknown_share)
    found: list[list[Any]] = journal.once(
        "scores", lambda: [s.to_lists() for s in score_settings(llm, encoded, settings, journal.each)]
    )
    scores = [Scores.from_lists(lists) for lists in found]
    return [
        make_quality(s, q, scores[0], scored, llm.stack.max_positions)
        for s, q in zip(settings, scores, strict=True)
    ]


def make_quality(setting: Setting, scores: Scores, off: Scores, scored: "Scored", limit: int) -> Quality:
    """One setting's figures against off's."""
    depths, counts = np.unique(scores.depths, return_counts=True)
    return Quality(
        policy=setting.policy.name,
        threshold=setting.policy.thresholds,
        catch_up=setting.catch_up,
        ppl=scores.perplexity,
        mean_depth=scores.mean_depth,
        depth_fraction=scores.mean_depth / int(off.depths.max()),
        ppl_ratio=scores.perplexity / off.perplexity,
        ppl_ratio_interval=scored.interval(off.logprobs - scores.logprobs),
        bits_per_byte=-float(scores.logprobs.sum()) / math.log(2) / scored.num_bytes,
        unknown_share=scored.unknown_share,
        depth_counts=dict(zip(depths.tolist(), counts.tolist(), strict=True)),
        depth_by_position=scored.by_position(scores.depths, limit),
    )


def check_beside(llm: LLM, path: Path, other: LLM) -> None:
    """Raises RequestError for a bundle whose tokens are not those of `llm`'s."""
    mine, theirs = (one.manifest.files[one.manifest.tokenizer].sha256 for one in (llm, other))
    if mine != theirs:
        raise RequestError(
            f"{path} has another tokenizer, so perplexity a token is not comparable; expected a bundle of a "
            "model trained with the same one: ease-train fit --tokenizer"
        )
    if other.stack.max_positions < llm.stack.max_positions:
        raise RequestError(
            f"{path} has a context of {other.stack.max_positions} tokens, expected at least "
            f"{llm.stack.max_positions}"
        )


def full_depth(llm: LLM) -> Setting:
    """Another bundle's setting off."""
    return Setting(make_policy("max-prob", OFF, llm.stack.exit_layers), "recompute", llm.engine)


def measure_beside(
    beside: Mapping[Path, LLM], documents: Sequence[Document], off: Quality, journal: Journal
) -> list[dict[str, Any]]:
    """What other bundles say of the same tokens at full depth: BesideRow's fields but for the times."""
    encoded = [document.ids for document in documents]
    mine = Scores.from_lists(journal.found["scores"][0])  # what off says: measure_quality has left it there

    def score(other: LLM) -> list[Any]:
        policy = full_depth(other).policy
        (scores,) = score_documents(other.engine, encoded, [policy], "recompute", journal.each)
        return scores.to_lists()

    found = []
    for path, other in beside.items():
        scores = Scores.from_lists(journal.once(f"scores beside {path}", partial(score, other)))
        found.append(
            {
                "bundle": str(path),
                "manifest_sha256": sha256_of(path / MANIFEST_FILE),
                "num_layers": other.stack.exit_layers[-1],
                "ppl": scores.perplexity,
                "ppl_ratio": scores.perplexity / off.ppl,
                "ppl_ratio_interval": Scored(encoded, 0).interval(mine.logprobs - scores.logprobs),
            }
        )
    return found


def measure_speed(
    llm: LLM,
    settings: Sequence[Setting],
    texts: Sequence[Text],
    num_rounds: int,
    journal: Journal,
    beside: Sequence[LLM] = (),
) -> tuple[list[tuple[Speed, dict[int, int]]], list[Pace]]:
    """Every setting's times, and how many of the decoded tokens had each depth, off first; and the times of
    other bundles at full depth.
    """

    def timed() -> list[Any]:
        others = [full_depth(other) for other in beside]
        timings, seconds = measure(llm.engine, [*settings, *others], texts, num_rounds, each=journal.each)
        own, rest = timings[: len(settings)], timings[len(settings) :]
        speeds = [[asdict(make_speed(t, own[0], seconds, llm)), np.array(t.depths).tolist()] for t in own]
        return [speeds, [asdict(make_pace(t, own[0])) for t in rest]]

    speeds, paces = journal.once("times", timed)
    found = []
    for speed, depths in speeds:
        layers, counts = np.unique(depths, return_counts=True)
        found.append((Speed(**ranged(speed)), dict(zip(layers.tolist(), counts.tolist(), strict=True))))
    return found, [Pace(**ranged(pace)) for pace in paces]


def ranged(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON has them, with their range a pair."""
    return figures | {"speedup_range": tuple(figures["speedup_range"])}


def make_pace(timing: Timings, off: Timings) -> Pace:
    """One setting's times against off's."""
    speedups = [a / b for a, b in zip(off.rounds, timing.rounds, strict=True)]
    p50, p95 = np.percentile(np.array(timing.token_seconds) * 1000, (50, 95)).tolist()
    return Pace(
        tokens_per_second=len(timing.depths) / float(np.median(timing.rounds)),
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        speedup=float(np.median(speedups)),
        speedup_range=(min(speedups), max(speedups)),
    )


def make_speed(timing: Timings, off: Timings, call_seconds: dict[Call, float], llm: LLM) -> Speed:
    """One setting's times against off's, and against those of its graph calls."""
    pace = make_pace(timing, off)
    seconds = float(np.median(timing.rounds))
    ideal = ideal_seconds(timing.calls, call_seconds)
    ideal_speedup = ideal_seconds(off.calls, call_seconds) / ideal
    prefill50, prefill95 = np.percentile(np.array(timing.prefills) * 1000, (50, 95)).tolist()
    return Speed(
        **vars(pace),
        gb_per_second=bytes_read(llm.manifest, timing.calls) / 1e9 / seconds,
        latency_ms_p99=float(np.percentile(np.array(timing.token_seconds) * 1000, 99)),
        ideal_speedup=ideal_speedup,
        measured_over_ideal=pace.speedup / ideal_speedup,
        engine_efficiency=ideal / seconds,
        head_share=ideal_seconds([call for call in timing.calls if call.graph in HEAD_GRAPHS], call_seconds)
        / ideal,
        prefill_ms_p50=prefill50,
        prefill_ms_p95=prefill95,
        decoded_mean_depth=float(np.mean(timing.depths)),
        layers_run=layers_run(timing.calls, llm.stack.layout) / len(timing.depths),
        drafted=timing.drafted,
        accepted=timing.accepted,
    )


def measure_batch(
    llm: LLM,
    settings: Sequence[Setting],
    texts: Sequence[Text],
    num_rounds: int,
    batch: int,
    each: Each = silently,
) -> list[dict[str, Any]]:
    """Every setting's BatchFigures, as JSON has them; `batch` texts are decoded at once, the same ones again
    where there are fewer.
    """
    chosen = [texts[i % len(texts)] for i in range(batch)]
    speeds = time_batches(llm.stack, settings, chosen, num_rounds, each)
    found = []
    for setting, mine in zip(settings, speeds, strict=True):
        speedups = [a / b for a, b in zip(mine, speeds[0], strict=True)]
        figures = BatchFigures(
            batch=batch,
            threshold=setting.policy.thresholds,
            catch_up=setting.catch_up,
            tokens_per_second=float(np.median(mine)),
            speedup=float(np.median(speedups)),
            speedup_range=(min(speedups), max(speedups)),
        )
        found.append(as_json(figures))
    return found


def peak_memory_mb() -> float | None:
    """The most memory that the process has had; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, KiB here


def exit_figures(llm: LLM, documents: Sequence[Sequence[int]]) -> tuple[list[dict[str, Any]], float]:
    """Every exit by itself, as JSON has it, and the mean depth of an oracle that leaves at the first exit
    that agrees with full depth.
    """
    layers = llm.stack.exit_layers
    everything = make_policy("max-prob", 1.0 if len(layers) > 1 else OFF, layers)
    _, early, full = record_exits(llm.engine, documents, everything)
    agrees = np.array(
        [scores.says == full.says for scores in [*early, full]]
    )  # (exits, tokens); the last row is all True
    depths = np.array(layers)[agrees.argmax(axis=0)]
    each = zip(layers, [*early, full], agrees, strict=True)
    figures = [
        asdict(ExitQuality(layer, scores.perplexity, float(same.mean()))) for layer, scores, same in each
    ]
    return figures, float(depths.mean())


@dataclass(frozen=True)
class Scored:
    """The text behind the scores, document by document."""

    documents: Sequence[Sequence[int]]
    num_bytes: float
    unknown_share: float = 0.0

    def interval(self, differences: NDArray[np.float64], draws: int = 1000) -> tuple[float, float]:
        """95 % bootstrap interval of exp(mean), documents drawn with their tokens.

        Shape: differences (tokens), in nats.
        """
        lengths = np.array([len(ids) - 1 for ids in self.documents])
        sums = np.add.reduceat(differences, np.cumsum(lengths) - lengths)
        drawn = np.random.default_rng(SEED).integers(0, len(lengths), (draws, len(lengths)))
        means = sums[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)
        low, high = np.exp(np.percentile(means, (2.5, 97.5))).tolist()
        return low, high

    def by_position(self, depths: NDArray[np.int64], limit: int) -> list[float]:
        """Mean depth of each POSITION_BIN positions, those past `limit` left out. Shape: depths (tokens)."""
        place = np.concatenate([np.arange(len(ids) - 1) for ids in self.documents])
        inside = place < limit
        place = place[inside] // POSITION_BIN
        depths = depths[inside]
        means: list[float] = (np.bincount(place, depths) / np.bincount(place)).tolist()
        return means


def make_settings(
    policy: str | type[ThresholdPolicy] | ThresholdPolicy,
    thresholds: Sequence[Any],
    catch_ups: Sequence[str],
    exit_layers: Sequence[int],
) -> list[Setting]:
    """Off, then every threshold (whatever `Thresholds.of` takes) with every catch-up; off alone without early
    exits.

    Raises RequestError.
    """
    off = Setting(make_policy(policy, OFF, exit_layers), "recompute")
    if len(exit_layers) == 1:
        return [off]
    policies = [make_policy(policy, values, exit_layers) for values in thresholds]
    return [off, *(Setting(p, c) for c in catch_ups for p in policies)]


def choose_texts(documents: Sequence[Sequence[int]], amounts: Amounts, limit: int) -> list[Text]:
    """Beginnings of documents spread evenly over the corpus, all of one length."""
    length = amounts.prompt_tokens + amounts.new_tokens
    if length > limit:
        raise RequestError(
            f"{length} tokens a text are more than this model's context of {limit}; ask for fewer: "
            "--prompt-tokens, --new-tokens"
        )
    long_enough = [ids for ids in documents if len(ids) >= length]
    if not long_enough:
        raise RequestError(
            f"no document of the corpus has {length} tokens; ask for fewer: --prompt-tokens, --new-tokens"
        )
    places = (
        np.linspace(0, len(long_enough) - 1, min(amounts.num_texts, len(long_enough))).round().astype(int)
    )
    return [Text(tuple(long_enough[i][:length]), amounts.prompt_tokens) for i in places]


def score_settings(
    llm: LLM, documents: Sequence[Sequence[int]], settings: Sequence[Setting], each: Each = silently
) -> list[Scores]:
    """Quality of every setting; those that share a catch-up share its passes where it allows."""
    scores: dict[int, Scores] = {}
    for catch_up in CATCH_UPS:
        mine = {i: s.policy for i, s in enumerate(settings) if s.catch_up == catch_up}
        if mine:
            found = score_documents(llm.engine, documents, list(mine.values()), catch_up, each)
            scores |= dict(zip(mine, found, strict=True))
    return [scores[i] for i in range(len(settings))]


def layers_run(calls: Sequence[Call], layout: Sequence[SegmentShape]) -> int:
    """Layers that tokens went through, each token counted in each, pending and rejected ones too."""
    return sum(call.num_tokens * layout[call.number].num_layers for call in calls if call.graph == "segment")
