"""ease-run: run a bundle."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ease_common.commands import CommandGroup, given_flags, say_how_to_go_on
from ease_common.errors import EaseError, RequestError
from ease_common.files import held, write_whole
from ease_common.interrupts import Terminated
from ease_common.lists import FiniteRange
from ease_common.progress import Bar
from ease_runtime.cli.batch import (
    answer_lines,
    count_answers,
    count_failed,
    count_lines,
    is_failure,
    numbered_lines,
    write_answers,
)
from ease_runtime.cli.commands import DEVICE_FLAG, EXACT_FLAG, BundleName
from ease_runtime.cli.comparison import ROUNDS
from ease_runtime.cli.comparison import compare as compare_with_full_depth
from ease_runtime.cli.flags import option_flags, read_flags
from ease_runtime.cli.picture import picture as draw
from ease_runtime.cli.show import (
    as_object,
    by_choice,
    print_coloured,
    print_legend,
    print_notes,
    print_plain,
    print_summary,
)
from ease_runtime.conversation import Conversation
from ease_runtime.generation import Timing
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.server.app import Settings
from ease_runtime.server.front import answers_to
from ease_runtime.server.run import serve as run_server


@click.group(cls=CommandGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Run models whose tokens leave early."""


PLACE = ("device", "num_threads", "adapt", "exact")


def model_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where and how a bundle runs: LLM's arguments by the names of PLACE."""
    text = (
        "Measure what passes cost, and leave early only where it pays (but for verify, tokens then depend on "
        "the machine)."
    )
    command = click.option("--adapt", is_flag=True, help=text)(command)
    command = EXACT_FLAG(command)
    command = click.option("--threads", "num_threads", default=0, help="CPU threads; 0 takes all.")(command)
    return DEVICE_FLAG(command)


