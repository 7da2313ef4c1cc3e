"""bf16: built for CUDA, refused elsewhere, and right as far as a CPU can say it, which computes each node in
fp32 and rounds (tests/emulated.py).
"""

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

import source_models
from ease_common.errors import DeviceError, ExportError
from ease_export import verify
from ease_export.build import export_bundle
from ease_export.cli import main
from ease_export.verify import EPSILONS, TOLERANCES, verify_bundle
from ease_runtime.bundle.manifest import read_manifest
from ease_runtime.engine.engine import Engine
from ease_runtime.ort.bfloat import BITS, clear_not_finite, narrowed, widened
from ease_runtime.ort.device import Device, DeviceArray
from ease_runtime.ort.stack import OrtStack, open_stack
from ease_runtime.policies import make_policy
from ease_train.convert.huggingface import import_model
from ease_train.training.tensors import bytes_of
from emulated import EmulatedStack

NO_GPU = "no GPU is here (where there is a GPU: pip install 'ease-lm[cuda]')"
ELSEWHERE = Device("cpu", "CPUExecutionProvider", own_memory=True)
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def tied(precisions: tuple[Path, dict[str, Path]]) -> Made:
    return precisions[0], precisions[1]["bf16"]


@pytest.mark.parametrize("kind", ["tied", "blocks", "routed", "windowed"])
def test_it_is_the_checkpoint_up_to_bf16_s_rounding(
    tied: Made, brain: dict[str, Made], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the engine's own passes: caches, states, heads, gates, routes."""
    checkpoint, bundle = {**brain, "tied": tied}[kind]

    def emulated(bundle: Path, **_: Any) -> OrtStack:
        return EmulatedStack(bundle, num_threads=None)

    monkeypatch.setattr(verify, "open_stack", emulated)
    report = verify_bundle(bundle, checkpoint, 8)
    assert all(difference.ok for difference in report.differences), report
    largest = max(difference.relative for difference in report.differences if difference.output == "hidden")
    assert EPSILONS["bf16"] / 2 < largest < TOLERANCES["bf16"]


def test_a_device_s_memory_holds_the_same_bits(tied: Made) -> None:
    """Caches and states bound by their element type alone, in every catch-up."""

    def said(stack: OrtStack) -> list[list[tuple[int, int, float | None]]]:
        engine = Engine(stack, num_slots=3)
        policy = make_policy("max-prob", 0.02, stack.exit_layers)
        requests = [
            engine.start([5, 9, 2 + n], max_new_tokens=6, policy=policy, catch_up=catch_up)
            for n, catch_up in enumerate(("propagate", "recompute", "verify"))
        ]
        while engine.busy:
            engine.step()
        return [[(token.id, token.depth, token.confidence) for token in r.produced] for r in requests]

    host, device = (
        EmulatedStack(tied[1], num_threads=None, device=place)
        for place in (Device("cpu", "CPUExecutionProvider", own_memory=False), ELSEWHERE)
    )
    found = said(host)
    assert found == said(device)
    assert {depth for tokens in found for _, depth, _ in tokens} == {3, 6}
    assert host.read_states(np.arange(2)).dtype == np.float32
    assert device.pool.array.value.data_type() == "tensor(bfloat16)"  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["smollm2", "gemma3"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_checkpoint_in_bf16_is_kept_to_the_bit(family: str, tmp_path: Path) -> None:
    """Gemma's norms are no bf16, and stay fp32."""
    model = source_models.make_model(family).to(torch.bfloat16)
    source_models.write_model(model, tmp_path / "hf")
    import_model(str(tmp_path / "hf"), (2,), out=tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "bf16")
    written = b"".join(path.read_bytes() for path in (tmp_path / "bundle").glob("*.onnx*"))
    wide = []
    for name, weight in load_file(tmp_path / "checkpoint" / "model.safetensors").items():
        exact = bool((weight.bfloat16().float() == weight.float()).all())
        kept = weight.bfloat16() if exact else weight.float()
        assert bytes_of(kept).tobytes() in written, name
        wide += [] if exact else [name]
    assert bool(wide) == (family == "gemma3")
    assert all("norm" in name for name in wide)


def test_what_bf16_would_round_and_what_decides_stays_fp32(brain: dict[str, Made]) -> None:
    """Norms that were trained here, gates, routers and shares of words; what the host reads is fp32, too."""
    wide = dict[str, set[str]]()
    narrow = set[str]()
    for kind in ("blocks", "routed", "windowed"):
        for path in brain[kind][1].glob("*.onnx"):
            graph = onnx.load(path, load_external_data=False).graph
            for weight in graph.initializer:
                if weight.data_type == onnx.TensorProto.FLOAT and weight.dims:
                    wide.setdefault(path.name, set()).add(weight.name)
                elif weight.data_type == onnx.TensorProto.BFLOAT16:
                    narrow.add(weight.name)
            states = ("embedded", "hidden", "exit_hidden", "pool")
            for value in (*graph.input, *graph.output):
                if (kind_of := value.type.tensor_type.elem_type) in (1, 16):
                    bf16 = value.name in states or value.name.startswith(("past_", "present_"))
                    assert kind_of == (16 if bf16 else 1), (path.name, value.name)
    assert "gate.score.out.weight" in wide["gate_01.onnx"]
    assert {"ids", "log_shares"} & wide["reduced_head.onnx"] == {"log_shares"}
    assert any(name.startswith("routed.predictor.") for name in wide["route_02.onnx"])
    assert "router.out.weight" in wide["segment_02.onnx"]
    assert "blocks.0.attention_norm.weight" in wide["segment_01.onnx"], "of the windowed model: 1 + w"
    assert {"cos", "sin", "embed.weight", "lm_head.weight", "blocks.0.qkv.weight"} <= narrow
    assert not {name for names in wide.values() for name in names if "proj" in name}


def with_a_large_weight(checkpoint: Path, copy: Path) -> None:
    shutil.copytree(checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    weights["layers.4.mlp.up_proj.weight"][5, 3] = 70_000.0
    save_file(weights, copy / "model.safetensors")


def test_a_weight_past_fp16_is_built_in_bf16(tied: Made, tmp_path: Path) -> None:
    with_a_large_weight(tied[0], tmp_path / "checkpoint")
    with pytest.raises(
        ExportError,
        match=r"in fp16: layers\.4\.mlp\.up_proj\.weight holds inf at \[5, 3\] .*: --precision bf16 holds",
    ):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "fp16")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "bf16")
    graph = onnx.load(tmp_path / "bundle" / "segment_02.onnx").graph
    (weight,) = [w for w in graph.initializer if w.name == "blocks.1.mlp.up_proj.weight"]
    assert float(onnx.numpy_helper.to_array(weight)[5, 3]) == 70_144.0, "the next bf16"


def test_states_past_fp16_are_found_by_verify(tied: Made, tmp_path: Path) -> None:
    shutil.copytree(tied[0], tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    weights["layers.4.mlp.down_proj.weight"] *= (
        60_000.0 / weights["layers.4.mlp.down_proj.weight"].abs().max()
    )
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "fp16")
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--tokens", "4", "--device", "cpu"]
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "bundle"), *arguments])
    assert result.exit_code == 1
    assert "export it with --precision bf16 or fp32, which hold larger numbers than fp16: " in result.output


