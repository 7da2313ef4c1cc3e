"""Cut a checkpoint at its exits and write the bundle: graphs, weights, tokenizer, manifest.

    export_bundle(Path("runs/demo/checkpoint"), Path("runs/demo/bundle"))

The bundle is written aside and renamed, so a killed export leaves nothing under the final name.
"""

import json
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from ease_common.errors import EaseError, ExportError
from ease_common.files import written_aside
from ease_export.plan import (
    REDUCED_HEAD_FILE,
    SIMILARITY_FILE,
    Cut,
    GraphSpec,
    block_file,
    cut_layers,
    exit_file,
    gate_file,
    head_file,
    plan_graphs,
)
from ease_export.quantize import BITS, WeightQuantizer, add_contrib_domain
from ease_export.trace import Tracer
from ease_export.weights import WeightFiles, graph_weights, keep_norms
from ease_runtime.bundle.manifest import (
    CACHE_LAYOUTS,
    FLOATS,
    FORMAT_VERSION,
    MANIFEST_FILE,
    OF_CUDA,
    WEIGHT_BITS,
    ExitInfo,
    FileInfo,
    Manifest,
    SegmentInfo,
    WeightForm,
    sha256_of,
)
from ease_runtime.ort.device import CUDA, why_no_cuda
from ease_runtime.ort.load_tests import run_every_graph
from ease_runtime.ort.stack import OrtStack
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import TEMPLATE_FILE, Checkpoint, load_checkpoint, not_finite, with_exits

TOKENIZER_FILE = "tokenizer.json"
OF_ONNX = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_bundle(
    checkpoint_path: Path,
    bundle: Path,
    precision: str = "fp32",
    calibration: dict[str, Any] | None = None,
    target: str | None = None,
    exits: Collection[int] = (),
) -> Manifest:
    """Export a checkpoint in one of manifest.PRECISIONS, with a calibration that holds for it; what was
    written is loaded before it gets its name.

    `target` is one of manifest.TARGETS; without it, "cuda" for fp16 and bf16, and "cpu" for all else. `exits`
    are the layers whose exits the bundle gets, beside the last; without them, all. Raises CheckpointError,
    for layers without an exit, too; ExportError when something is at `bundle` that is no bundle, when a
    weight is no finite number, or when onnxruntime does not run the graphs. A bundle of before is then still
    there.
    """
    target = target or target_of(precision)
    if (precision, target) == ("bf16", "cpu"):
        raise ExportError(
            "onnxruntime computes bf16 on CUDA alone; choose --target cuda, or --precision fp32, int8 or int4"
        )
    if (precision, target) == ("fp16", "cpu"):
        raise ExportError("fp16 is slow on a CPU; choose --target cuda, or --precision fp32, int8 or int4")
    if bundle.exists() and not is_bundle(bundle):
        raise ExportError(f"{bundle} is there already and is no bundle; choose another name, or remove it")
    try:
        with written_aside(bundle) as folder:
            manifest = write_bundle(checkpoint_path, folder, precision, target, calibration or {}, exits)
            check_runs(folder, checkpoint_path, precision)
    except OSError as error:
        raise ExportError(
            f"could not write {bundle}: {error.strerror or error}; no half bundle is left there"
        ) from None
    return manifest


def target_of(precision: str) -> str:
    """The device that a precision is for, where none is asked for."""
    return "cuda" if precision in OF_CUDA else "cpu"


def activations_of(precision: str, target: str) -> str:
    """What is around the weights: 16 bits on CUDA, where FlashAttention takes nothing wider, but for fp32."""
    if target == "cpu" or precision == "fp32":
        return "fp32"
    return "bf16" if precision == "bf16" else "fp16"


