"""Cut a checkpoint at its exits and write the bundle: graphs, weights, tokenizer, manifest.

    export_bundle(Path("runs/demo/checkpoint"), Path("runs/demo/bundle"))

The bundle is written aside and renamed, so a killed export leaves nothing under the final name.
"""

import json
import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn
from torch.export import Dim

from ease_export.errors import ExportError
from ease_export.graphs import OPSET, ExitHead, FirstSegment, Head, PropagateKV, Segment
from ease_runtime.manifest import FORMAT_VERSION, MANIFEST_FILE, ExitInfo, FileInfo, Manifest, SegmentInfo, sha256_of
from ease_train.checkpoint import Checkpoint, load_checkpoint
from ease_train.files import written_aside
from ease_train.model import Decoder
from ease_train.tokens import END

EXTERNAL_BYTES = 1024  # smaller initializers stay inside the graph
ALIGNMENT = 4096  # of a tensor in its file: a page, so that it can be mapped
TOKENIZER_FILE = "tokenizer.json"
HEAD_FILE = "head.onnx"


@dataclass(frozen=True)
class Plan:
    """One graph to export: its module, example inputs, and the names of its inputs, axes and outputs."""

    file: str
    module: nn.Module
    inputs: tuple[Any, ...]
    input_names: list[str]
    axes: tuple[Any, ...]
    output_names: list[str]
    weights: str  # the external file of its large initializers; kv graphs name their segment's


def export_bundle(checkpoint_path: Path, bundle: Path) -> Manifest:
    """Export a checkpoint. Raises CheckpointError, ExportError when something is at `bundle` that is no bundle."""
    if bundle.exists() and not (bundle / MANIFEST_FILE).is_file():
        raise ExportError(f"{bundle} is there already and is no bundle; choose another name, or remove it")
    checkpoint = load_checkpoint(checkpoint_path)
    model = checkpoint.model.eval()
    try:
        with written_aside(bundle) as folder:
            tensors: dict[str, dict[bytes, tuple[int, int]]] = {}
            for plan in plan_graphs(model):
                write_graph(plan, folder, tensors.setdefault(plan.weights, {}))
            checkpoint.tokenizer.save(str(folder / TOKENIZER_FILE))
            manifest = describe(checkpoint, checkpoint_path, folder)
            (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"could not write {bundle}: {error.strerror or error}; no half bundle is left there") from None
    return manifest


def segment_file(number: int) -> str:
    return f"segment_{number + 1:02d}.onnx"


def kv_file(number: int) -> str:
    return f"kv_{number + 1:02d}.onnx"


def exit_file(number: int) -> str:
    return f"exit_{number + 1:02d}.onnx"


def head_file(model: Decoder, number: int, layer: int) -> str:
    return HEAD_FILE if model.head(layer) is model.lm_head else f"head_{number + 1:02d}.onnx"


def plan_graphs(model: Decoder) -> Iterator[Plan]:
    """Every graph of the bundle, one after the other."""
    yield _head_plan(HEAD_FILE, model.lm_head)
    for number, (first, last) in enumerate(model.config.segments):
        if model.head(last) is not model.lm_head:
            yield _head_plan(head_file(model, number, last), model.head(last))
        yield _segment_plan(model, number, first, last)
        if number:
            yield _kv_plan(model, number, first, last)
        yield _exit_plan(model, number, last)


# Example sizes, all different and none 1, so that no axis is taken for another or for a constant.
ROWS, TOKENS, LENGTH, POOL, AT_EXIT = 2, 3, 16, 32, 5


def _caches(model: Decoder, first: int, last: int) -> tuple[list[Tensor], list[dict[int, str]], list[str]]:
    names = [f"{name}.{i}" for i in range(last - first + 1) for name in ("key", "value")]
    return [torch.zeros(ROWS, LENGTH, model.config.kv_dim) for _ in names], [{0: "B", 1: "T"} for _ in names], names


def _segment_plan(model: Decoder, number: int, first: int, last: int) -> Plan:
    past, past_axes, names = _caches(model, first, last)
    ids, active, write = (
        torch.zeros(ROWS, TOKENS, dtype=torch.int64),
        torch.ones(ROWS, TOKENS, dtype=torch.bool),
        torch.zeros(ROWS, dtype=torch.int64),
    )
    tokens = {0: "B", 1: "S"}
    shared = ["active", "write_indices", *(f"past_{n}" for n in names)]
    out = ["hidden", *(f"present_{n}" for n in names)]
    file = segment_file(number)
    if number == 0:
        module: nn.Module = FirstSegment(model, first, last)
        return Plan(
            file, module, (ids, active, write, past), ["input_ids", *shared], (tokens, tokens, {0: "B"}, past_axes), out, f"{file}.data"
        )
    pool = torch.zeros(POOL, model.config.dim)
    axes = ({0: "M"}, tokens, tokens, {0: "B"}, past_axes)
    return Plan(file, Segment(model, first, last), (pool, ids, active, write, past), ["pool", "index", *shared], axes, out, f"{file}.data")


