"""Three ways to catch up on one model, in sequences of 128 to 2048 tokens.

    # perplexity along the text; no clock
    python experiments/catch_up.py quality BUNDLE --data wikitext-2 --exit-thresholds off,off,0.7
    # nothing else should run meanwhile
    python experiments/catch_up.py speed BUNDLE --data wikitext-2 --exit-thresholds off,off,0.7

Quality: sequences of 2048 tokens, the first 32 of them prompt, every other token leaves as the policy says
and hands its keys and values on; perplexity over full depth's, by the position in the sequence. Speed: the
last 64 tokens of a sequence, all before them prompt. Sequences are the documents, one after another. Both add
to docs/experiments/catch-up.json.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ease_common.files import write_whole
from ease_eval.measure.latency import Setting, Text, measure
from ease_eval.measure.perplexity import Scores, score_window
from ease_eval.measure.table import make_settings, make_speed
from ease_eval.provenance import provenance
from ease_runtime.cli.commands import ThresholdFlag
from ease_runtime.llm import LLM
from ease_train.data.corpora import load_documents

OUT = Path("docs/experiments/catch-up.json")
LENGTHS = (128, 256, 512, 1024, 2048)
CATCH_UPS = ("propagate", "recompute", "verify")
PROMPT_TOKENS = 32
DECODED_TOKENS = 64
POLICY = "max-prob"


def sequences(llm: LLM, data: str, split: str, number: int, length: int) -> list[list[int]]:
    """The documents' tokens one after another, cut. Shape: number lists of length + 1."""
    stream = [token for text in load_documents(data, split) for token in llm.encode_text(text)]
    found = [stream[start : start + length + 1] for start in range(0, number * (length + 1), length + 1)]
    if len(found[-1]) <= length:
        raise click.ClickException(f"{data} has {len(stream)} tokens, expected {number * (length + 1)}")
    return found


def named(setting: Setting) -> dict[str, Any]:
    return {"threshold": setting.policy.thresholds.to_json(), "catch_up": setting.catch_up}


def add(
    part: str, llm: LLM, bundle: Path, asked_for: dict[str, Any], threads: int, rows: list[dict[str, Any]]
) -> None:
    """Write one part of the JSON anew, with where it is from."""
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    found[part] = {**provenance(bundle, llm, threads), **asked_for, "policy": POLICY, "rows": rows}
    write_whole(OUT, json.dumps(found, indent=1) + "\n")
    click.echo(f"{OUT}: {len(rows)} rows of {part}")


@click.group()
def main() -> None:
    """Quality or speed."""


def asked(command: Any) -> Any:
    """What both commands take."""
    for option in (
        click.argument("bundle", type=click.Path(path_type=Path)),
        click.option("--data", required=True, help="Documents of one kind."),
        click.option("--split", default="test", show_default=True),
        click.option("--exit-thresholds", "thresholds", type=ThresholdFlag(), multiple=True, required=True),
        click.option("--threads", default=0, help="CPU threads; 0 takes all."),
    ):
        command = option(command)
    return command


@main.command()
@asked
@click.option("--number", default=12, show_default=True, help="Sequences.")
def quality(
    bundle: Path, data: str, split: str, thresholds: tuple[Any, ...], threads: int, number: int
) -> None:
    """Perplexity along the sequence, by catch-up."""
    llm = LLM(bundle, num_threads=threads)
    texts = sequences(llm, data, split, number, LENGTHS[-1])
    rows: list[dict[str, Any]] = []
    for setting in make_settings(POLICY, thresholds, CATCH_UPS[:2], llm.stack.exit_layers):
        scores = [
            score_window(
                llm.engine,
                ids[:-1],
                np.array(ids[1:], np.int64),
                [setting.policy],
                setting.catch_up,
                PROMPT_TOKENS,
            )[0]
            for ids in texts
        ]
        for first, last in zip((PROMPT_TOKENS, *LENGTHS), LENGTHS, strict=False):
            part = Scores.join(
                [
                    Scores(mine.logprobs[first:last], mine.depths[first:last], mine.says[first:last])
                    for mine in scores
                ]
            )
            rows.append(
                {
                    **named(setting),
                    "from": first,
                    "to": last,
                    "ppl": part.perplexity,
                    "mean_depth": part.mean_depth,
                }
            )
    add("quality", llm, bundle, {"data": data, "split": split, "number": number}, threads, rows)


@main.command()
@asked
@click.option("--number", default=2, show_default=True, help="Sequences of each length.")
@click.option("--rounds", default=3, show_default=True)
def speed(
    bundle: Path, data: str, split: str, thresholds: tuple[Any, ...], threads: int, number: int, rounds: int
) -> None:
    """Time by catch-up and length."""
    llm = LLM(bundle, num_threads=threads)
    settings = make_settings(POLICY, thresholds, CATCH_UPS, llm.stack.exit_layers)
    longest = sequences(llm, data, split, number, LENGTHS[-1])
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        texts = [Text(tuple(ids[:length]), length - DECODED_TOKENS) for ids in longest]
        timings, seconds = measure(llm.engine, settings, texts, rounds)
        for setting, timing in zip(settings, timings, strict=True):
            rows.append(
                {"length": length, **named(setting), **asdict(make_speed(timing, timings[0], seconds, llm))}
            )
        click.echo(
            f"{length} tokens: "
            + ", ".join(f"{row['catch_up']} {row['speedup']:.2f}" for row in rows[-len(settings) :])
        )
    add(
        "speed",
        llm,
        bundle,
        {"data": data, "split": split, "number": number, "rounds": rounds},
        threads,
        rows,
    )


if __name__ == "__main__":
    main()
