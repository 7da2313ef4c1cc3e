"""The bundle against the checkpoint: every graph, the whole, every segmentation, and what a failed export
leaves.
"""

import errno
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import tiny_model
from ease_common.errors import CheckpointError, ExportError
from ease_export import build
from ease_export.build import export_bundle
from ease_export.cli import main
from ease_export.plan import GraphSpec, plan_graphs
from ease_export.trace import trace
from ease_export.verify import TOLERANCE, torch_greedy, verify_bundle
from ease_runtime.bundle.manifest import load_manifest
from ease_runtime.engine.engine import Engine
from ease_runtime.ort import stack as stack_module
from ease_runtime.ort.device import Device
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies.head import MaxProb
from ease_runtime.policies.thresholds import Thresholds
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import load_checkpoint, save_checkpoint
from ease_train.training.config import ModelConfig
from hit import interrupted

NUM_GREEDY = 200


def test_every_graph_equals_torch_and_greedy_tokens_agree(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    report = verify_bundle(tiny_bundle, tiny_checkpoint, NUM_GREEDY)
    assert max(d.relative for d in report.differences) <= TOLERANCE
    graphs = {d.graph for d in report.differences}
    assert {
        "segment_01.onnx",
        "segment_02.onnx",
        "segment_03.onnx",
        "kv_02.onnx",
        "kv_03.onnx",
        "exit_02.onnx + head.onnx",
    } <= graphs
    assert (report.agreed, report.num_generated) == (NUM_GREEDY, NUM_GREEDY)
    assert report.ok


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.attention.k_proj.weight",
        "exits.2.norm.weight",
        "lm_head.weight",
        "layers.5.mlp.down_proj.weight",
    ],
)
def test_verify_finds_a_weight_that_differs(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    other = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "model.safetensors")
    weights[name].view(-1)[5] += 0.5
    save_file(weights, other / "model.safetensors")
    assert not verify_bundle(tiny_bundle, other, 8).ok


def test_graphs_hold_standard_operators_only(tiny_bundle: Path) -> None:
    for path in sorted(tiny_bundle.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        functions = {("ease", function.name) for function in model.functions}
        inside = [node for function in model.functions for node in every_node(function.node)]
        nodes = [*model.graph.node, *inside]
        assert {("", ""), *functions} >= {(n.domain, n.op_type if n.domain else "") for n in nodes}, path.name
        assert "Shape" not in {node.op_type for node in nodes}, (
            f"{path.name}: on CUDA, what follows would run on the CPU"
        )
        opsets = {(o.domain, o.version) for o in model.opset_import}
        assert opsets == {("", 24), *([("ease", 1)] if functions else [])}, path.name
    operators = Counter(
        node.op_type
        for node in onnx.load(tiny_bundle / "segment_02.onnx", load_external_data=False).graph.node
    )
    assert operators["FewOrMany"] == 2
    assert operators["Mask"] == 1
    assert operators["TensorScatter"] == 4


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Also those of subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g.node)


def test_kv_graphs_name_their_segments_weights(tiny_bundle: Path) -> None:
    def places(name: str) -> set[tuple[str, int, int]]:
        graph = onnx.load(tiny_bundle / name, load_external_data=False).graph
        entries = [
            {e.key: e.value for e in tensor.external_data}
            for tensor in graph.initializer
            if tensor.external_data
        ]
        return {(e["location"], int(e["offset"]), int(e["offset"]) + int(e["length"])) for e in entries}

    assert not (tiny_bundle / "kv_02.onnx.data").exists()
    kv = places("kv_02.onnx")
    segment = places("segment_02.onnx")
    assert len(kv) == 4  # a product a layer, and the rotary tables
    assert len(kv - segment) == 2, "rows of the segment's products"
    for file, first, last in kv:
        assert any(file == f and start <= first and last <= stop for f, start, stop in segment)


@pytest.fixture(scope="module")
def cuts(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, tiny_checkpoint: Path
) -> dict[int, tuple[Path, Path]]:
    """The same model cut into 1, 2, 3 and 4 segments: number -> (checkpoint, bundle)."""
    made = {3: (tiny_checkpoint, tiny_bundle)}
    for exits in ((6,), (3, 6), (1, 3, 5, 6)):
        folder = tmp_path_factory.mktemp(f"cut{len(exits)}")
        tiny_model.write_checkpoint(folder / "checkpoint", exits)
        export_bundle(folder / "checkpoint", folder / "bundle")
        made[len(exits)] = (folder / "checkpoint", folder / "bundle")
    return made