def _kv_plan(model: Decoder, number: int, first: int, last: int) -> Plan:
    past, past_axes, names = _caches(model, first, last)
    inputs = (torch.zeros(POOL, model.config.dim), torch.zeros(ROWS, TOKENS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64), past)
    input_names = ["pool", "index", "write_indices", *(f"past_{n}" for n in names)]
    axes = ({0: "M"}, {0: "B", 1: "S"}, {0: "B"}, past_axes)
    return Plan(
        kv_file(number),
        PropagateKV(model, first, last),
        inputs,
        input_names,
        axes,
        [f"present_{n}" for n in names],
        f"{segment_file(number)}.data",
    )


def _exit_plan(model: Decoder, number: int, layer: int) -> Plan:
    inputs = (torch.zeros(POOL, model.config.dim), torch.zeros(AT_EXIT, dtype=torch.int64))
    file = exit_file(number)
    return Plan(file, ExitHead(model, layer), inputs, ["pool", "index"], ({0: "M"}, {0: "N"}), ["exit_hidden"], f"{file}.data")


def _head_plan(file: str, lm_head: nn.Linear) -> Plan:
    outputs = ["logits", "top_id", "top_prob", "margin", "entropy"]
    return Plan(file, Head(lm_head), (torch.zeros(AT_EXIT, lm_head.in_features),), ["exit_hidden"], ({0: "N"},), outputs, f"{file}.data")


def write_graph(plan: Plan, folder: Path, tensors: dict[bytes, tuple[int, int]]) -> None:
    """Export one graph; its large initializers go to (or are found in) the external file that `tensors` indexes by content."""
    axes = torch.utils._pytree.tree_map_only(str, lambda _: Dim.DYNAMIC, plan.axes)
    with torch.no_grad(), _quiet_export():
        program = torch.onnx.export(
            plan.module.eval(),
            plan.inputs,
            input_names=plan.input_names,
            output_names=plan.output_names,
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    with (folder / plan.weights).open("ab") as file:
        for tensor in proto.graph.initializer:
            if len(tensor.raw_data) >= EXTERNAL_BYTES:
                _move_outside(tensor, file, plan.weights, tensors)
    if (folder / plan.weights).stat().st_size == 0:
        (folder / plan.weights).unlink()
    onnx.save(proto, folder / plan.file)


def _move_outside(tensor: onnx.TensorProto, file: Any, location: str, tensors: dict[bytes, tuple[int, int]]) -> None:
    """Store a tensor's bytes once a file: a kv graph finds its segment's weights there."""
    content = tensor.raw_data
    if content not in tensors:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        tensors[content] = (file.tell(), len(content))
        file.write(content)
    offset, length = tensors[content]
    set_external_data(tensor, location, offset=offset, length=length)
    tensor.ClearField("raw_data")


@contextmanager
def _quiet_export() -> Iterator[None]:
    """torch.onnx's exporter warns of its own internals; its errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def describe(checkpoint: Checkpoint, checkpoint_path: Path, folder: Path) -> Manifest:
    """The manifest of the files written so far."""
    config = checkpoint.model.config
    segments = tuple(
        SegmentInfo("layers", first, last, segment_file(n), kv_file(n) if n else None) for n, (first, last) in enumerate(config.segments)
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        precision="fp32",
        vocab_size=config.vocab_size,
        dim=config.dim,
        kv_dim=config.kv_dim,
        num_layers=config.num_layers,
        max_positions=config.max_positions,
        end_id=checkpoint.tokenizer.token_to_id(END),
        tokenizer=TOKENIZER_FILE,
        segments=segments,
        exits=tuple(ExitInfo(layer, exit_file(n), head_file(checkpoint.model, n, layer)) for n, layer in enumerate(config.exits)),
        files={path.name: FileInfo(sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir())},
        source=_source(checkpoint, checkpoint_path),
    )


def _source(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    evaluations = [line for line in checkpoint.metrics if "perplexity" in line]
    return {
        "checkpoint": path.name,
        "checkpoint_config_sha256": sha256_of(path / "config.json"),
        "weights_sha256": sha256_of(path / "model.safetensors"),
        "recipe": checkpoint.recipe.name,
        "data": checkpoint.data,
        "step": checkpoint.step,
        "metrics": json.loads(json.dumps(evaluations[-1])) if evaluations else {},
        "versions": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }
