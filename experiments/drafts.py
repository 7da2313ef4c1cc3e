"""Drafts from text against full depth, on a chat model: speed, and what becomes of drafts.

    python experiments/drafts.py BUNDLE NAME       # adds the rows of NAME to docs/experiments/verify.json

Prompts: editing (below), and summaries, retrieval and free text of Spec-Bench in EASE_DATA_DIR/prompts. Off
and `auto` take turns in one process, prompt by prompt, in the order off, auto, auto, off. A small model's
greedy answers run into loops, where n-grams are always right: so every figure stands for whole answers, and
for what comes before the first 12 tokens that come again.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ease_common.files import write_whole
from ease_runtime.engine.sampling import Given
from ease_runtime.generation import Timing
from ease_runtime.llm import LLM
from ease_runtime.options import Options

OUT = Path("docs/experiments/verify.json")
PROMPTS = Path(os.environ.get("EASE_DATA_DIR", "data")) / "prompts" / "spec_bench_half.jsonl"
KINDS = {"summaries": ("summarization",), "retrieval": ("rag",), "free": ("writing", "roleplay", "stem")}
LOOP = 12  # tokens that come again
NEW_TOKENS = 96

PARAGRAPH = (
    "{0} got up early on Monday. The night before, {0} had packed the bags and put the letter on the table. "
    "When the bus came, {0} was already at the stop, with the blue coat over one arm and a map in the other "
    "hand. Nobody else was there, and {0} wondered whether the others had taken the train."
)
CODE = (
    "def total(prices, {0}):\n    result = 0\n    for price in prices:\n        if price > {0}:\n"
    "            result += price - {0}\n        else:\n            result += price\n    print({0}, result)\n"
    "    return result\n"
)
LOG = (
    "09:12 {0} started\n09:13 {0} opened the port 8080\n09:14 request from 10.0.0.4\n"
    "09:15 {0} wrote 512 bytes\n09:16 request from 10.0.0.7\n09:17 {0} wrote 812 bytes\n"
    "09:18 {0} closed the port 8080\n"
)
TYPOS = (
    "The meeting {0} held in the large room on the second floor. Everyone {1} to bring the figures of the "
    "last quarter, and the report that the office {2} in March. After lunch we {3} the plan for the summer."
)
EDITS = [  # what is asked, the text, and the text as it should become
    ("Rename Anna to Peter", PARAGRAPH.format("Anna"), PARAGRAPH.format("Peter")),
    ("Rename the variable limit to ceiling", CODE.format("limit"), CODE.format("ceiling")),
    ("Replace the word server by worker", LOG.format("server"), LOG.format("worker")),
    (
        "Correct the spelling",
        TYPOS.format("wll be", "is askd", "publishd", "discusss"),
        TYPOS.format("will be", "is asked", "published", "discuss"),
    ),
]


@dataclass(frozen=True)
class Task:
    """A prompt, and for editing the answer that is forced."""

    kind: str
    prompt: list[int]
    answer: list[int] | None = None


def tasks(llm: LLM, count: int) -> list[Task]:
    """Prompts of each kind; those of editing twice, with the model's answers and with given ones."""
    found = []
    for order, text, edited in EDITS:
        prompt = ids_of(llm, f"{order} in this text, and answer with the whole text only:\n\n{text}")
        found.append(Task("editing", prompt))
        found.append(Task("editing, given answers", prompt, llm.encode_part(edited)))
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for kind, categories in KINDS.items():
        of_kind = [row["turns"][0] for row in rows if row["category"] in categories]
        found += [Task(kind, ids_of(llm, text)) for text in of_kind[:count]]
    return found


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": text}])


def run(llm: LLM, task: Task, draft: str) -> tuple[list[int], list[float], Timing]:
    """An answer's tokens, the seconds of each after the first (a pass's shared out), and its counts."""
    timing = Timing()
    new = NEW_TOKENS if task.answer is None else len(task.answer)
    sampler = None if task.answer is None else Given([*task.prompt, *task.answer])
    events = llm.generate(task.prompt, Options(draft=draft, max_tokens=new), timing, sampler=sampler)
    tokens = [event.id for event in events]
    seconds: list[float] = []
    for place, one in enumerate(timing.token_seconds):
        if one:
            size = 1
            while place + size < len(timing.token_seconds) and not timing.token_seconds[place + size]:
                size += 1
            seconds += [one / size] * size
        elif not seconds:  # came with the first token
            seconds.append(0.0)
    return tokens, seconds, timing


def before_loop(tokens: Sequence[int]) -> int:
    """How many tokens come before the first LOOP of them that were there before."""
    seen = set()
    for end in range(LOOP, len(tokens) + 1):
        gram = tuple(tokens[end - LOOP : end])
        if gram in seen:
            return end - LOOP
        seen.add(gram)
    return len(tokens)


def compare(llm: LLM, task: Task) -> dict[str, Any]:
    """Off and auto in turns, twice each."""
    runs: dict[str, list[tuple[list[int], list[float], Timing]]] = {"off": [], "auto": []}
    for draft in ("off", "auto", "auto", "off"):
        runs[draft].append(run(llm, task, draft))
    tokens, _, timing = runs["auto"][0]
    count = before_loop(tokens) if task.answer is None else len(tokens)
    return {
        "kind": task.kind,
        "same": all(one[0] == tokens for some in runs.values() for one in some),
        "tokens": len(tokens),
        "before_loop": count,
        "drafted": timing.num_drafted,
        "accepted": timing.num_accepted,
        "seconds": {draft: min(sum(one[1]) for one in some) for draft, some in runs.items()},
        "seconds_before": {
            draft: min(sum(one[1][: max(0, count - 1)]) for one in some) for draft, some in runs.items()
        },
    }


def row_of(name: str, kind: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A kind's row: ratios of the times of all its prompts, and the range over prompts."""

    def ratio(times: str) -> float:
        return sum(one[times]["off"] for one in found) / sum(one[times]["auto"] for one in found)

    each = [one["seconds"]["off"] / one["seconds"]["auto"] for one in found]
    drafted = sum(one["drafted"] for one in found)
    accepted = sum(one["accepted"] for one in found)
    return {
        "name": name,
        "kind": kind,
        "prompts": len(found),
        "same": sum(one["same"] for one in found),
        "tokens": sum(one["tokens"] for one in found),
        "before": sum(one["before_loop"] for one in found),
        "speedup": ratio("seconds"),
        "speedup_before": ratio("seconds_before"),
        "lowest": min(each),
        "median": statistics.median(each),
        "highest": max(each),
        "acceptance": accepted / drafted if drafted else None,
        "share": accepted / sum(one["tokens"] for one in found),
        "off_tokens_per_second": sum(one["tokens"] - 1 for one in found)
        / sum(one["seconds"]["off"] for one in found),
    }


def main(bundle: str, name: str, count: int = 6) -> None:
    llm = LLM(bundle)
    for draft in ("off", "auto"):  # first-time allocations
        run(llm, Task("warm-up", ids_of(llm, "What is a river?")), draft)
    found = [compare(llm, task) for task in tasks(llm, count)]
    rows = [
        row_of(name, kind, [one for one in found if one["kind"] == kind])
        for kind in dict.fromkeys(one["kind"] for one in found)
    ]
    known = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"rows": []}
    known["rows"] = [row for row in known["rows"] if row["name"] != name] + rows
    write_whole(OUT, json.dumps(known, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
