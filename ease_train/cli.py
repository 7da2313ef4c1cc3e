"""ease-train: train models that can stop early."""

import os
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ease_common.commands import CommandGroup, say_how_to_go_on
from ease_common.errors import SettingWarning, TrainError
from ease_common.files import held
from ease_common.interrupts import handled, raise_it
from ease_common.lists import FiniteFloat, ThreadCount, list_of
from ease_common.progress import Bar
from ease_common.settings import Section
from ease_train.data.corpora import SOURCES
from ease_train.methods.method import GateConfig
from ease_train.training.config import SECTIONS, Recipe, load_recipe, recipe_names
from ease_train.training.renames import METHOD

if typing.TYPE_CHECKING:
    from ease_train.training.gates import GateTrainer
    from ease_train.training.trainer import Event, Trainer

OPTION_KINDS: dict[Any, dict[str, Any]] = {
    int: {"type": int},
    float: {"type": FiniteFloat()},
    str: {"type": str},
    bool: {"type": bool},
    tuple[int, ...]: list_of(click.INT, "N[,N...]"),
    tuple[float, ...]: list_of(FiniteFloat(), "X[,X...]"),
    dict[int, float]: {"type": (int, FiniteFloat()), "multiple": True, "metavar": "LAYER NUMBER"},
    dict[str, float]: {"type": (str, FiniteFloat()), "multiple": True, "metavar": "NAME NUMBER"},
}


cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the tokens of the data in this folder, and the hidden states of frozen layers.",
)


def section_options(
    section: type[Section], prefix: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option a field of `section`, with the field's own help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for path, field, hint in reversed(list(section.settings())):
            name = "_".join(path)
            spellings = [name, *(old for old, new in METHOD.items() if new == path and old != name)]
            flags = [f"--{spelling.replace('_', '-')}" for spelling in spellings]
            text = f"{prefix}{field.metadata['help']}"
            command = click.option(*flags, name, help=text, **OPTION_KINDS[hint])(command)
        return command

    return decorate


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option a recipe field."""
    for table, section in reversed(list(SECTIONS.items())):
        command = section_options(section, f"[{table}] ")(command)
    return command


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of where it runs."""
    device = click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu or cuda; auto takes a GPU where there is one.",
    )
    return device(
        click.option(
            "--threads",
            type=ThreadCount(),
            help="CPU threads; all of them by default.",
        )(command)
    )


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of how a run is spread and what it keeps, which `run_place` takes out of its
    fields.
    """
    text = "Several processes: shards of weights and optimizer in each (FSDP), not all of them."
    command = click.option("--sharded", is_flag=True, help=text)(command)
    return place_options(cache_option(command))


def run_place(fields: dict[str, Any]) -> dict[str, Any]:
    """Take a run's place out of a command's fields; the recipe's are left."""
    return {name: fields.pop(name) for name in ("device", "cache", "sharded")}


IDLE: dict[str, tuple[str, Callable[[Recipe], bool]]] = {  # an option -> when it has an effect
    "bpe_vocab_size": ("--kind bpe", lambda recipe: recipe.tokenizer.kind == "bpe"),
    "adapter_dim": (
        "--exit-adapter low-rank or mlp",
        lambda recipe: recipe.model.exit_adapter in ("low-rank", "mlp"),
    ),
    "capacity": ("--routed-layers", lambda recipe: bool(recipe.model.routed_layers)),
    "routing_rule": ("--routed-layers", lambda recipe: bool(recipe.model.routed_layers)),
    "layer_weights": ("--weight-rule given", lambda recipe: recipe.method.weight.rule == "given"),
}


def warn_of_idle(options: dict[str, Any], recipe: Recipe) -> None:
    """Warn of options that were given and change nothing in a recipe; what is a recipe's own it may carry
    along.
    """
    for name in options.keys() & IDLE.keys():
        partner, works = IDLE[name]
        if not works(recipe):
            warnings.warn(
                f"--{name.replace('_', '-')} has no effect without {partner}", SettingWarning, stacklevel=2
            )