def take_place(given: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of PLACE out of what click passes on."""
    return {name: given.pop(name) for name in PLACE}


@main.command()
@click.argument("bundle", type=BundleName())
@click.option("--prompt", required=True, help="The text to continue; - reads it from standard input.")
@option_flags()
@click.option("--show-exits", is_flag=True, help="Colour each token by its depth, with a legend and figures.")
@click.option(
    "--compare",
    is_flag=True,
    help=f"Also time it beside full depth, in {ROUNDS} rounds that take turns: a ratio with its range.",
)
@click.option(
    "--picture",
    metavar="FILE.svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the text: each token's exit depth as a colour, its confidence as a bar.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@model_flags
def generate(
    bundle: Path,
    prompt: str,
    show_exits: bool,
    compare: bool,
    picture: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Continue a prompt."""
    place = take_place(given)
    options = read_flags(given)
    if picture is not None and not picture.parent.is_dir():
        raise RequestError(
            f"{picture.parent}, where {picture.name} should go, is no directory; make it first"
        )
    text = read_prompt(prompt)
    llm = LLM(bundle, num_slots=options.n, **place)
    timing = Timing()
    llm.check(llm.prepare(options))
    if compare and not llm.drafts_or_leaves(options):
        raise RequestError(
            "--compare has nothing to compare: no token leaves early or is drafted; give a threshold "
            "(--threshold 0.7) or a drafter (--draft ngram)"
        )
    for flag in without_effect(llm, options, show_exits=show_exits, as_json=as_json):
        click.echo(f"note: {flag}", err=True)
    events = llm.generate(text, options, timing)
    console = Console(highlight=False, soft_wrap=True)
    if show_exits and not as_json:
        print_legend(llm.stack.exit_layers, console)
    if as_json:
        shown = list(events)
    else:
        shown = []
        for choice in by_choice(events) if options.n > 1 else [events]:
            shown += (
                print_coloured(choice, llm.stack.exit_layers, console) if show_exits else print_plain(choice)
            )
    if picture is not None:
        write_whole(picture, draw(text, by_choice(shown), llm.stack.exit_layers))
    depths = [event.depth for event in shown]
    compared = compare_with_full_depth(llm, text, options, timing, depths) if compare else None
    if as_json:
        object_ = as_object(shown, timing, compared, llm)
        click.echo(json.dumps(object_, ensure_ascii=False).encode())  # JSON is UTF-8 in every locale
        return
    print_notes(timing)
    if show_exits or compare:
        print_summary(shown, timing, llm.stack, compared, console)


def without_effect(
    llm: LLM, options: Options, *, show_exits: bool = False, as_json: bool = False
) -> list[str]:
    """What to tell of flags of a command that change nothing in what it says."""
    notes = []
    if llm.engine.adapt and not llm.leaves_early(options):
        notes.append("--adapt has no effect at full depth; give a threshold (--threshold 0.7)")
    if options.draft_corpus and options.draft not in ("corpus", "auto"):
        notes.append(
            f"--draft-corpus has no effect with --draft {options.draft}; give --draft corpus, or auto"
        )
    if show_exits and as_json:
        notes.append("--show-exits has no effect with --json, which tells each token's depth")
    if options.logprobs and not as_json:
        notes.append("--logprobs has no effect without --json")
    return notes


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for '-'. Raises RequestError when it is no UTF-8."""
    if prompt != "-":
        return prompt
    try:
        return read_input("the prompt").decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the prompt on standard input is not UTF-8: {error.reason} at byte {error.start}"
        ) from None


def read_input(what: str) -> bytes:
    """Standard input, to its end. Raises RequestError where it is closed."""
    if sys.stdin is None:
        raise RequestError(f"standard input is closed; pipe {what} into it, or say where else to read")
    return sys.stdin.buffer.read()


@main.command()
@click.argument("bundle", type=BundleName())
@click.option("--system", help="What the model is told first.")
@option_flags(without=("n", "logprobs"))
@click.option("--show-exits", is_flag=True, help="Colour each token by its depth, with a legend and figures.")
@model_flags
def chat(bundle: Path, system: str | None, show_exits: bool, **given: Any) -> None:
    """Talk to a model; what was said stays in its cache. /reset forgets it, /quit or Ctrl-D ends."""
    say_how_to_go_on("nothing of the conversation is kept")
    place = take_place(given)
    options = read_flags(given)
    llm = LLM(bundle, **place)
    llm.check(llm.prepare(options))
    conversation = Conversation(llm, options, system)
    console = Console(highlight=False, soft_wrap=True)
    for note in without_effect(llm, options):
        click.echo(f"note: {note}", err=True)
    if llm.template is None:
        click.echo(
            "this bundle has no chat template (a base model): your lines are continued as plain text",
            err=True,
        )
    if show_exits:
        print_legend(llm.stack.exit_layers, console)
    if sys.stdin is None:
        raise RequestError("standard input is closed, and a chat reads its lines there")
    while (line := read_line()) not in (None, "/quit"):
        if line == "/reset":
            conversation.reset()
        elif any("\ud800" <= character <= "\udfff" for character in line):
            click.echo(
                f"error: the line is not {sys.stdin.encoding}; convert it (iconv), or set LANG", err=True
            )
        elif line:
            answer(conversation, line, llm.stack.exit_layers if show_exits else None, console)


def read_line() -> str | None:
    """What the user says; None at the end of the input. Bytes that are no text in its encoding, but in UTF-8,
    are read as that.
    """
    try:
        line = input("> ").removeprefix("\ufeff").strip()
    except EOFError:
        click.echo(err=True)
        return None
    with contextlib.suppress(UnicodeError):
        return line.encode(sys.stdin.encoding, "surrogateescape").decode("utf-8")
    return line


def answer(
    conversation: Conversation, line: str, exit_layers: tuple[int, ...] | None, console: Console
) -> None:
    """One turn. An error or Ctrl-C ends the turn, not the chat."""
    timing = Timing()
    events = conversation.say(line, timing)
    try:
        shown = print_plain(events) if exit_layers is None else print_coloured(events, exit_layers, console)
    except EaseError as error:
        click.echo(f"error: {error}; /reset forgets the conversation", err=True)
        return
    except Terminated:
        raise
    except KeyboardInterrupt:
        click.echo(" [interrupted]", err=True)
        return
    finally:
        events.close()
    print_notes(timing)
    if exit_layers is not None:
        print_summary(shown, timing, conversation.llm.stack, None, console)


@main.command()
@click.argument("bundle", type=BundleName())
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on."
)
@click.option("--model-name", help="What clients call the model; the bundle's directory by default.")
@click.option(
    "--api-key", envvar="EASE_API_KEY", show_envvar=True, help="Answer only requests with this key."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Completions that run together.",
)
@click.option(
    "--max-queued",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Completions that wait; more get 429.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=Settings.max_body_bytes,
    show_default=True,
    help="Largest body, in bytes.",
)
@click.option(
    "--max-prompt", type=click.IntRange(1), help="Longest prompt, in tokens; what the model takes by default."
)
@click.option(
    "--clamp-max-tokens",
    is_flag=True,
    help="Shorten a request's max_tokens to what the context has left, instead of refusing it.",
)
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Keys and values kept of texts that have ended, for requests that begin alike; 0 keeps none.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="A name that requests may call this server by; on an address of this machine alone, its own are.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="An origin whose pages may ask, like https://example.org; '*' is every one.",
)
@click.option(
    "--grace",
    type=FiniteRange(0, 86400),
    default=30.0,
    show_default=True,
    help="Seconds for what runs when told to stop.",
)
@click.option(
    "--shadow",
    type=FiniteRange(0, 1),
    default=0.0,
    help="Share of the early answers to compare with full depth.",
)
@option_flags(
    without=("seed", "n", "stop", "logprobs", "logit_bias", "stop_token_ids", "min_tokens", "ignore_eos")
)
@model_flags
def serve(
    bundle: Path,
    host: str,
    port: int,
    model_name: str | None,
    api_key: str | None,
    batch_size: int,
    prefix_cache_mb: int,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    grace: float,
    shadow: float,
    **given: Any,
) -> None:
    """Serve a bundle as OpenAI's API, with metrics and a page to try it.

    Flags of generation hold where a request says nothing.
    """
    if api_key == "" or os.environ.get("EASE_API_KEY") == "":  # which click takes for none
        raise RequestError("the API key (--api-key, EASE_API_KEY) is empty; give one, or unset it")
    limits: dict[str, Any] = {
        "max_body_bytes": given.pop("max_body"),
        "max_prompt_tokens": given.pop("max_prompt"),
        "max_queued": given.pop("max_queued"),
        "clamp_max_tokens": given.pop("clamp_max_tokens"),
    }
    place = take_place(given)
    options = read_flags(given)
    if given_flags("max_tokens"):
        limits["max_chat_tokens"] = options.max_tokens
    name = model_name or bundle.resolve().name
    llm = LLM(bundle, num_slots=batch_size, prefix_bytes=prefix_cache_mb << 20, **place)
    llm.check(llm.prepare(options))
    if shadow and len(llm.stack.exit_layers) == 1:
        raise RequestError(f"--shadow {shadow:g} has nothing to compare: this bundle has no early exit")
    limits |= {"hosts": answers_to(host, allowed_hosts), "cors_origins": cors_origins}
    settings = Settings(
        name, options, api_key, **limits, shadow=shadow, certificate=llm.manifest.calibration or None
    )
    run_server(llm, settings, host=host, port=port, grace_seconds=grace)


@main.command()
@click.argument("bundle", type=BundleName())
@click.argument(
    "prompts",
    metavar="IN.jsonl",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
)
@click.argument("out", metavar="OUT.jsonl", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@option_flags()
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Requests that run together."
)
@click.option(
    "--ray", metavar="ADDRESS", help="Spread the lines over a Ray cluster; 'local' starts one here."
)
@click.option(
    "--ray-workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="With --ray: copies of the model there.",
)
@model_flags
def batch(
    bundle: Path, prompts: Path, out: Path, batch_size: int, ray: str | None, ray_workers: int, **given: Any
) -> None:
    """Answer every line of IN.jsonl, in order.

    A line is an object with a "prompt" or "messages", and options of its own where they differ from the
    flags; or a request of OpenAI's batches (custom_id, url, body). A line that cannot be answered gets an
    "error" in its place, and the command ends with 1. Run again after an interruption, it goes on where it
    stopped. - is standard input, or output, which starts anew each time.
    """
    place = take_place(given)
    options = read_flags(given)
    if ray is None and given_flags("ray_workers"):
        raise RequestError(f"--ray-workers {ray_workers} has no effect without --ray ADDRESS")
    to_stdout = str(out) == "-"
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(saved_input()) if str(prompts) == "-" else prompts
        if not to_stdout:
            check_out(out, source)
            stack.enter_context(held(out))
            say_how_to_go_on(f"{out} keeps the answers so far; run the command again to go on")
        total = count_lines(source)
        num_done = 0 if to_stdout else count_answers(out)
        if num_done > total:
            raise RequestError(
                f"{out} has {num_done} answers, but {prompts} only {total} lines; give another file"
            )
        lines = numbered_lines(source, num_done + 1)
        if num_done == total:
            answers: Iterable[str] = ()
        elif ray is None:
            answers = answer_lines(LLM(bundle, num_slots=batch_size, **place), lines, options, batch_size)
        else:
            from ease_runtime.cli.cluster import Cluster

            answers = Cluster(ray, ray_workers).answer_lines(bundle, lines, options, batch_size, place)
        failed = 0
        if to_stdout:
            for answer in answers:
                click.echo(answer.encode())
                failed += is_failure(answer)
        else:
            with Bar("answered", total=total, completed=num_done, console=Console(stderr=True)) as bar:
                for number in write_answers(out, answers):
                    bar.update(num_done + number)
            failed = count_failed(out)
    if failed:
        where = "the line's" if failed == 1 else "their lines'"
        click.echo(f'{failed} of {total} could not be answered; {where} "error" says why', err=True)
        sys.exit(1)


def check_out(out: Path, prompts: Path) -> None:
    """Raises RequestError where answers cannot go."""
    if not out.parent.is_dir():
        raise RequestError(f"{out.parent}, where {out.name} should go, is no directory; make it first")
    if out.exists() and out.samefile(prompts):
        raise RequestError(f"{out} is the file of the prompts; give another file for the answers")


@contextlib.contextmanager
def saved_input() -> Iterator[Path]:
    """What stands in standard input, as a file for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        path.write_bytes(read_input("the lines"))
        yield path


if __name__ == "__main__":
    main()
