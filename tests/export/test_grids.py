"""Weights that come in whole numbers: kept in a checkpoint beside the weights, and used as they are where
nobody has trained them since.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from onnx import helper

import tiny_model
from ease_common.errors import CheckpointError, DataError
from ease_export.build import export_bundle
from ease_export.gptq import calibration_ids, quantize
from ease_export.quantize import (
    OUTER_BITS,
    WeightQuantizer,
    add_contrib_domain,
    matrices,
    round_trip,
    rounded,
    rounded_outer,
)
from ease_export.verify import verify_bundle
from ease_export.weights import GraphTensor
from ease_runtime.bundle.manifest import WeightForm, load_manifest
from ease_runtime.ort.sessions import load_session, start_thread_pool
from ease_train.convert.gguf import GRIDS, PackedTensor
from ease_train.convert.text_format import TextFormat
from ease_train.training.checkpoint import load_checkpoint, save_checkpoint

HALVES = {Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.Q8_0: (0,)}
OF_LAYERS = (Type.Q4_1, Type.Q4_0, Type.Q4_K, Type.Q8_0, Type.Q6_K)


def packed_tensor(kind: Type, shape: tuple[int, int], seed: int = 0, size: float = 1.0) -> PackedTensor:
    """A tensor of random bytes, whose scales and offsets are numbers of this size."""
    rng = np.random.default_rng(seed)
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, num_bytes), dtype=np.uint8)
    for place in HALVES[kind]:
        halves = rng.normal(scale=size, size=(*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., place : place + 2] = halves.view(np.uint8)
    return PackedTensor("name", kind, shape, blocks.reshape(shape[0], -1))


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.name)
def test_a_grid_is_what_gguf_makes_of_its_bytes(kind: Type) -> None:
    tensor = packed_tensor(kind, (12, 768))
    for heads in (0, 3):
        turned = replace(tensor, heads=heads)
        grid = turned.grid()
        assert grid is not None
        expected = turned.floats().numpy()
        np.testing.assert_array_equal(grid.dequantized(768), expected)
        assert grid.is_exactly(expected)
        assert not grid.is_exactly(np.nextafter(expected, np.float32(np.inf)))
        if grid.offsets is None:
            np.testing.assert_array_equal(grid.widened().dequantized(768), expected)


def test_other_types_have_none() -> None:
    tensor = PackedTensor("name", Type.F32, (4, 32), np.zeros((4, 32), np.float32))
    assert tensor.grid() is None


@pytest.fixture(scope="module")
def on_grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers hold every type of grid, one after the other, and whose tied embedding is
    Q6_K.
    """
    path = tmp_path_factory.mktemp("grids") / "checkpoint"
    tiny_model.write_checkpoint(path, (3, 6), dim=256, ffn_dim=512, tie_embeddings=True)
    checkpoint = load_checkpoint(path)
    grids = {}
    for number, (name, module, bits) in enumerate(matrices(checkpoint.model, "int4")):
        kind = OF_LAYERS[number % len(OF_LAYERS)] if bits < OUTER_BITS else Type.Q6_K
        tensor = packed_tensor(kind, tuple(module.weight.shape), seed=number)
        values = tensor.floats()
        size = float(module.weight.detach().std() / values.std())
        tensor = packed_tensor(kind, tuple(module.weight.shape), seed=number, size=size)
        with torch.no_grad():
            module.weight.copy_(tensor.floats())
        grid = tensor.grid()
        assert grid is not None
        grids["embed.weight" if bits == OUTER_BITS else f"{name}.weight"] = grid
    save_checkpoint(replace(checkpoint, grids=grids), path)
    return path


