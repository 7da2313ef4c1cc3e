"""int8, int4 and fp16 bundles: right, stored once, and the same to the bit however tokens are batched."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import tiny_model
from ease_export.build import export_bundle
from ease_export.cli import main
from ease_export.quantize import BITS, matrices, round_trip
from ease_export.verify import TOLERANCES, difference, verify_bundle
from ease_runtime.bundle.manifest import load_manifest
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.layout import Span
from ease_runtime.ort.buffers import RowCache
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy
from ease_train.training.checkpoint import load_checkpoint

PRECISIONS = ("fp32", "int8", "int4")
Made = tuple[Path, dict[str, Path]]  # a checkpoint, and its bundles by precision
NUM_TOKENS = 48


@pytest.fixture
def checkpoint(precisions: Made) -> Path:
    return precisions[0]


@pytest.fixture
def bundles(precisions: Made) -> dict[str, Path]:
    return precisions[1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bundle_is_its_checkpoint_with_weights_of_its_precision(
    bundles: dict[str, Path], checkpoint: Path, precision: str
) -> None:
    report = verify_bundle(bundles[precision], checkpoint, 20)
    assert report.precision == precision
    assert report.ok, report
    assert [exit_.layer for exit_ in report.rounding] == ([3, 6] if precision in BITS else [])
    for exit_ in report.rounding:
        low, high = exit_.interval
        assert exit_.num_places / 2 < exit_.agreed <= exit_.num_places
        assert 0 < low < exit_.agreed / exit_.num_places <= high <= 1


@pytest.mark.parametrize("precision", BITS)
def test_round_trip_is_close_and_not_the_same(checkpoint: Path, precision: str) -> None:
    model = load_checkpoint(checkpoint).model
    after_it = load_checkpoint(checkpoint).model
    round_trip(after_it, precision, {})
    for (_, before, bits), (_, after, _) in zip(
        matrices(model, precision), matrices(after_it, precision), strict=True
    ):
        most = {4: 0.25, 8: 0.01}[bits]  # what the smallest scale tried cuts off, of a block's largest number
        assert 0 < (before.weight - after.weight).abs().max() <= most * before.weight.abs().max()
    assert torch.equal(after_it.lm_head.weight, after_it.embed.weight)
    assert torch.equal(after_it.norm.weight, model.norm.weight)


@pytest.mark.parametrize("precision", BITS)
def test_verify_finds_a_weight_that_differs_by_one_step(
    bundles: dict[str, Path], checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    """Which the rounding of activations would hide."""
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    matrix = weights["layers.4.mlp.up_proj.weight"]
    matrix[5, :32] += (matrix[5, :32].max() - matrix[5, :32].min()) / (2 ** BITS[precision] - 1)
    save_file(weights, other / "model.safetensors")
    report = verify_bundle(bundles[precision], other, 8)
    assert not report.ok
    assert min(exit_.agreed / exit_.num_places for exit_ in report.rounding) > 0.5, (
        "both forms are of the same bundle"
    )


@pytest.mark.parametrize(("precision", "tied"), [("int8", False), ("int4", True)])
def test_rows_that_blocks_do_not_fill(tmp_path: Path, precision: str, tied: bool) -> None:
    """Width 80, which is no multiple of 32: the lookup and the head read the same bytes, and each embedding
    is cut to its width.
    """
    tiny_model.write_checkpoint(tmp_path / "checkpoint", (3, 6), dim=80, tie_embeddings=tied)
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", precision)
    report = verify_bundle(tmp_path / "bundle", tmp_path / "checkpoint", 20)
    assert report.ok, report
    head = external(tmp_path / "bundle", "head.onnx")
    first = external(tmp_path / "bundle", "segment_01.onnx")
    assert (first["embed.weight/numbers"] == head["lm_head.weight/numbers"]) == tied


def test_one_large_weight_is_no_fault(checkpoint: Path, tmp_path: Path) -> None:
    """It makes sums of numbers of very different sizes, which fp32 rounds further than others."""
    weights = load_file(checkpoint / "model.safetensors")
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    weights["layers.0.mlp.gate_proj.weight"][10, 3] = 1e4
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    report = verify_bundle(tmp_path / "bundle", tmp_path / "checkpoint", 20)
    assert report.ok, report
    assert max(difference.limit for difference in report.differences) > TOLERANCES["fp32"]


@pytest.mark.parametrize("context", [2, 20])
def test_verify_stays_within_a_small_context(tmp_path: Path, context: int) -> None:
    tiny_model.write_checkpoint(tmp_path / "checkpoint", (3, 6), max_positions=context)
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    report = verify_bundle(tmp_path / "bundle", tmp_path / "checkpoint")
    assert report.ok, report
    assert report.num_generated == context - 1


def external(bundle: Path, graph: str) -> dict[str, tuple[str, str]]:
    """Where each large weight of a graph is: file and offset."""
    tensors = onnx.load(bundle / graph, load_external_data=False).graph.initializer
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in tensors
        if tensor.external_data
    }
    return {name: (place["location"], place["offset"]) for name, place in places.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_graphs_share_is_stored_once(bundles: dict[str, Path], precision: str) -> None:
    bundle = bundles[precision]
    part = "/numbers" if precision in BITS else ""
    head = external(bundle, "head.onnx")
    first = external(bundle, "segment_01.onnx")
    assert first[f"embed.weight{part}"] == head[f"lm_head.weight{part}"]
    kv = external(bundle, "kv_02.onnx")
    second = external(bundle, "segment_02.onnx")
    assert f"blocks.2.kv.weight{part}" in kv
    assert kv.items() - second.items(), "keys' and values' rows of the packed product"
    tables = {first["cos"][0], first["sin"][0]}
    assert {file for file, _ in kv.values()} == {"segment_02.onnx.data", *tables}
    assert not (bundle / "kv_02.onnx.data").exists()


def test_only_matrices_of_layers_and_heads_are_quantised(bundles: dict[str, Path]) -> None:
    kinds = {}
    for path in sorted(bundles["int4"].glob("*.onnx")):
        kinds[path.name] = {
            node.op_type for node in onnx.load(path, load_external_data=False).graph.node if node.domain
        }
    quantised = {"segment_01.onnx": {"MatMulNBits", "GatherBlockQuantized"}}
    quantised |= {name: {"MatMulNBits"} for name in ("segment_02.onnx", "kv_02.onnx", "head.onnx")}
    for name in ("segment_01.onnx", "segment_02.onnx"):
        quantised[name] |= {"Mask", "FewOrMany"}
    assert kinds == {name: quantised.get(name, set()) for name in kinds}
    head = onnx.load(bundles["int4"] / "head.onnx", load_external_data=False).graph.node
    assert [a.i for node in head for a in node.attribute if a.name == "bits"] == [8]


def run_all(stack: OrtStack, num_rows: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same text in each of `num_rows` rows, `size` tokens a pass: hidden states after the last segment,
    caches, logits.
    """
    ids = np.random.default_rng(1).integers(0, stack.vocab_size, NUM_TOKENS)
    cache = stack.open_cache(num_rows)
    assert isinstance(cache, RowCache)
    states = []
    heads = []
    for start in range(0, NUM_TOKENS, size):
        spans = [Span(row, start, start + size) for row in range(num_rows)]
        inputs = np.tile(ids[start : start + size], num_rows)
        count = num_rows * size
        for segment in range(len(stack.layout)):
            out = stack.reserve_rows(2 * count, [inputs] if segment else [])
            stack.run_segment(segment, cache, spans, inputs, out)
            inputs = np.arange(out, out + count)
        states.append(stack.pool.states[inputs].reshape(num_rows, size, -1))
        heads.append(stack.run_exit(1, inputs).logits.copy().reshape(num_rows, size, -1))
    layers = range(len(cache.segment_of))
    rows = [[cache.read(i, row, NUM_TOKENS) for i in layers] for row in range(num_rows)]
    caches = np.moveaxis(np.array(rows), 0, 2)  # (layers, 2, rows, tokens, K)
    return np.concatenate(states, axis=1), caches, np.concatenate(heads, axis=1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_passes_are_bit_identical(bundles: dict[str, Path], precision: str) -> None:
    """Whatever the number of tokens of a pass and of rows: what `verify` and row-level exits rest on."""
    stack = OrtStack(bundles[precision])
    assert stack.exact
    stack.even = True
    states, caches, logits = run_all(stack, 1, NUM_TOKENS)
    for num_rows, size in ((1, 1), (1, 2), (1, 3), (1, 16), (2, 1), (3, 1), (3, 2), (4, 16)):
        found = run_all(stack, num_rows, size)
        for row in range(num_rows):
            for a, b in (
                (found[0][row], states[0]),
                (found[1][:, :, row], caches[:, :, 0]),
                (found[2][row], logits[0]),
            ):
                np.testing.assert_array_equal(a, b, err_msg=f"{num_rows} rows, {size} a pass")


def said(bundle: Path, *, doubles: bool) -> tuple[OrtStack, list[list[tuple[int, int, float | None]]]]:
    """Tokens, depths and confidences of several requests at once."""
    stack = OrtStack(bundle)
    stack.doubles = doubles
    for segment in stack.segments:
        segment.bindings.clear()  # those of the self-test
    engine = Engine(stack, num_slots=3, exact=True)
    policy = make_policy("max-prob", (0.1,) * (len(stack.exits) - 1), stack.exit_layers)
    prompts = ([5, 9, 2], [11, 3, 7, 7, 250], [40])
    sequences = [
        engine.start(prompt, max_new_tokens=9, policy=policy, catch_up=catch_up)
        for prompt, catch_up in zip(prompts, ("recompute", "verify", "recompute"), strict=True)
    ]
    while engine.busy:
        engine.step()
    return stack, [[(token.id, token.depth, token.confidence) for token in s.produced] for s in sequences]


@pytest.mark.parametrize("kind", ["tiny_bundle", "blocks", "routed_with_exits"])
def test_a_token_named_twice_changes_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    """Which is how passes get an even number of tokens, where a CPU's kernels need it."""
    made = request.getfixturevalue(kind)
    bundle = made if isinstance(made, Path) else made[1]
    plain, expected = said(bundle, doubles=False)
    stack, found = said(bundle, doubles=True)
    assert found == expected
    assert any(shape[-1] % 2 for segment in plain.segments for shape in segment.bindings)  # type: ignore[operator, index]
    assert not any(shape[-1] % 2 for segment in stack.segments for shape in segment.bindings)  # type: ignore[operator, index]


def test_fp16_is_fp16(bundles: dict[str, Path], checkpoint: Path) -> None:
    """For CUDA; on a CPU ONNX Runtime computes it with casts around what it has no kernels for."""
    graph = onnx.load(bundles["fp16"] / "segment_02.onnx", load_external_data=False).graph
    assert {tensor.data_type for tensor in graph.initializer if tensor.external_data} == {
        onnx.TensorProto.FLOAT16
    }
    report = verify_bundle(bundles["fp16"], checkpoint, 8)
    assert report.ok, report
    assert max(d.relative for d in report.differences) > TOLERANCES["fp32"]


@pytest.mark.parametrize("precision", BITS)
def test_for_cuda_whole_numbers_have_fp16_around(
    halves: dict[str, Path], bundles: dict[str, Path], checkpoint: Path, precision: str
) -> None:
    manifest = load_manifest(halves[precision])
    expected = load_manifest(bundles[precision])
    assert (manifest.activations, manifest.cache_layout, manifest.exactness) == ("fp16", "BTK", "rounding")
    assert (expected.activations, manifest.weights) == ("fp32", expected.weights)
    graph = onnx.load(halves[precision] / "segment_02.onnx", load_external_data=False).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    assert kinds <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8, onnx.TensorProto.INT64}
    assert any(node.op_type == "MatMulNBits" for node in graph.node)
    report = verify_bundle(halves[precision], checkpoint, 8)
    assert report.ok, report
    assert report.rounding == (), "on CUDA nothing rounds activations to int8"
    assert max(d.relative for d in report.differences) > TOLERANCES["fp32"]


