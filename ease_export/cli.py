"""ease-export: turn a checkpoint into a bundle, check it, look at it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from ease_common.chat import ChatTemplate
from ease_common.commands import CommandGroup
from ease_common.errors import ExportError
from ease_common.lists import list_of
from ease_runtime.bundle.manifest import FORMAT_VERSION, OF_CUDA, PRECISIONS, TARGETS, Manifest, load_manifest
from ease_runtime.cli.commands import DEVICE_FLAG, BundleName
from ease_runtime.ort.device import CPU, CUDA, why_no_cuda

if TYPE_CHECKING:
    from ease_export.verify import Report


@click.group(cls=CommandGroup)
@click.version_option(package_name="ease-lm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Export models with exits as per-segment ONNX graphs."""


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of the weights; fp16 is meant for CUDA, and bf16 runs nowhere else. int8 and int4 for CUDA have "
    "fp16 around.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    help="The device that the graphs are for; they run on the other, slower. "
    "[default: what this machine runs; cuda for fp16 and bf16]",
)
@click.option(
    "--exits",
    **list_of(click.INT, "N[,N...]"),
    help="The bundle gets these of the checkpoint's exits, and the last. [default: all]",
)
def build(checkpoint: Path, bundle: Path, precision: str, target: str | None, exits: tuple[int, ...]) -> None:
    """Cut CHECKPOINT at its exits and write BUNDLE (an older bundle there is replaced once the new one is
    complete).
    """
    from ease_export.build import export_bundle

    console = Console()
    chosen = target or target_here(precision)
    with console.status("exporting…"):
        manifest = export_bundle(checkpoint, bundle, precision, target=chosen, exits=exits)
    size = sum(info.num_bytes for info in manifest.files.values())
    why = "" if target else why_target(precision, chosen)
    console.print(
        f"{bundle}: for {chosen}{why}, {len(manifest.segments)} segments, {len(manifest.files)} files, "
        f"{size / 1e6:.1f} MB"
    )
    if precision == "bf16" and (reason := why_no_cuda()):
        click.echo(f"no graph of it was run here, since bf16 runs on CUDA alone, and {reason}", err=True)
    if manifest.chat_template and (
        problem := ChatTemplate((bundle / manifest.chat_template).read_bytes()).problem
    ):
        click.echo(f"warning: {problem}", err=True)


def target_here(precision: str) -> str:
    """The target where none is asked for: what this machine runs; in 16 bits always CUDA."""
    return CUDA.name if precision in OF_CUDA or why_no_cuda() is None else CPU.name


def why_target(precision: str, target: str) -> str:
    """What is said of a target that nobody asked for."""
    if precision in OF_CUDA:
        return ""
    if target == CPU.name:
        return " (what this machine runs; --target cuda is for GPUs)"
    faster = "--precision fp16 is faster there, " if precision == "fp32" else ""
    return f" (what this machine runs; {faster}--target cpu is for CPUs)"


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Where the rounded checkpoint goes."
)
@click.option("--data", help="Text like what the model will read; by default the help texts of Python.")
@click.option(
    "--tokens", type=click.IntRange(1), default=8192, show_default=True, help="Of the text that are read."
)
def quantize(checkpoint: Path, out: Path, data: str | None, tokens: int) -> None:
    """Round a CHECKPOINT's layers to 4 bits by GPTQ: `build --precision int4` of the result loses less than
    that of the checkpoint itself.
    """
    from ease_export.gptq import calibration_ids
    from ease_export.gptq import quantize as quantized
    from ease_train.training.checkpoint import load_checkpoint, save_checkpoint

    if out.exists():
        raise ExportError(f"{out} is there already; choose another name, or remove it")
    loaded = load_checkpoint(checkpoint)
    ids = calibration_ids(loaded, data, tokens)
    with Console().status("rounding…") as status:
        done, weights = quantized(loaded, ids, lambda layer: status.update(f"rounding… layer {layer}"))
    save_checkpoint(done, out, weights)
    click.echo(
        f"{out}: rounded for {ids.numel()} tokens; then: ease-export build {out} BUNDLE --precision int4"
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint that the bundle was exported from.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=200, show_default=True, help="Greedy tokens to compare."
)
@DEVICE_FLAG
def verify(bundle: Path, checkpoint: Path, tokens: int, device: str) -> None:
    """Compare every graph with torch, and the whole by greedy generation. Exit code 1 when they differ.

    An int8 or int4 bundle is judged by its graphs without the rounding of activations, whose effect is told
    beside.
    """
    from ease_export.verify import verify_bundle

    report = verify_bundle(bundle, checkpoint, tokens, device)
    render_report(report, Console())
    if not report.ok:
        how = (
            "with --precision bf16 or fp32, which hold larger numbers than fp16"
            if report.overflows
            else "again"
        )
        click.echo(
            f"error: {bundle} differs from {checkpoint}; export it {how}: ease-export build {checkpoint} "
            f"{bundle}",
            err=True,
        )
        sys.exit(1)


