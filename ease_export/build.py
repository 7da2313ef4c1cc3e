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
from ease_export.graphs import OPSET, ExitHead, FirstSegment, GateHead, Head, PropagateKV, Route, Routed, Segment, Similarity
from ease_runtime.manifest import FORMAT_VERSION, MANIFEST_FILE, ExitInfo, FileInfo, Manifest, SegmentInfo, sha256_of
from ease_train.checkpoint import TEMPLATE_FILE, Checkpoint, load_checkpoint
from ease_train.files import written_aside
from ease_train.model import Decoder, RoutedBlock

EXTERNAL_BYTES = 1024  # smaller initializers stay inside the graph
ALIGNMENT = 4096  # of a tensor in its file: a page, so that it can be mapped
TOKENIZER_FILE = "tokenizer.json"
HEAD_FILE = "head.onnx"
SIMILARITY_FILE = "similarity.onnx"


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
            if (template := checkpoint.conventions.chat_template) is not None:
                (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
            manifest = describe(checkpoint, checkpoint_path, folder)
            (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"could not write {bundle}: {error.strerror or error}; no half bundle is left there") from None
    return manifest


@dataclass(frozen=True)
class Cut:
    """One segment of the model: layers first..last (from 1), its number (from 0) and whether it is a routed layer."""

    number: int
    first: int
    last: int
    routed: bool

    def file(self, kind: str) -> str:
        """The name of one of its graphs."""
        return f"{kind}_{self.number + 1:02d}.onnx"


def cut_layers(model: Decoder) -> list[Cut]:
    """The segments: cut after every exit, and around every routed layer. Raises ExportError when the first layer is routed."""
    config = model.config
    routed = {number for number, layer in enumerate(model.layers, 1) if isinstance(layer, RoutedBlock)}
    if 1 in routed:
        raise ExportError("layer 1 is routed: a bundle's first segment must run for every token; train with routed_layers from 2 on")
    ends = sorted({*config.exits, *routed, *(layer - 1 for layer in routed)} - {0})
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [Cut(number, first, last, first in routed) for number, (first, last) in enumerate(zip(starts, ends, strict=True))]


def exit_file(number: int) -> str:
    return f"exit_{number + 1:02d}.onnx"


def gate_file(model: Decoder, number: int, layer: int) -> str | None:
    return f"gate_{number + 1:02d}.onnx" if str(layer) in model.gates else None


def head_file(model: Decoder, number: int, layer: int) -> str:
    return HEAD_FILE if model.head(layer) is model.lm_head else f"head_{number + 1:02d}.onnx"


def plan_graphs(model: Decoder) -> Iterator[Plan]:
    """Every graph of the bundle, one after the other."""
    yield _head_plan(HEAD_FILE, model.lm_head)
    for cut in cut_layers(model):
        if cut.routed:
            yield _routed_plan(model, cut)
            yield _from_pool(cut.file("route"), Route(model, cut.first), model, ["goes_in"])
            continue
        yield _segment_plan(model, cut)
        if cut.number:
            yield _kv_plan(model, cut)
    yield _similarity_plan(model)
    for number, layer in enumerate(model.config.exits):
        yield _from_pool(exit_file(number), ExitHead(model, layer), model, ["exit_hidden"])
        if (file := head_file(model, number, layer)) != HEAD_FILE:
            yield _head_plan(file, model.head(layer))
        if gate := gate_file(model, number, layer):
            yield _from_pool(gate, GateHead(model, layer), model, ["exit_hidden", "probability"])


# Example sizes, all different and none 1, so that no axis is taken for another or for a constant.
ROWS, PLACES, TOKENS, LENGTH, POOL = 2, 3, 5, 16, 32


Inputs = list[tuple[str, Tensor, dict[int, str]]]  # name, example, axes


def _tokens(name: str, dtype: torch.dtype = torch.int64) -> tuple[str, Tensor, dict[int, str]]:
    return name, torch.ones(TOKENS, dtype=dtype), {0: "N"}


def _over_cache(file: str, module: nn.Module, model: Decoder, cut: Cut, inputs: Inputs, outputs: list[str], weights: str) -> Plan:
    """A graph that reads and writes the caches of a segment's layers, after its own inputs and where its tokens stand."""
    names = [f"{name}.{i}" for i in range(cut.last - cut.first + 1) for name in ("key", "value")]
    past = [torch.zeros(ROWS, LENGTH, model.config.kv_dim) for _ in names]
    spread = ("spread", torch.arange(ROWS * PLACES).clamp(max=TOKENS - 1).reshape(ROWS, PLACES), {0: "B", 1: "S"})
    places = ("places", torch.arange(TOKENS), {0: "N"})
    inputs = [*inputs, spread, places, ("write_indices", torch.zeros(ROWS, dtype=torch.int64), {0: "B"})]
    return Plan(
        file=file,
        module=module,
        inputs=(*(example for _, example, _ in inputs), past),
        input_names=[*(name for name, _, _ in inputs), *(f"past_{name}" for name in names)],
        axes=(*(axes for _, _, axes in inputs), [{0: "B", 1: "T"} for _ in names]),
        output_names=[*outputs, *(f"present_{name}" for name in names)],
        weights=weights,
    )


def _pool(model: Decoder) -> Inputs:
    return [("pool", torch.zeros(POOL, model.config.dim), {0: "M"}), _tokens("index")]


def _segment_plan(model: Decoder, cut: Cut) -> Plan:
    kind = Segment if cut.number else FirstSegment
    inputs = [*(_pool(model) if cut.number else [_tokens("input_ids")]), _tokens("active", torch.bool)]
    file = cut.file("segment")
    outputs = ["hidden"] if cut.number else ["embedded", "hidden"]
    return _over_cache(file, kind(model, cut.first, cut.last), model, cut, inputs, outputs, f"{file}.data")


def _kv_plan(model: Decoder, cut: Cut) -> Plan:
    return _over_cache(cut.file("kv"), PropagateKV(model, cut.first, cut.last), model, cut, _pool(model), [], f"{cut.file('segment')}.data")


def _routed_plan(model: Decoder, cut: Cut) -> Plan:
    file = cut.file("segment")
    return _over_cache(file, Routed(model, cut.first), model, cut, [*_pool(model), _tokens("positions")], ["hidden"], f"{file}.data")


def _from_pool(file: str, module: nn.Module, model: Decoder, outputs: list[str]) -> Plan:
    """A graph over some rows of the pool, without caches."""
    inputs = (torch.zeros(POOL, model.config.dim), torch.zeros(TOKENS, dtype=torch.int64))
    return Plan(file, module, inputs, ["pool", "index"], ({0: "M"}, {0: "N"}), outputs, f"{file}.data")


def _similarity_plan(model: Decoder) -> Plan:
    inputs = (torch.zeros(POOL, model.config.dim), torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS, dtype=torch.int64))
    axes = ({0: "M"}, {0: "N"}, {0: "N"})
    return Plan(SIMILARITY_FILE, Similarity(), inputs, ["pool", "index", "before"], axes, ["similarity"], f"{SIMILARITY_FILE}.data")