@pytest.mark.parametrize(
    ("activations", "output", "relative", "ok"),
    [
        ("fp16", "top_prob", 0.9e-2, True),
        ("fp16", "top_prob", 1.1e-2, False),
        ("fp16", "margin", 1.1e-2, True),  # of two probabilities
        ("fp16", "margin", 2.1e-2, False),
        ("bf16", "top_prob", 7.9e-2, True),
        ("bf16", "top_prob", 8.1e-2, False),
        ("bf16", "margin", 15.9e-2, True),
        ("bf16", "margin", 16.1e-2, False),
        ("fp32", "margin", 1.1e-5, False),
    ],
)
def test_what_counts_as_rounding(activations: str, output: str, relative: float, ok: bool) -> None:
    stack: Any = SimpleNamespace(manifest=SimpleNamespace(activations=activations))
    expected = torch.tensor([[0.5, 1.0]] * 2)
    found = np.array([0.5, 1.0 - relative], np.float32)
    assert difference(stack, "head.onnx", output, found, expected).ok == ok


@pytest.mark.parametrize(
    ("cuda_works", "flags", "target", "why"),
    [
        (False, [], "cpu", " (what this machine runs; --target cuda is for GPUs)"),
        (False, ["--precision", "int4"], "cpu", " (what this machine runs; --target cuda is for GPUs)"),
        (False, ["--precision", "fp16"], "cuda", ""),
        (False, ["--precision", "bf16"], "cuda", ""),
        (False, ["--target", "cuda"], "cuda", ""),
        (
            True,
            [],
            "cuda",
            " (what this machine runs; --precision fp16 is faster there, --target cpu is for CPUs)",
        ),
        (True, ["--precision", "int4"], "cuda", " (what this machine runs; --target cpu is for CPUs)"),
        (True, ["--precision", "fp16"], "cuda", ""),
        (True, ["--target", "cpu"], "cpu", ""),
    ],
)
def test_the_target_is_what_this_machine_runs(
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    cuda_works: bool,
    flags: list[str],
    target: str,
    why: str,
) -> None:
    """Unless one is asked for, or the precision is of one only."""
    asked: dict[str, Any] = {}

    def export(*_: object, **given: Any) -> Any:
        asked.update(given)
        return load_manifest(bundles["fp32"])

    monkeypatch.setattr("ease_export.build.export_bundle", export)
    monkeypatch.setattr("ease_export.cli.why_no_cuda", lambda: None if cuda_works else "no GPU")
    result = CliRunner(env={"COLUMNS": "300"}).invoke(main, ["build", "checkpoint", "bundle", *flags])
    assert result.exit_code == 0, result.output
    assert asked["target"] == target
    assert result.output.startswith(f"bundle: for {target}{why}, 2 segments, ")


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["build", str(checkpoint), str(tmp_path / "bundle"), "--precision", "int8"]
    )
    assert result.exit_code == 0, result.output
    assert "int8" in CliRunner().invoke(main, ["inspect", str(tmp_path / "bundle")]).output
    result = CliRunner().invoke(
        main, ["verify", str(tmp_path / "bundle"), "--checkpoint", str(checkpoint), "--tokens", "8"]
    )
    assert (result.exit_code, "greedy tokens equal to torch's" in result.output) == (0, True), result.output