@pytest.mark.parametrize(("start_id", "same"), [(None, slice(0, None)), (7, slice(1, None))])
def test_verify_s_texts_begin_as_the_model_s_do(start_id: int | None, same: slice) -> None:
    stack: Any = SimpleNamespace(vocab_size=300, manifest=SimpleNamespace(start_id=start_id))
    plain: Any = SimpleNamespace(vocab_size=300, manifest=SimpleNamespace(start_id=None))
    ids = verify.drawn_ids(stack, 1, 9)
    np.testing.assert_array_equal(ids[same], verify.drawn_ids(plain, 1, 9)[same])
    assert start_id in (None, ids[0])


def test_a_weight_past_bf16_is_refused(tied: Made, tmp_path: Path) -> None:
    shutil.copytree(tied[0], tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    weights["embed.weight"][0, 0] = 3.4e38
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(ExportError, match=r"in bf16: embed\.weight holds inf at \[0, 0\]"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "bf16")


def test_the_cpu_is_refused_when_it_is_built(tied: Made, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["build", str(tied[0]), str(tmp_path / "b"), "--precision", "bf16", "--target", "cpu"]
    )
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "error: onnxruntime computes bf16 on CUDA alone; choose --target cuda, or --precision fp32, int8 or "
        "int4"
    ]


