"""Does an early-exit mode say what full depth says? Greedy (or seeded) generations side by side, prompt by
prompt.

For `verify` every prompt must agree: that is its promise. For the other catch-ups the figures say how far
texts drift.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ease_common.errors import RequestError
from ease_runtime.engine.sequence import DraftCount
from ease_runtime.generation import Timing
from ease_runtime.llm import LLM
from ease_runtime.options import Options

QUESTION_KEYS = ("prompt", "question", "text")


@dataclass(frozen=True)
class Agreement:
    """One prompt.

    `first_difference` is the token (from 0) where the texts part, None when they are the same.
    """

    prompt: str
    num_tokens: int  # of full depth
    first_difference: int | None
    rouge_l: float  # F1 of the longest common subsequence, over token ids
    mean_depth: float
    drafted: int
    accepted: int
    drafters: dict[str, DraftCount]  # the same of each


def read_prompts(path: Path, limit: int) -> list[str]:
    """Prompts of a text file (one a line) or of jsonl (also .gz): "prompt", "question", "text", or the first
    of "turns".

    Raises RequestError when the file is missing, or a line has none of these.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read prompts from {path}: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()][:limit]
    if not lines:
        raise RequestError(f"{path} has no prompts")
    return [
        _prompt_of(line, path, number) if ".jsonl" in path.suffixes else line.rstrip("\r")
        for number, line in lines
    ]


def _prompt_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise RequestError(f"{path}, line {number}: no JSON") from None
    turns = row.get("turns") if isinstance(row, dict) else None
    values = [*turns[:1]] if isinstance(turns, list) else []
    values += [row.get(key) for key in QUESTION_KEYS] if isinstance(row, dict) else []
    for value in values:
        if isinstance(value, str) and value:
            return value
    raise RequestError(f'{path}, line {number}: expected "turns" or one of {", ".join(QUESTION_KEYS)}')


def compare(llm: LLM, prompts: Sequence[str], options: Options) -> list[Agreement]:
    """Generate for each prompt at full depth and under `options`, which differ in nothing else."""
    found = []
    for prompt in prompts:
        full = list(llm.generate(prompt, options.at_full_depth()))
        generation = llm.submit(prompt, options)
        early = list(llm.follow(generation, Timing()))
        ids = [e.id for e in full]
        others = [e.id for e in early]
        sequence = generation.choices[0].sequence
        found.append(
            Agreement(
                prompt=prompt,
                num_tokens=len(ids),
                first_difference=first_difference(ids, others),
                rouge_l=rouge_l(ids, others),
                mean_depth=sum(e.depth for e in early) / max(1, len(early)),
                drafted=sequence.drafts.judged,
                accepted=sequence.drafts.accepted,
                drafters=sequence.drafts.counts,
            )
        )
    return found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two lists part; None when they are equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def rouge_l(one: Sequence[int], other: Sequence[int]) -> float:
    """F1 of the longest common subsequence (Lin 2004, ROUGE-L with beta 1), 1 for two empty lists."""
    if not one and not other:
        return 1.0
    lengths = [0] * (len(other) + 1)
    for a in one:
        diagonal = 0
        for j, b in enumerate(other, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if a == b else max(lengths[j], lengths[j - 1])
    return 2.0 * lengths[-1] / (len(one) + len(other))