def render_report(report: "Report", console: Console) -> None:
    """The differences, graph by graph, and the greedy agreement."""
    table = Table("graph", "output", "largest difference", "allowed", "")
    for difference in report.differences:
        figures = [f"{difference.relative:.1e}", f"{difference.limit:.0e}"]
        table.add_row(
            difference.graph, difference.output, *figures, "ok" if difference.ok else "[red]too large[/red]"
        )
    console.print(table)
    tie = "; the next two are equally likely" if report.is_tie else ""
    console.print(f"greedy tokens equal to torch's: {report.agreed} of {report.num_generated}{tie}")
    for exit_ in report.rounding:
        low, high = exit_.interval
        said = (
            f"the exit at layer {exit_.layer} says the same token at {exit_.agreed} of {exit_.num_places} "
            "places"
        )
        console.print(f"with activations rounded to int8, {said} ({low:.1%} to {high:.1%}, 95 % interval)")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The checkpoint it was built from, where it is not beside it.",
)
def upgrade(bundle: Path, checkpoint: Path | None) -> None:
    """Build a BUNDLE of an older format again, from its checkpoint: same precision, calibration kept."""
    from ease_export.upgrade import upgrade_bundle

    console = Console()
    with console.status("exporting…"):
        done = upgrade_bundle(bundle, checkpoint)
    if done.manifest is None:
        click.echo(f"{bundle} is of format {FORMAT_VERSION} already; nothing was done")
        return
    click.echo(
        f"{bundle}: built again from {done.checkpoint} in {done.manifest.precision}, format {FORMAT_VERSION}"
    )
    if done.lost_calibration:
        click.echo(
            f"its calibration could not be kept; find thresholds again: ease-eval calibrate {bundle}",
            err=True,
        )
    elif done.manifest.calibration:
        click.echo("its calibration is kept: the weights and the precision are the same")


@main.command()
@click.argument("bundle", type=BundleName())
def inspect(bundle: Path) -> None:
    """Show a bundle's segments, exits, sizes and origin (every file's sum is checked)."""
    render_manifest(load_manifest(bundle), bundle, Console())


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="A repository that is made for it is shown to nobody else.")
@click.option(
    "--card",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A README.md for it; without one a short card is written.",
)
def push(bundle: Path, name: str, private: bool, card: Path | None) -> None:
    """Put BUNDLE on the Hugging Face hub, where OWNER/NAME is its name for every command."""
    from ease_export.push import push_bundle

    click.echo(push_bundle(bundle, name, private=private, card=card))


def render_manifest(manifest: Manifest, bundle: Path, console: Console) -> None:
    """What is in the bundle."""

    def megabytes(*names: str | None) -> str:
        return f"{sum(manifest.files[n].num_bytes for n in names if n in manifest.files) / 1e6:.2f}"

    def with_weights(graph: str) -> tuple[str, str]:
        return graph, f"{graph}.data"

    elsewhere = CPU.name if manifest.target == CUDA.name else CUDA.name
    where = "runs nowhere else" if manifest.activations == "bf16" else f"runs on {elsewhere}, too, slower"
    console.print(
        f"{bundle}: {manifest.precision} with activations in {manifest.activations} for {manifest.target} "
        f"({where}), "
        f"{manifest.num_layers} layers of width {manifest.dim}, "
        f"vocabulary {manifest.vocab_size}, "
        f"context {manifest.max_positions}, K/V {manifest.kv_dim} wide a token and layer"
    )
    table = Table("layers", "graph", "MB", "exit", "MB", "head", "MB")
    exits = {leave.layer: leave for leave in manifest.exits}
    for segment in manifest.segments:
        cells = [
            f"{segment.first_layer}–{segment.last_layer}",
            segment.graph,
            megabytes(*with_weights(segment.graph)),
        ]
        if (leave := exits.get(segment.last_layer)) is not None:
            own = [name for name in (leave.block, leave.graph, leave.gate) if name]
            cells += [", ".join(own), megabytes(*(file for name in own for file in with_weights(name)))]
            cells += [leave.head, megabytes(*with_weights(leave.head))]
        table.add_row(*cells)
    console.print(table)
    total = sum(info.num_bytes for info in manifest.files.values())
    console.print(f"{len(manifest.files)} files, {total / 1e6:.1f} MB, all with the sums of the manifest")
    for key, value in manifest.source.items():
        console.print(f"{key}: {value}", style="dim")


if __name__ == "__main__":
    main()
