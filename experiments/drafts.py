"""Drafts from text and exits against full depth, on a chat model: speed, and what becomes of drafts.

    python experiments/drafts.py measure BUNDLE NAME       # into runs/drafts/NAME.jsonl, a prompt a line
    python experiments/drafts.py measure BUNDLE NAME --modes off,exit,ngram,auto --threshold off,off,0.5
    python experiments/drafts.py collect                   # all of them -> docs/experiments/verify.json

`measure` goes on where it was stopped, and stops by itself after --seconds. Prompts: editing (edits.py), and
summaries, retrieval and free text of Spec-Bench in EASE_DATA_DIR/prompts. Modes take turns in one process,
prompt by prompt, there and back. A small model's greedy answers run into loops, where n-grams are always
right: so every figure stands for whole answers, and for what comes before the first 12 tokens that come
again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import click
import numpy as np
from edits import EDITS

from ease_common.files import write_whole
from ease_runtime.cli.commands import ThresholdFlag
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given
from ease_runtime.generation import Timing
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies.thresholds import OFF, Thresholds

OUT = Path("docs/experiments/verify.json")
RAW = Path("runs/drafts")
PROMPTS = Path(os.environ.get("EASE_DATA_DIR", "data")) / "prompts" / "spec_bench_half.jsonl"
KINDS = {"summaries": ("summarization",), "retrieval": ("rag",), "free": ("writing", "roleplay", "stem")}
GIVEN = "editing, given answers"
LOOP = 12  # tokens that come again
NEW_TOKENS = 96
EVERY = 3  # of the edits is done by the model itself, too
LENGTH = 256  # of the cache, behind which the costs of drafts are told
MOST_DRAFTS = 16
Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A prompt, and for editing the answer that is forced."""

    kind: str
    sort: str
    prompt: list[int]
    answer: list[int] | None = None


def tasks(llm: LLM, count: int) -> list[Task]:
    """Prompts of each kind; those of editing with given answers, and some with the model's own."""
    found = []
    for place, edit in enumerate(EDITS):
        prompt = ids_of(llm, f"{edit.order}, and answer with the whole text only:\n\n{edit.text}")
        found.append(Task(GIVEN, edit.sort, prompt, llm.encode_part(edit.edited)))
        if place % EVERY == 0:
            found.append(Task("editing", edit.sort, prompt))
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for kind, categories in KINDS.items():
        of_kind = [row["turns"][0] for row in rows if row["category"] in categories]
        found += [Task(kind, kind, ids_of(llm, text)) for text in of_kind[:count]]
    return found


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": text}])


class Modes:
    """Ways of drafting, each with an engine of its own, so that what passes cost is learnt for each."""

    def __init__(self, llm: LLM, names: Sequence[str], threshold: Thresholds) -> None:
        self.llm = llm
        llm.engine.measure()
        self.engines = {}
        self.options = {}
        for name in names:
            self.engines[name] = Engine(llm.stack)
            self.engines[name].costs = llm.engine.costs
            exits = name in ("exit", "auto") and threshold
            self.options[name] = Options(
                draft=name,
                catch_up="recompute" if name == "off" else "verify",
                threshold=threshold if exits else OFF,  # not what the bundle is calibrated to
            )

    def run(self, task: Task, mode: str) -> Record:
        """One answer: its tokens, the seconds of its passes with the tokens that came of each, and how fast
        it would have been at the costs known by then had only what was accepted been drafted.
        """
        self.llm.engine = self.engines[mode]
        timing = Timing()
        new = NEW_TOKENS if task.answer is None else len(task.answer)
        sampler = None if task.answer is None else Given([*task.prompt, *task.answer])
        options = Options(**{**vars(self.options[mode]), "max_tokens": new})
        tokens = [e.id for e in self.llm.generate(task.prompt, options, timing, sampler=sampler)]
        drafts = {name: [count.judged, count.accepted] for name, count in timing.drafts.items()}
        found = {"tokens": tokens, "passes": passes_of(timing.token_seconds), "drafts": drafts}
        return found | ({} if mode == "off" else {"ceiling": self.ceiling(mode, len(task.prompt), found)})

    def ceiling(self, mode: str, num_prompt: int, found: Record) -> float:
        """Full depth's time over that of passes with the accepted drafts and no others."""
        costs = self.engines[mode].pass_costs
        assert costs is not None, "whoever drafts learns what passes cost"
        length = num_prompt + 1
        plain = 0.0
        ideal = 0.0
        for _, size in found["passes"]:
            seconds = costs.curve(1, max(MOST_DRAFTS, size), 1, length)
            plain += size * seconds[0]
            ideal += seconds[size - 1]
            length += size
        return plain / ideal if ideal else 1.0