def write_bundle(
    checkpoint_path: Path,
    folder: Path,
    precision: str,
    target: str,
    calibration: dict[str, Any],
    exits: Collection[int] = (),
) -> Manifest:
    """Write all files of a bundle into an empty folder, weight by weight.

    Raises CheckpointError, ExportError, OSError.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    if exits:
        checkpoint = with_exits(checkpoint, exits)
    model = checkpoint.model.eval()
    check_finite(model, str(checkpoint_path))
    activations = activations_of(precision, target)
    dtype = TYPES[activations]
    if activations in OF_CUDA:
        check_finite(model, f"{checkpoint_path} in {activations}", dtype)
    quantizer = None
    if precision in BITS:
        quantizer = WeightQuantizer(model, precision, checkpoint.grids, FLOATS[activations])
    tracer = Tracer(model, dtype)
    files = WeightFiles(folder)
    for plan in plan_graphs(model, CACHE_LAYOUTS[target], dtype):
        write_graph(plan, tracer, files, quantizer)
    checkpoint.tokenizer.save(str(folder / TOKENIZER_FILE))
    if (template := checkpoint.text_format.chat_template) is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    form = quantizer.form if quantizer else WeightForm(WEIGHT_BITS[precision])
    manifest = describe(checkpoint, checkpoint_path, folder, precision, target, form, calibration)
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def check_finite(model: Decoder, what: str, dtype: torch.dtype | None = None) -> None:
    """Raise ExportError for the first weight that holds NaN or infinity, or would in another type."""
    for name, weight in model.state_dict().items():
        if where := not_finite(weight, dtype):
            larger = "; fp16 ends at 65504: --precision bf16 holds more (for CUDA), and so does fp32"
            remedy = larger if dtype is torch.float16 else "; nothing that it says would mean anything"
            raise ExportError(f"{what}: {name} {where}{remedy}")


def check_runs(folder: Path, checkpoint_path: Path, precision: str) -> None:
    """Load a bundle as whoever uses it will, and run each graph once; in bf16 without CUDA, look at them as
    far as onnx can.

    Raises ExportError when onnxruntime does not, or onnx finds fault.
    """
    try:
        if precision != "bf16":
            run_every_graph(OrtStack(folder, num_threads=None))
        elif why_no_cuda() is None:
            OrtStack(folder, num_threads=None, device=CUDA)  # which runs them
        else:
            for path in sorted(folder.glob("*.onnx")):
                onnx.checker.check_model(path, full_check=True)
    except (EaseError, RuntimeError, *OF_ONNX) as error:  # the second is ONNX Runtime's
        reason = str(error).splitlines()[0].replace(f"{folder}/", "")
        raise ExportError(
            f"{checkpoint_path} in {precision} gives graphs that do not run: {reason}"
        ) from None


def is_bundle(folder: Path) -> bool:
    """Whether a directory's manifest is that of a bundle, of this format or an older one; web applications
    have a `manifest.json`, too.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest


def write_graph(
    plan: GraphSpec, tracer: Tracer, files: WeightFiles, quantizer: WeightQuantizer | None = None
) -> None:
    """Trace one graph, and write it with its weights."""
    proto = tracer.graph(plan)
    weights = graph_weights(plan.module, tracer.dtype)
    if tracer.dtype is torch.bfloat16:
        keep_norms(proto.graph, weights, plan.module)
    if quantizer is not None:
        weights = quantizer.rewrite(proto.graph, weights)
        add_contrib_domain(proto)
    files.fill(proto.graph, weights, plan.weights)
    onnx.save(proto, files.folder / plan.file)


def describe(
    checkpoint: Checkpoint,
    checkpoint_path: Path,
    folder: Path,
    precision: str,
    target: str,
    form: WeightForm,
    calibration: dict[str, Any],
) -> Manifest:
    """The manifest of the files written so far."""
    activations = activations_of(precision, target)
    model = checkpoint.model
    config = checkpoint.model.config
    return Manifest(
        format_version=FORMAT_VERSION,
        target=target,
        precision=precision,
        activations=activations,
        weights=form,
        cache_layout=CACHE_LAYOUTS[target],
        exactness="rounding" if activations in OF_CUDA or precision == "int4" else "bits",
        vocab_size=config.vocab_size,
        dim=config.dim,
        kv_dim=config.kv_dim,
        num_kv_heads=config.num_kv_heads,
        num_layers=config.num_layers,
        max_positions=config.max_positions,
        start_id=checkpoint.text_format.start_id,
        stop_ids=tuple(token for token in checkpoint.text_format.stop_ids if token < config.vocab_size),
        tokenizer=TOKENIZER_FILE,
        similarity=SIMILARITY_FILE,
        segments=tuple(_segment_info(cut) for cut in cut_layers(model)),
        exits=tuple(
            ExitInfo(
                layer,
                exit_file(n),
                head_file(model, n, layer),
                gate_file(model, n, layer),
                block_file(model, n, layer),
            )
            for n, layer in enumerate(config.exits)
        ),
        drafting_head=REDUCED_HEAD_FILE if model.reduced_head is not None else None,
        chat_template=TEMPLATE_FILE if checkpoint.text_format.chat_template is not None else None,
        special_tokens=checkpoint.text_format.special_tokens,
        generation=checkpoint.text_format.generation,
        calibration=calibration,
        files={
            path.name: FileInfo(sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir())
        },
        source=_source(checkpoint, checkpoint_path),
    )


def _segment_info(cut: Cut) -> SegmentInfo:
    if cut.routed:
        return SegmentInfo("routed", cut.first, cut.last, cut.file("segment"), None, cut.file("route"))
    return SegmentInfo(
        "layers", cut.first, cut.last, cut.file("segment"), cut.file("kv") if cut.number else None
    )


def _source(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    evaluations = [
        line for line in checkpoint.metrics if "perplexity" in line and line["step"] <= checkpoint.step
    ]
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