def _head_plan(file: str, lm_head: nn.Linear) -> Plan:
    outputs = ["logits", "top_id", "top_prob", "margin", "entropy"]
    return Plan(file, Head(lm_head), (torch.zeros(TOKENS, lm_head.in_features),), ["exit_hidden"], ({0: "N"},), outputs, f"{file}.data")


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
    model, config = checkpoint.model, checkpoint.model.config
    return Manifest(
        format_version=FORMAT_VERSION,
        precision="fp32",
        vocab_size=config.vocab_size,
        dim=config.dim,
        kv_dim=config.kv_dim,
        num_layers=config.num_layers,
        max_positions=config.max_positions,
        start_id=checkpoint.conventions.start_id,
        stop_ids=checkpoint.conventions.stop_ids,
        tokenizer=TOKENIZER_FILE,
        similarity=SIMILARITY_FILE,
        segments=tuple(_segment_info(cut) for cut in cut_layers(model)),
        exits=tuple(
            ExitInfo(layer, exit_file(n), head_file(model, n, layer), gate_file(model, n, layer)) for n, layer in enumerate(config.exits)
        ),
        chat_template=TEMPLATE_FILE if checkpoint.conventions.chat_template is not None else None,
        generation=checkpoint.conventions.generation,
        files={path.name: FileInfo(sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir())},
        source=_source(checkpoint, checkpoint_path),
    )


def _segment_info(cut: Cut) -> SegmentInfo:
    if cut.routed:
        return SegmentInfo("routed", cut.first, cut.last, cut.file("segment"), None, cut.file("route"))
    return SegmentInfo("layers", cut.first, cut.last, cut.file("segment"), cut.file("kv") if cut.number else None)


def _source(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    evaluations = [line for line in checkpoint.metrics if "perplexity" in line and line["step"] <= checkpoint.step]
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