def given_options(fields: dict[str, Any]) -> dict[str, Any]:
    """The recipe fields that the command line sets; pairs become a dictionary."""
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    return {
        name: dict(value) if isinstance(value, tuple) and isinstance(value[0], tuple) else value
        for name, value in given.items()
    }


@click.group(cls=CommandGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Train language models whose tokens can leave early."""


@main.command()
def recipes() -> None:
    """List the recipes, with the paper that each follows."""
    table = Table("recipe", "what it does", "paper")
    for name in recipe_names():
        recipe = load_recipe(name)
        table.add_row(name, recipe.description, recipe.paper)
    Console().print(table)


@main.command()
@click.argument("recipe", required=False)
@click.option("--data", show_default="kjv", help=f"{SOURCES} With --resume: where the run's text is now.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the checkpoint goes.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run at --out by its own settings; only --steps may be others.",
)
@run_options
@click.option(
    "--seeds",
    **list_of(click.IntRange(0), "N[,N...]"),
    help="Train once for each of these seeds, into OUT/seed-N.",
)
@recipe_options
def fit(
    recipe: str | None,
    data: str | None,
    out: Path,
    resume: bool,
    threads: int | None,
    seeds: tuple[int, ...],
    **fields: Any,
) -> None:
    """Train a model by RECIPE (a name from `ease-train recipes`, or a .toml file); with --resume it may be
    left out.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    place = run_place(fields)
    options = given_options(fields)
    if seeds and "seed" in options:
        raise TrainError("--seed and --seeds both choose the seed; leave one out")
    if not seeds:
        fit_once(recipe, options, data, out, resume, **place)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        fit_once(recipe, {**options, "seed": seed}, data, folder, resume and folder.exists(), **place)


def fit_once(
    recipe: str | None, options: dict[str, Any], data: str | None, out: Path, resume: bool, **place: Any
) -> None:
    """Begin or resume one run, and train it to its end."""
    from ease_train.training.resuming import ResumeOptions
    from ease_train.training.trainer import Trainer

    base = load_recipe(recipe) if recipe else None
    with alone_at(out):
        if resume:
            trainer = Trainer.resume(out, **place, asked=ResumeOptions(options, data, base))
        elif base is None:
            raise TrainError("no recipe is named; list them: ease-train recipes")
        elif out.exists():
            raise TrainError(f"{out} is there already; go on with it (--resume) or choose another --out")
        else:
            chosen = base.with_options(options)
            warn_of_idle(options, chosen)
            trainer = Trainer.begin(chosen, data or "kjv", **place, base=base)
        run_with_progress(trainer, trainer.recipe, out)


@contextmanager
def alone_at(out: Path) -> Iterator[None]:
    """Keep `out` to this run, of several processes to the first. Raises an EaseError where another has it."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            try:
                stack.enter_context(held(out))
            except OSError as error:
                raise TrainError(f"could not write {out}: {error.strerror or error}") from None
        yield


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--count-data", "counted", help="Text whose most frequent tokens a reduced head knows; --data by default."
)
@click.option(
    "--recipe",
    default="ee-tuning",
    show_default=True,
    help="The recipe whose exits, method and training to use.",
)
@click.option("--data", help="As for fit; what the checkpoint was trained on by default.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the tuned checkpoint goes.",
)
@run_options
@recipe_options
def tune(
    checkpoint: Path,
    recipe: str,
    data: str | None,
    counted: str | None,
    out: Path,
    threads: int | None,
    **fields: Any,
) -> None:
    """Give CHECKPOINT new exits, or train its own on. Resume with `ease-train fit --out OUT --resume`."""
    import torch

    from ease_train.training.checkpoint import load_checkpoint
    from ease_train.training.tune import begin_tuning

    if threads:
        torch.set_num_threads(threads)
    if out.exists():
        raise TrainError(f"{out} is there already; choose another --out")
    place = run_place(fields)
    options = given_options(fields)
    with alone_at(out):
        trainer = begin_tuning(
            load_checkpoint(checkpoint), load_recipe(recipe), options, data, counted=counted, **place
        )
        warn_of_idle(options, trainer.recipe)
        run_with_progress(trainer, trainer.recipe, out)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", help="As for fit; what the checkpoint was trained on by default.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the checkpoint with gates goes.",
)
@place_options
@cache_option
@section_options(GateConfig, "")
def gates(
    checkpoint: Path,
    data: str | None,
    out: Path,
    device: str,
    threads: int | None,
    cache: Path | None,
    **fields: Any,
) -> None:
    """Train a gate at every early exit of CHECKPOINT, whose own weights stay as they are."""
    import torch

    from ease_train.training.checkpoint import load_checkpoint, save_checkpoint
    from ease_train.training.gates import GateTrainer

    if threads:
        torch.set_num_threads(threads)
    if out.exists():
        raise TrainError(f"{out} is there already; choose another --out")
    settings = GateConfig.from_dict(given_options(fields), "gates")
    with alone_at(out):
        trainer = GateTrainer(load_checkpoint(checkpoint), settings, data, device, cache)
        show_gates(trainer)
        save_checkpoint(trainer.checkpoint, out)


@main.command("import")
@click.argument("source")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the checkpoint goes.",
)
@click.option(
    "--exits",
    "layers",
    **list_of(click.INT, "N[,N...]"),
    help="Layers after which a token may leave, like 10,20; the last is always one.",
)
@click.option(
    "--with-exits",
    type=click.Path(path_type=Path, file_okay=False),
    help="Trained exits for it, from `export-exits`.",
)
@click.option("--max-positions", type=click.IntRange(2), help="Cut the model's context to so many tokens.")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, file_okay=False),
    help="A LoRA folder of peft, merged into the model's weights.",
)
def import_(
    source: str,
    out: Path,
    layers: tuple[int, ...],
    with_exits: Path | None,
    max_positions: int | None,
    adapter: Path | None,
) -> None:
    """Turn a pretrained model into a checkpoint: a Hugging Face directory or hub id, or a .gguf file (of the
    families in docs/pretrained.md).
    """
    from ease_train.convert.huggingface import import_model

    if out.exists():
        raise TrainError(f"{out} is there already; choose another --out")
    if layers and with_exits:
        raise TrainError(
            f"--exits {layers[0]} and --with-exits {with_exits}: trained exits are where they were "
            "trained; leave one out"
        )
    with alone_at(out):
        checkpoint = import_model(source, layers, max_positions, with_exits, click.echo, adapter, out)
    config = checkpoint.recipe.model
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    shape = (
        f"{config.num_layers} layers of width {config.dim}, vocabulary {config.vocab_size}, context "
        f"{config.max_positions}"
    )
    click.echo(f"{out}: {parameters / 1e6:.1f} M parameters, {shape}, exits at {list(config.exits)}")


@main.command("export-hf")
@click.argument("checkpoint", type=click.Path(path_type=Path, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def export_hf(checkpoint: Path, out: Path) -> None:
    """Write CHECKPOINT as a Hugging Face directory that transformers loads, its exits in files beside
    (`import` reads them back).
    """
    from ease_train.convert.huggingface import export_model
    from ease_train.training.checkpoint import load_checkpoint

    export_model(load_checkpoint(checkpoint), out)
    click.echo(f"{out}: written")


@main.command("export-exits")
@click.argument("checkpoint", type=click.Path(path_type=Path, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def export_exits(checkpoint: Path, out: Path) -> None:
    """Write what belongs to CHECKPOINT's exits alone, in fp16, to share (`import --with-exits OUT` gives them
    to the model again).
    """
    from ease_train.convert.huggingface import export_exits as write
    from ease_train.training.checkpoint import load_checkpoint

    write(load_checkpoint(checkpoint), out)
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{out}: {size / 1e6:.2f} MB")


def show_gates(trainer: "GateTrainer") -> None:
    """Train the gates and show their quality on the validation split."""
    from ease_train.training.gates import GateStep
    from ease_train.training.trainer import StatesEvent

    with Bar("step", total=trainer.settings.steps, console=Console()) as bar:
        for event in trainer.fit():
            if isinstance(event, GateStep):
                bar.update(event.step)
                continue
            if isinstance(event, StatesEvent):
                show(event, bar)
                continue
            for layer, gate in event.gates.items():
                figures = f"agrees {gate.agreement:.3f}, AUC {gate.auc:.3f}, calibration error {gate.ece:.3f}"
                bar.print(f"gate at layer {layer}: {figures}, temperature {gate.temperature:.2f}")


def run_with_progress(trainer: "Trainer", recipe: Recipe, out: Path) -> None:
    """Train and show it (the first of several processes does); an interrupted one is saved after its step."""
    from ease_train.training.optimizer import memory_needed

    console = Console(quiet=not trainer.workers.first)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    exits = list(recipe.model.exits)
    if trainer.ended:
        console.print(f"{out}: nothing left to do, {why_ended(trainer)}", soft_wrap=True)
        return
    console.print(
        f"{recipe.name}: {parameters / 1e6:.1f} M parameters, exits at {exits}, data "
        f"{trainer.checkpoint.data}"
    )
    if (needed := memory_needed(trainer.model)) is not None:
        console.print(needed, soft_wrap=True)
    bar = Bar("step", total=trainer.settings.steps, completed=trainer.checkpoint.step, console=console)
    with bar, interrupts() as interrupted:
        for event in trainer.fit(out):
            show(event, bar)
            if interrupted and trainer.workers.count == 1:
                trainer.save(out)
                step = trainer.checkpoint.step
                say_how_to_go_on(f"step {step} is saved; go on: ease-train fit --out {out} --resume")
                raise_it(interrupted[0], None)


def why_ended(trainer: "Trainer") -> str:
    """What ended a run, and how to train on."""
    step = trainer.checkpoint.step
    patience = trainer.settings.patience
    if trainer.out_of_patience():
        return f"patience = {patience} ended it at step {step}; train its model on with: ease-train tune"
    return f"all {step} steps are done; train on with --resume --steps N"


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of raising them, so that a step is finished before the run is saved;
    a second one raises.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise_it(number, frame)
        caught.append(number)

    with handled(note):
        yield caught


def show(event: "Event", bar: Bar) -> None:
    """One event on the terminal: steps move the bar, the rest gets a line."""
    from ease_train.training.trainer import EvalEvent, StatesEvent, StepEvent

    if isinstance(event, StepEvent):
        losses = " ".join(f"{layer}:{loss:.3f}" for layer, loss in event.exit_losses.items())
        bar.update(event.step, f"loss {losses}, {event.tokens_per_second:,.0f} tokens/s")
    elif isinstance(event, StatesEvent):
        bar.update(says=f"hidden states {event.done}/{event.num_blocks}")
        if event.done in (0, event.num_blocks):
            size = f"{event.num_bytes / 1e9:.2f} GB"
            bar.print(
                f"hidden states of {event.num_blocks} blocks ({size}): {event.done} done, in {event.path}"
            )
    elif isinstance(event, EvalEvent):
        values = ", ".join(f"layer {layer} {value:.2f}" for layer, value in event.perplexity.items())
        agrees = ", ".join(f"layer {layer} {value:.3f}" for layer, value in event.agreement.items())
        bar.print(
            f"step {event.step}: validation perplexity {values}" + (f"; agrees {agrees}" if agrees else "")
        )
        if event.sample:
            bar.print(event.sample, markup=False, style="italic")
    else:
        best = (
            f" with the best model, that of step {event.model_step}" if event.model_step != event.step else ""
        )
        bar.print(f"step {event.step}: saved {event.path}{best}")


if __name__ == "__main__":
    main()