def test_a_graph_that_is_none_is_found_without_cuda(
    tied: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By onnx, since no graph runs then."""
    from ease_export import build

    write = build.write_graph

    def broken(plan: Any, *others: Any) -> None:
        write(plan, *others)
        if plan.file == "kv_02.onnx":
            model = onnx.load(others[1].folder / plan.file, load_external_data=False)
            model.graph.node[-1].op_type = "NoSuchOperator"
            onnx.save(model, others[1].folder / plan.file)

    monkeypatch.setattr(build, "write_graph", broken)
    monkeypatch.setattr(build, "why_no_cuda", lambda: "there is none")
    with pytest.raises(ExportError, match=r"in bf16 gives graphs that do not run: .*NoSuchOperator"):
        export_bundle(tied[0], tmp_path / "bundle", "bf16")


@pytest.mark.parametrize(
    ("device", "why"),
    [("auto", NO_GPU), ("cuda", NO_GPU), ("cpu", "--device cpu is asked for")],
)
def test_without_cuda_one_line_says_what_helps(
    tied: Made, monkeypatch: pytest.MonkeyPatch, device: str, why: str
) -> None:
    monkeypatch.setattr("ease_runtime.ort.stack.why_no_cuda", lambda: "no GPU is here")
    with pytest.raises(DeviceError) as raised:
        open_stack(tied[1], device=device)
    assert str(raised.value) == (
        f"{tied[1]} is in bf16, which onnxruntime computes on CUDA alone, and {why}; build one that runs on "
        "the CPU: ease-export build CHECKPOINT BUNDLE --precision fp32 --target cpu"
    )
    arguments = ["verify", str(tied[1]), "--checkpoint", str(tied[0]), "--device", device]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output) == (1, f"error: {raised.value}\n")


def test_an_unknown_device_is_named(tied: Made) -> None:
    with pytest.raises(DeviceError, match="unknown device 'cudda'; did you mean 'cuda'"):
        open_stack(tied[1], device="cudda")


def test_what_inspect_and_build_say(tied: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(env={"COLUMNS": "300"})
    result = runner.invoke(main, ["inspect", str(tied[1])])
    assert "bf16 with activations in bf16 for cuda (runs nowhere else)" in result.output
    monkeypatch.setattr("ease_export.build.export_bundle", lambda *_, **__: read_manifest(tied[1]))
    monkeypatch.setattr("ease_export.cli.why_no_cuda", lambda: "no GPU is here")
    result = runner.invoke(main, ["build", "checkpoint", "bundle", "--precision", "bf16"])
    assert "bundle: for cuda, 2 segments" in result.output
    assert "no graph of it was run here, since bf16 runs on CUDA alone, and no GPU is here" in result.output


def test_bits_are_rounded_as_torch_rounds_them() -> None:
    """Ties to even; every bf16 comes back as it is."""
    every = np.arange(1 << 16, dtype=BITS)
    wide = widened(every)
    expected = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16)
    np.testing.assert_array_equal(wide, expected.float().numpy())
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(narrowed(wide[finite], BITS), every[finite])
    numbers = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 1e3
    ties = widened(np.arange(0x3F80, 0x3FFF, dtype=BITS)) + np.float32(2.0**-8)
    for values in (numbers, ties):
        rounded = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(BITS)
        np.testing.assert_array_equal(narrowed(values, BITS), rounded)


def test_broken_rows_are_scrubbed() -> None:
    values = np.array([1.0, np.nan, -np.inf, 2.0, np.inf], np.float32)
    array = DeviceArray((5,), BITS, ELSEWHERE)
    array.write((values.view(np.uint32) >> 16).astype(BITS))
    with array.on_host() as bits:
        clear_not_finite(bits)
    np.testing.assert_array_equal(widened(array.read()), [1.0, 0.0, 0.0, 2.0, 0.0])
