"""Generated tokens on a terminal and as JSON: what the commands print."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from ease_runtime.cli.comparison import Comparison
from ease_runtime.engine.sequence import DraftCount
from ease_runtime.generation import Timing, TokenEvent, drafter_shares
from ease_runtime.llm import TextEngine
from ease_runtime.ort.stack import Stack

DEPTH_COLOURS = (
    "green",
    "yellow",
    "magenta",
    "cyan",
    "red",
    "blue",
)  # shallow exits first; the last layer has none


def print_plain(events: Iterable[TokenEvent]) -> list[TokenEvent]:
    """Stream the text."""
    shown: list[TokenEvent] = []
    for event in events:
        click.echo(event.text, nl=False)
        sys.stdout.flush()
        shown.append(event)
    click.echo()
    return shown


def depth_style(depth: int, exit_layers: tuple[int, ...]) -> str:
    """The colour of an exit; tokens that used every layer are plain, and those that went around some have the
    next exit's.
    """
    place = next((i for i, layer in enumerate(exit_layers) if depth <= layer), len(exit_layers) - 1)
    return "" if place == len(exit_layers) - 1 else DEPTH_COLOURS[place % len(DEPTH_COLOURS)]


def print_legend(exit_layers: tuple[int, ...], console: Console) -> None:
    """Which colour is which depth."""
    legend = Text("depth: ")
    for layer in exit_layers:
        legend.append(f" {layer} ", style=f"reverse {depth_style(layer, exit_layers)}".strip()).append(" ")
    console.print(legend)


def print_coloured(
    events: Iterable[TokenEvent], exit_layers: tuple[int, ...], console: Console
) -> list[TokenEvent]:
    """Stream the text, each token in the colour of its exit."""
    shown: list[TokenEvent] = []
    for event in events:
        console.print(Text(event.text, style=depth_style(event.depth, exit_layers)), end="")
        shown.append(event)
    console.print()
    return shown


def by_choice(events: Iterable[TokenEvent]) -> list[list[TokenEvent]]:
    """The events of each of several completions."""
    choices: dict[int, list[TokenEvent]] = {}
    for event in events:
        choices.setdefault(event.choice, []).append(event)
    return [choices[index] for index in sorted(choices)]


def mean_depth(events: list[TokenEvent]) -> float:
    return sum(event.depth for event in events) / len(events)


def print_notes(timing: Timing) -> None:
    """What the engine decided by itself, on standard error."""
    for note in timing.notes:
        click.echo(f"note: {note}", err=True)


def print_summary(
    events: list[TokenEvent],
    timing: Timing,
    stack: Stack,
    compared: Comparison | None,
    console: Console,
) -> None:
    """Depth and speed in a line, and beside full depth in another."""
    if not events:
        return
    exit_layers = stack.exit_layers
    shares = ", ".join(
        f"{sum(e.depth == layer for e in events) / len(events):.0%} at {layer}" for layer in exit_layers
    )
    console.print(
        f"{len(events)} tokens, mean depth {mean_depth(events):.2f} of {exit_layers[-1]} layers ({shares})",
        style="dim",
    )
    if timing.num_drafted:
        console.print(drafts_line(timing.drafts, len(events)), style="dim")
    console.print(
        f"prefill {timing.prefill_seconds * 1000:.1f} ms, then {timing.tokens_per_second:.0f} tokens/s",
        style="dim",
    )
    captured = stack.captured()
    if captured.num_graphs:
        console.print(
            f"{captured.num_graphs} passes are CUDA graphs by now, in {captured.num_bytes / 1e6:.1f} MB",
            style="dim",
        )
    if compared:
        console.print(compared.line(), style="dim")


def drafts_line(drafts: Mapping[str, DraftCount], num_tokens: int) -> str:
    """What became of drafts, of each drafter where there are several."""
    drafted = sum(count.judged for count in drafts.values())
    accepted = sum(count.accepted for count in drafts.values())
    parts = [
        f"{name} {count.accepted} of {count.judged}, {count.accepted / max(1, num_tokens):.0%} of the tokens"
        for name, count in drafts.items()
    ]
    return f"{accepted} of {drafted} drafts accepted" + (f" ({'; '.join(parts)})" if parts else "")


def as_object(
    events: list[TokenEvent], timing: Timing, compared: Comparison | None, llm: TextEngine
) -> dict[str, Any]:
    """What `--json` prints: the first completion, and all of them where there are several."""
    choices = [
        {
            "text": "".join(e.text for e in choice),
            "tokens": [token_object(e, llm.token_text) for e in choice],
            "finish_reason": choice[-1].finish_reason,
        }
        for choice in by_choice(events)
    ]
    captured = llm.stack.captured()
    return {
        **choices[0],
        **({"choices": choices} if len(choices) > 1 else {}),
        "usage": {
            "prompt_tokens": timing.num_prompt_tokens,
            "completion_tokens": len(events),
            "mean_depth": mean_depth(events),
            "drafted": timing.num_drafted,
            "accepted": timing.num_accepted,
            "drafters": drafter_shares(timing.drafts, len(events)),
        },
        "notes": timing.notes,
        "timing": {
            "prefill_seconds": timing.prefill_seconds,
            "decode_seconds": timing.decode_seconds,
            "tokens_per_second": timing.tokens_per_second,
        },
        **({"captured": captured._asdict()} if captured.num_graphs else {}),
        **({"compared": compared.to_json()} if compared else {}),
    }


def token_object(event: TokenEvent, token_text: Callable[[int], str]) -> dict[str, Any]:
    """A token for JSON."""
    token: dict[str, Any] = {
        "id": event.id,
        "text": event.text,
        "depth": event.depth,
        "confidence": event.confidence,
    }
    token |= {"logprob": event.logprob, "drafted": event.drafted}
    if event.drafter:
        token["drafter"] = event.drafter
    if event.top_logprobs:
        token["top_logprobs"] = [
            {"id": i, "text": token_text(i), "logprob": logprob} for i, logprob in event.top_logprobs
        ]
    return token