def test_a_checkpoint_keeps_them(on_grids: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(on_grids)
    weights = checkpoint.model.state_dict()
    assert {grid.kind for grid in checkpoint.grids.values()} == {kind.name for kind in GRIDS}
    assert all(grid.is_exactly(weights[name].numpy()) for name, grid in checkpoint.grids.items())
    save_checkpoint(checkpoint, tmp_path / "again")
    assert (tmp_path / "again" / "grids.safetensors").read_bytes() == (
        on_grids / "grids.safetensors"
    ).read_bytes()


def test_a_damaged_file_of_them_is_said(on_grids: Path, tmp_path: Path) -> None:
    shutil.copytree(on_grids, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "grids.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(("target", "reduction"), [("cpu", "ReduceSum"), ("cuda", "ReduceMean")])
def test_a_bundle_computes_with_the_file_s_own_numbers(
    on_grids: Path, tmp_path: Path, target: str, reduction: str
) -> None:
    """In fp16, for CUDA, up to their scales' rounding."""
    export_bundle(on_grids, tmp_path / "bundle", "int4", target=target)
    report = verify_bundle(tmp_path / "bundle", on_grids, 8)
    assert report.ok, report
    assert load_manifest(tmp_path / "bundle").weights == WeightForm(4, 32, symmetric=False, exact_grid=True)
    graph = onnx.load(tmp_path / "bundle" / "segment_01.onnx", load_external_data=False).graph
    sums = [
        node.input[0] for node in graph.node if node.op_type == reduction and "block_sums" in node.output[0]
    ]
    assert sums
    assert len(sums) == len(set(sums)), "products of one state share its sums"
    plain = load_checkpoint(on_grids)
    rounded_ = WeightQuantizer(plain.model, "int4", {}).form
    assert rounded_ == WeightForm(4, 32, symmetric=False, exact_grid=False)


def test_what_has_been_trained_since_is_rounded(on_grids: Path, tmp_path: Path) -> None:
    """And nothing else."""
    checkpoint = load_checkpoint(on_grids)
    attention = checkpoint.model.layers[1].attention  # type: ignore[union-attr]
    with torch.no_grad():
        attention.k_proj.weight[3, 5] += 0.01  # type: ignore[index, operator]
    quantizer = WeightQuantizer(checkpoint.model, "int4", checkpoint.grids)
    kinds = {
        name: quantizer.by_weight[id(module.weight)].kind
        for name, module, _ in matrices(checkpoint.model, "int4")
    }
    assert [name for name, kind in kinds.items() if kind == "rounded"] == ["layers.1.attention.k_proj"]
    assert not quantizer.form.exact_grid


def test_int8_keeps_what_is_symmetric(on_grids: Path) -> None:
    checkpoint = load_checkpoint(on_grids)
    name, grid = next((name, grid) for name, grid in checkpoint.grids.items() if grid.kind == "Q4_0")
    middle = np.full(grid.scales.shape, grid.middle, np.uint8)
    grids = {**checkpoint.grids, name: replace(grid, kind="with zero points", zeros=middle)}
    quantizer = WeightQuantizer(checkpoint.model, "int8", grids)
    kinds = {matrix.kind for matrix in quantizer.matrices}
    assert kinds == {"rounded", "Q4_0", "Q6_K", "Q8_0"}
    assert {matrix.grid().bits for matrix in quantizer.matrices} == {8}


def product(quantizer: WeightQuantizer, weight: GraphTensor, state: np.ndarray) -> np.ndarray:
    """What a graph of one product of some states with a matrix gives when it is quantised."""
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", weight.shape[1]])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    weights = quantizer.rewrite(model.graph, {"w": weight})
    named = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(made.array(), name) for name, made in weights.items() if name in named
    )
    add_contrib_domain(model)
    own_threads = not start_thread_pool.cache_info().currsize
    session = load_session(Path("g"), 3, changed=model.SerializeToString(), own_threads=own_threads)
    found: np.ndarray = session.run(None, {"x": state})[0]
    return found


@pytest.mark.parametrize("kind", [None, Type.Q4_0, Type.Q4_1])
def test_a_product_of_several_matrices_is_theirs(on_grids: Path, kind: Type | None) -> None:
    """Side by side, to the bit: blocks run along a row, which stays whole."""
    checkpoint = load_checkpoint(on_grids)
    attention = checkpoint.model.layers[0].attention
    parts = [attention.k_proj.weight, attention.v_proj.weight]  # type: ignore[union-attr]
    grids = {}
    for number, name in enumerate(("k_proj", "v_proj")):
        if kind is not None:
            tensor = packed_tensor(kind, tuple(parts[number].shape), seed=number)  # type: ignore[arg-type, union-attr]
            grid = tensor.grid()
            assert grid is not None
            grids[f"layers.0.attention.{name}.weight"] = grid
            parts[number].data.copy_(tensor.floats())  # type: ignore[union-attr]
    whole = GraphTensor.of_weights(tuple(parts), torch.float32)  # type: ignore[arg-type]
    quantizer = WeightQuantizer(checkpoint.model, "int4", grids)
    state = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    (one,) = quantizer.held(whole)
    assert one.rows == whole.shape[0]
    alone = [GraphTensor.of_weights((part,), torch.float32) for part in parts]  # type: ignore[arg-type]
    expected = np.concatenate([product(quantizer, part, state) for part in alone], axis=1)
    np.testing.assert_array_equal(product(quantizer, whole, state), expected)


def test_matrices_of_different_forms_are_products_side_by_side(on_grids: Path) -> None:
    """To the bit."""
    checkpoint = load_checkpoint(on_grids)
    attention = checkpoint.model.layers[0].attention
    parts = [attention.q_proj.weight, attention.k_proj.weight]  # type: ignore[union-attr]
    whole = GraphTensor.of_weights(tuple(parts), torch.float32)  # type: ignore[arg-type]
    quantizer = WeightQuantizer(checkpoint.model, "int4", checkpoint.grids)
    assert len(quantizer.held(whole)) == 2
    alone = [GraphTensor.of_weights((part,), torch.float32) for part in parts]  # type: ignore[arg-type]
    state = np.random.default_rng(0).normal(size=(4, whole.shape[1])).astype(np.float32)
    expected = np.concatenate([product(quantizer, part, state) for part in alone], axis=1)
    np.testing.assert_array_equal(product(quantizer, whole, state), expected)


@pytest.mark.parametrize("width", [64, 80, 576])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_no_worse_than_by_whole_ranges(width: int, bits: int) -> None:
    """Block by block: the range that just holds its numbers is one of those tried."""
    matrix = np.random.default_rng(0).normal(size=(7, width)).astype(np.float32)
    grid = rounded(torch.from_numpy(matrix), bits)
    most = (1 << bits) - 1
    found = grid.dequantized(width)
    assert found.shape == matrix.shape
    for block in (slice(first, first + grid.block) for first in range(0, width, grid.block)):
        part = matrix[:, block]
        high = part.max(axis=1, keepdims=True).clip(min=0)
        low = part.min(axis=1, keepdims=True).clip(max=0)
        scale = (high - low) / most
        zero = np.round(-low / scale)
        plain = (np.clip(np.round(part / scale + zero), 0, most) - zero) * scale
        error = ((found[:, block] - part) ** 2).sum(axis=1)
        assert (error <= ((plain - part) ** 2).sum(axis=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("width", [64, 80, 576])
def test_heads_are_rounded_to_the_nearest_number(width: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(7, width)).astype(np.float32)
    grid = rounded_outer(torch.from_numpy(matrix))
    assert grid.form == (8, 64, True, True)
    scale = np.repeat(np.abs(grid.scales), grid.block, axis=1)[:, :width]
    cut = np.abs(matrix) > 127 * scale  # the largest, on the other side
    error = np.abs(grid.dequantized(width) - matrix)
    assert (error <= np.where(cut, 1.0, 0.5 + 1e-3) * scale).all()


@pytest.mark.parametrize("dim", [64, 80])
def test_gptq_changes_outputs_less_than_rounding_each_number(dim: int, tmp_path: Path) -> None:
    """For the text that it read; and what it gives is what `build` uses, as it is."""
    tiny_model.write_checkpoint(tmp_path / "checkpoint", (3, 6), dim=dim, exit_adapter="block")
    plain = load_checkpoint(tmp_path / "checkpoint")
    ids = calibration_ids(plain, None, 2048)
    with torch.no_grad():
        expected = plain.model(ids)
        one_by_one = load_checkpoint(tmp_path / "checkpoint").model
        round_trip(one_by_one, "int4", {})
        of_rounding = (one_by_one(ids) - expected).square().mean()
    done: list[int] = []
    quantised, weights = quantize(plain, ids, done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    with torch.no_grad():
        assert torch.equal(plain.model(ids), expected)  # which is left as it was
    save_checkpoint(quantised, tmp_path / "quantised", weights)
    again = load_checkpoint(tmp_path / "quantised")
    quantizer = WeightQuantizer(again.model, "int4", again.grids)
    assert {matrix.kind for matrix in quantizer.matrices if matrix.bits == 4} == {"gptq"}
    round_trip(again.model, "int4", again.grids)
    with torch.no_grad():
        assert (again.model(ids) - expected).square().mean() < 0.8 * of_rounding


def test_too_little_text_is_said(on_grids: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "And"}\n' * 20, encoding="utf-8")
    with pytest.raises(DataError, match=r"short.jsonl has \d+ tokens; calibration needs 288 at least"):
        calibration_ids(load_checkpoint(on_grids), str(tmp_path / "short.jsonl"), 4096)


def test_texts_to_calibrate_with_need_no_token_between_them(on_grids: Path) -> None:
    loaded = load_checkpoint(on_grids)
    bare = replace(loaded, text_format=TextFormat(None, ()))
    with_ends, without = (calibration_ids(checkpoint, None, 512) for checkpoint in (loaded, bare))
    assert with_ends.shape == without.shape
    assert with_ends[0, 0] not in without[0, :4]