def passes_of(token_seconds: Sequence[float]) -> list[tuple[float, int]]:
    """Seconds and tokens of each pass after the first token; what came with that is left out."""
    found: list[tuple[float, int]] = []
    for seconds in token_seconds:
        if seconds:
            found.append((seconds, 1))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + 1)
    return found


def seconds_of(run: Record, count: int) -> float:
    """The time of an answer's first `count` tokens but the first; a pass's is shared out."""
    left = max(0, count - 1)
    total = 0.0
    for seconds, size in run["passes"]:
        total += seconds * min(size, left) / size
        left -= min(size, left)
    return total


def before_loop(tokens: Sequence[int]) -> int:
    """How many tokens come before the first LOOP of them that were there before."""
    seen = set()
    for end in range(LOOP, len(tokens) + 1):
        gram = tuple(tokens[end - LOOP : end])
        if gram in seen:
            return end - LOOP
        seen.add(gram)
    return len(tokens)


def compare(modes: Modes, task: Task) -> Record:
    """All modes there and back; of each the better time."""
    order = list(modes.engines)
    runs: dict[str, list[Record]] = {mode: [] for mode in order}
    for mode in [*order, *reversed(order)]:
        runs[mode].append(modes.run(task, mode))
    tokens = runs[order[-1]][0]["tokens"]
    count = before_loop(tokens) if task.answer is None else len(tokens)
    return {
        "kind": task.kind,
        "sort": task.sort,
        "same": all(run["tokens"] == tokens for some in runs.values() for run in some),
        "tokens": len(tokens),
        "before_loop": count,
        "drafts": {mode: some[0]["drafts"] for mode, some in runs.items()},
        "ceiling": {mode: some[-1]["ceiling"] for mode, some in runs.items() if mode != "off"},
        "seconds": {mode: min(seconds_of(run, len(tokens)) for run in some) for mode, some in runs.items()},
        "seconds_before": {mode: min(seconds_of(run, count) for run in some) for mode, some in runs.items()},
    }


def row_of(name: str, kind: str, mode: str, found: Sequence[Record]) -> Record:
    """A kind's row under a mode: ratios of the times of all its prompts, with bootstrap intervals over
    them.
    """
    drafts = [counts for one in found for counts in one["drafts"][mode].values()]
    judged = sum(count for count, _ in drafts)
    accepted = sum(count for _, count in drafts)
    exits = sum(one["drafts"][mode].get("exit", [0, 0])[1] for one in found)
    tokens = sum(one["tokens"] for one in found)
    speedup, interval = ratio(found, "seconds", mode)
    before, interval_before = ratio(found, "seconds_before", mode)
    plain = sum(one["seconds"]["off"] for one in found)
    ceiling = plain / sum(one["seconds"]["off"] / one["ceiling"][mode] for one in found)
    return {
        "name": name,
        "kind": kind,
        "mode": mode,
        "prompts": len(found),
        "same": sum(one["same"] for one in found),
        "tokens": tokens,
        "before": sum(one["before_loop"] for one in found),
        "speedup": speedup,
        "interval": interval,
        "speedup_before": before,
        "interval_before": interval_before,
        "lowest": min(one["seconds"]["off"] / one["seconds"][mode] for one in found),
        "acceptance": accepted / judged if judged else None,
        "share": accepted / tokens,
        "share_of_exits": exits / tokens,
        "ceiling": ceiling,
        "of_ceiling": speedup / ceiling,
        "off_tokens_per_second": (tokens - len(found)) / plain,
    }


