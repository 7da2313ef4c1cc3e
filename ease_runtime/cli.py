"""ease-run: run a bundle."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from ease_runtime.commands import ErrorGroup, ThresholdList
from ease_runtime.engine import CATCH_UPS
from ease_runtime.errors import RequestError
from ease_runtime.llm import DEVICES, LLM, Options, Timing, TokenEvent
from ease_runtime.policy import POLICIES

DEPTH_COLOURS = ("green", "yellow", "magenta", "cyan", "red", "blue")  # shallow exits first; the last layer has none


@click.group(cls=ErrorGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Run models whose tokens leave early."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue; - reads it from standard input.")
@click.option("--max-tokens", default=Options.max_tokens, show_default=True, help="Longest answer, in tokens.")
@click.option("--policy", default=Options.policy, show_default=True, help=f"What confidence is: {', '.join(POLICIES)}.")
@click.option(
    "--threshold",
    type=ThresholdList(),
    help="A token leaves at this confidence; one for every early exit, or one each (off: not asked). Without it none leaves.",
)
@click.option(
    "--catch-up", default=Options.catch_up, show_default=True, help=f"How tokens that left pay their K/V: {' or '.join(CATCH_UPS)}."
)
@click.option("--temperature", default=Options.temperature, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=Options.top_k, show_default=True, help="Keep the k most probable tokens; 0 keeps all.")
@click.option("--top-p", default=Options.top_p, show_default=True, help="Keep the most probable tokens up to this mass.")
@click.option("--seed", default=Options.seed, show_default=True, help="Seed of the sampling.")
@click.option("--show-exits", is_flag=True, help="Colour each token by its depth, with a legend and figures.")
@click.option("--compare", is_flag=True, help="Also time the same prompt at full depth.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option("--device", default="auto", show_default=True, help=f"One of: {', '.join(DEVICES)}.")
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
def generate(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    policy: str,
    threshold: tuple[float | None, ...] | None,
    catch_up: str,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    show_exits: bool,
    compare: bool,
    as_json: bool,
    device: str,
    threads: int,
) -> None:
    """Continue a prompt."""
    options = Options(max_tokens, policy, threshold, catch_up, temperature, top_k, top_p, seed)
    text = read_prompt(prompt)
    llm, timing = LLM(bundle, device=device, num_threads=threads), Timing()
    if compare:  # warm both paths up, so that neither pays for first-time allocations
        for warm_up in (options, replace(options, threshold=None)):
            list(llm.generate(text, warm_up))
    events = llm.generate(text, options, timing)
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        shown = list(events)
    elif show_exits:
        shown = print_coloured(events, llm.stack.exit_layers, console)
    else:
        shown = print_plain(events)
    full_depth = time_full_depth(llm, text, options) if compare else None
    if as_json:
        click.echo(json.dumps(as_object(shown, timing, full_depth), ensure_ascii=False))
    elif show_exits or compare:
        print_summary(shown, timing, llm.stack.exit_layers, full_depth, console)


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for '-'. Raises RequestError when it is no UTF-8."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on standard input is not UTF-8: {error.reason} at byte {error.start}") from None


@contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Ctrl-C ends a text that is being printed; what is there stays."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(" [interrupted]", err=True)


def print_plain(events: Iterator[TokenEvent]) -> list[TokenEvent]:
    """Stream the text."""
    shown: list[TokenEvent] = []
    with quiet_interrupt():
        for event in events:
            click.echo(event.text, nl=False)
            sys.stdout.flush()
            shown.append(event)
    click.echo()
    return shown


def depth_style(depth: int, exit_layers: tuple[int, ...]) -> str:
    """The colour of an exit; tokens that used every layer are plain."""
    place = exit_layers.index(depth)
    return "" if place == len(exit_layers) - 1 else DEPTH_COLOURS[place % len(DEPTH_COLOURS)]


def print_coloured(events: Iterator[TokenEvent], exit_layers: tuple[int, ...], console: Console) -> list[TokenEvent]:
    """Stream the text, each token in the colour of its exit, after a legend."""
    legend = Text("depth: ")
    for layer in exit_layers:
        legend.append(f" {layer} ", style=f"reverse {depth_style(layer, exit_layers)}".strip()).append(" ")
    console.print(legend)
    shown: list[TokenEvent] = []
    with quiet_interrupt():
        for event in events:
            console.print(Text(event.text, style=depth_style(event.depth, exit_layers)), end="")
            shown.append(event)
    console.print()
    return shown


def time_full_depth(llm: LLM, prompt: str, options: Options) -> Timing:
    """The same prompt with no early exit, timed."""
    timing = Timing()
    list(llm.generate(prompt, replace(options, threshold=None), timing))
    return timing


def mean_depth(events: list[TokenEvent]) -> float:
    return sum(event.depth for event in events) / len(events)


def print_summary(
    events: list[TokenEvent], timing: Timing, exit_layers: tuple[int, ...], full_depth: Timing | None, console: Console
) -> None:
    """Depth and speed in a line, and against full depth in another."""
    if not events:
        return
    shares = ", ".join(f"{sum(e.depth == layer for e in events) / len(events):.0%} at {layer}" for layer in exit_layers)
    console.print(f"{len(events)} tokens, mean depth {mean_depth(events):.2f} of {exit_layers[-1]} layers ({shares})", style="dim")
    console.print(f"prefill {timing.prefill_seconds * 1000:.1f} ms, then {timing.tokens_per_second:.0f} tokens/s", style="dim")
    if full_depth and full_depth.tokens_per_second:
        ratio = timing.tokens_per_second / full_depth.tokens_per_second
        console.print(f"full depth: {full_depth.tokens_per_second:.0f} tokens/s, so {ratio:.2f}x as fast", style="dim")


def as_object(events: list[TokenEvent], timing: Timing, full_depth: Timing | None) -> dict[str, object]:
    """What `--json` prints."""
    tokens = [{"id": e.id, "text": e.text, "depth": e.depth, "confidence": e.confidence, "logprob": e.logprob} for e in events]
    return {
        "text": "".join(e.text for e in events),
        "tokens": tokens,
        "finish_reason": events[-1].finish_reason,
        "usage": {"prompt_tokens": timing.num_prompt_tokens, "completion_tokens": len(events), "mean_depth": mean_depth(events)},
        "timing": {
            "prefill_seconds": timing.prefill_seconds,
            "decode_seconds": timing.decode_seconds,
            "tokens_per_second": timing.tokens_per_second,
            "full_depth_tokens_per_second": full_depth.tokens_per_second if full_depth else None,
        },
    }


if __name__ == "__main__":
    main()