def test_every_segmentation_gives_torchs_greedy_tokens(cuts: dict[int, tuple[Path, Path]]) -> None:
    """In one prefill of all but the last token, or token by token, and whatever the number of segments."""
    prompt = [5, 200, 31, 77]
    expected: list[int] | None = None
    for checkpoint_path, bundle in cuts.values():
        model = load_checkpoint(checkpoint_path).model.eval()
        engine = Engine(OrtStack(bundle))
        stepwise = [t.id for t in engine.generate(engine.start(prompt, max_new_tokens=NUM_GREEDY))]
        with torch.no_grad():
            assert torch_greedy(model, prompt, stepwise) == stepwise
        expected = expected or stepwise
        assert stepwise == expected, "the checkpoints are the same model"
        for length in (1, 17, NUM_GREEDY - 1):
            sequence = engine.start(prompt + expected[:length], max_new_tokens=1)
            assert [t.id for t in engine.generate(sequence)] == [expected[length]]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_no_half_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = []

    def fail_third(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise error
        (args[2].folder / f"file{len(calls)}").write_text("half")  # type: ignore[attr-defined]

    monkeypatch.setattr(build, "write_graph", fail_third)
    expected = ExportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_bundle(tiny_checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_older_bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")

    def full_disk(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_graph", full_disk)
    with pytest.raises(ExportError, match="No space left on device; no half bundle"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle")
    load_manifest(tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("precision", "value", "said"),
    [("fp32", float("nan"), "holds nan at [5, 3]"), ("fp16", 1e6, "in fp16: ")],
)
def test_a_weight_that_is_no_number_is_named(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, value: float, said: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    weights["layers.4.mlp.up_proj.weight"][5, 3] = value
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(ExportError, match=f"{re.escape(said)}.*") as raised:
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", precision)
    assert "layers.4.mlp.up_proj.weight" in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_that_does_not_run_does_not_replace_another(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    kept = (tmp_path / "bundle" / "manifest.json").read_bytes()
    write = build.write_graph

    def broken(plan: GraphSpec, *others: Any) -> None:
        write(plan, *others)
        if plan.file == "kv_02.onnx":
            (others[1].folder / plan.file).write_bytes(b"no graph")

    monkeypatch.setattr(build, "write_graph", broken)
    with pytest.raises(
        ExportError, match=r"in fp32 gives graphs that do not run: kv_02\.onnx cannot be loaded"
    ):
        export_bundle(tiny_checkpoint, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == kept


def test_weights_that_overflow_are_not_blamed_on_onnxruntime(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(ExportError, match="its first segment gives no finite numbers"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")


def test_export_does_not_replace_what_is_no_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    (tmp_path / "letters" / "manifest.json").write_text('{"name": "my web application"}')
    with pytest.raises(ExportError, match="is no bundle"):
        export_bundle(tiny_checkpoint, tmp_path / "letters")
    assert (tmp_path / "letters" / "mine.txt").read_text() == "dear"


@pytest.mark.parametrize("kept", [(3,), (1, 5), (6,)], ids=str)
def test_a_bundle_of_some_of_the_exits(
    cuts: dict[int, tuple[Path, Path]], tmp_path: Path, kept: tuple[int, ...]
) -> None:
    """It is the model of before with fewer places to leave, and is verified, and built again, as such."""
    checkpoint, whole = cuts[4]
    built = CliRunner().invoke(
        main,
        ["build", str(checkpoint), str(tmp_path / "some"), "--exits", ",".join(map(str, kept))],
    )
    assert built.exit_code == 0, built.output
    some = OrtStack(tmp_path / "some")
    assert some.exit_layers == tuple(sorted({*kept, 6}))
    assert verify_bundle(tmp_path / "some", checkpoint, 8).ok
    told = [
        [
            (token.id, token.depth)
            for token in engine.generate(
                engine.start([5, 200], max_new_tokens=24, policy=only_at(kept, engine.stack.exit_layers))
            )
        ]
        for engine in (Engine(OrtStack(whole)), Engine(some))
    ]
    assert told[0] == told[1]


def only_at(kept: tuple[int, ...], layers: tuple[int, ...]) -> MaxProb:
    """Leaves at the first of the kept exits that is sure at all."""
    return MaxProb(Thresholds.of(["0.02" if layer in kept else "off" for layer in layers[:-1]] or None))


def test_exits_that_a_checkpoint_does_not_have_are_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no exit after layer 1, expected some of: "):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", exits=[1])
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_without_the_gates_of_a_bundle_is_told(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    gated = replace(checkpoint.model.config, gates=checkpoint.model.config.exits[:1])
    recipe = replace(checkpoint.recipe, model=gated)
    save_checkpoint(replace(checkpoint, recipe=recipe, model=Decoder(gated)), tmp_path / "gated")
    export_bundle(tmp_path / "gated", tmp_path / "bundle")
    with pytest.raises(ExportError, match="was not exported from"):
        verify_bundle(tmp_path / "bundle", tiny_checkpoint, 8)


def test_verify_runs_where_buffers_are_bound_by_address(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: states and caches are read from the device's memory."""
    elsewhere = Device("cpu", "CPUExecutionProvider", own_memory=True)
    monkeypatch.setattr(stack_module, "choose_device", lambda name: elsewhere)
    assert verify_bundle(tiny_bundle, tiny_checkpoint, 8, "cuda").ok


def test_an_interrupted_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = ["build", str(tiny_checkpoint), str(tmp_path / "bundle")]
    code, lines = interrupted(("open", "config.json", 1), signal.SIGINT, "ease_export", *command)
    assert (code, lines[-1]) == (130, "interrupted; run the command again")
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_number_to_trace_with_stays_in_a_graph(dtype: torch.dtype) -> None:
    """As those of a reduced head's small weights did, which torch.onnx cast to fp32 by itself."""
    sizes = {"dim": 64, "num_layers": 2, "exits": (1, 2), "exit_head": "reduced", "exit_vocab_size": 90}
    model = Decoder(ModelConfig(vocab_size=320, max_positions=64, **sizes)).eval()
    (plan,) = (plan for plan in plan_graphs(model, "BTK", dtype) if plan.file == "reduced_head.onnx")
    graphs = []
    for seed in range(2):
        torch.manual_seed(seed)
        graphs.append(trace(plan, dtype).SerializeToString())
    assert graphs[0] == graphs[1]