def ratio(found: Sequence[Record], times: str, mode: str) -> tuple[float, list[float]]:
    """Off's time over a mode's, of all prompts together, and its 95 % interval over prompts."""
    pairs = np.array([[one[times]["off"], one[times][mode]] for one in found])
    drawn = np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    interval = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5)).tolist()
    return float(pairs[:, 0].sum() / pairs[:, 1].sum()), interval


@click.group()
def main() -> None:
    """Measure drafts, and write what was found."""


@main.command()
@click.argument("bundle")
@click.argument("name")
@click.option("--modes", default="off,auto", show_default=True)
@click.option("--threshold", type=ThresholdFlag(), default="off", help="Of exits that draft.")
@click.option("--count", default=6, show_default=True, help="Prompts of a kind of Spec-Bench.")
@click.option("--seconds", default=100.0, show_default=True, help="After which no prompt is begun.")
def measure(bundle: str, name: str, modes: str, threshold: Thresholds, count: int, seconds: float) -> None:
    """Add prompts to runs/drafts/NAME.jsonl until all are there, or time is up."""
    stop = monotonic() + seconds
    file = RAW / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = len(file.read_text(encoding="utf-8").splitlines()) - 1 if file.exists() else -1
    llm = LLM(bundle)
    every = tasks(llm, count)
    if threshold:  # a forced token is what an exit says, too
        every = [task for task in every if task.answer is None]
    ways = Modes(llm, modes.split(","), threshold)
    for mode in ways.engines:  # first-time allocations
        ways.run(Task("warm-up", "", ids_of(llm, "What is a river?")), mode)
    with file.open("a", encoding="utf-8") as lines:
        if done < 0:
            done = 0
            lines.write(json.dumps({"name": name, "threshold": threshold.to_json(), **price(ways)}) + "\n")
        for task in interleaved(every)[done:]:
            if monotonic() > stop:
                break
            lines.write(json.dumps(compare(ways, task)) + "\n")
            lines.flush()
            done += 1
    click.echo(f"{name}: {done} of {len(every)} prompts")


def price(ways: Modes) -> Record:
    """What drafts would gain, by their number, if all of them were accepted: at the table's costs."""
    costs = ways.llm.engine.pass_costs
    assert costs is not None, "measured when the modes were made"
    seconds = costs.curve(1, MOST_DRAFTS, 1, LENGTH)
    return {"all_accepted": {n: (n + 1) * seconds[0] / seconds[n] for n in (1, 2, 3, 4, 8, 16)}}


def interleaved(every: Sequence[Task]) -> list[Task]:
    """A prompt of each kind after the other, so that a measurement that was stopped has some of all."""
    kinds = dict.fromkeys(task.kind for task in every)
    queues = {kind: [task for task in every if task.kind == kind] for kind in kinds}
    longest = max(map(len, queues.values()))
    order = [
        (place * longest / len(queues[kind]), kind, place)
        for kind in kinds
        for place in range(len(queues[kind]))
    ]
    return [queues[kind][place] for _, kind, place in sorted(order)]


def kinds_of(found: Sequence[Record]) -> dict[str, list[Record]]:
    """The prompts of each kind, and all that the model answers itself."""
    kinds = {one["kind"]: [other for other in found if other["kind"] == one["kind"]] for one in found}
    return {**kinds, "all, own answers": [one for one in found if one["kind"] != GIVEN]}


@main.command()
def collect() -> None:
    """Write the rows of every file in runs/drafts; those of others stay."""
    known: Record = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    for file in sorted(RAW.glob("*.jsonl")):
        head, *found = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        name = head["name"]
        rows = [
            row_of(name, kind, mode, of_kind)
            for kind, of_kind in kinds_of(found).items()
            for mode in found[0]["ceiling"]
        ]
        given = [one for one in found if one["kind"] == GIVEN]
        sorts = {one["sort"]: [other for other in given if other["sort"] == one["sort"]] for one in given}
        edits = [row_of(name, sort, "auto", of_sort) for sort, of_sort in sorts.items()]
        for key, new in (("rows", rows), ("edits", edits)):
            known[key] = [row for row in known.get(key, []) if row["name"] != name] + new
        known["all_accepted"] = {**known.get("all_accepted", {}), name: head["all_accepted"]}
        for row in (*rows, *edits):
            click.echo(json.dumps(row))
    write_whole(OUT, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
