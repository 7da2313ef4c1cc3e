"""Devices: which one is chosen, and that with memory of its own nothing large crosses to the host.

Without a GPU the same code runs with ONNX Runtime's memory on the CPU; tests marked `cuda` run where there is
one.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ease_common.errors import BundleError, DeviceError
from ease_runtime.bundle.manifest import load_manifest, read_manifest
from ease_runtime.engine.engine import CATCH_UPS, Engine
from ease_runtime.engine.layout import Call, Span
from ease_runtime.engine.probe import CallProbe
from ease_runtime.engine.sampling import GumbelSampler
from ease_runtime.engine.sequence import Token
from ease_runtime.ort import device as device_module
from ease_runtime.ort import stack as stack_module
from ease_runtime.ort.device import CPU, CUDA, Device, DeviceArray, choose_device, why_no_cuda
from ease_runtime.ort.stack import OrtStack, open_stack
from ease_runtime.policies import FULL_DEPTH, make_policy

ELSEWHERE = Device("cpu", "CPUExecutionProvider", own_memory=True)  # bound by address, never a numpy array


def decode(stack: OrtStack) -> list[list[Token]]:
    """Every catch-up and kind of policy, three rows at a time."""
    layers = stack.exit_layers
    requests = []
    engine = Engine(stack, num_slots=3)
    for i, catch_up in enumerate(CATCH_UPS):
        for policy in (
            FULL_DEPTH,
            make_policy("max-prob", [0.4], layers),
            make_policy("similarity", [0.6], layers),
        ):
            prompt = [1 + i, 5, 9] * (4 + 9 * i)
            sampler = GumbelSampler(0.8, 0, 1.0, i)
            requests.append(
                engine.start(prompt, max_new_tokens=25, policy=policy, catch_up=catch_up, sampler=sampler)
            )
    while engine.busy:
        engine.step()
    return [request.produced for request in requests]


def test_memory_of_its_own_gives_the_same_bits(
    tiny_bundle: Path, tiny_stack: OrtStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the pool is copied over the host when it is full, without losing a state; caches grow with the
    texts.
    """
    monkeypatch.setattr("ease_runtime.ort.buffers.DEVICE_STEP", 32)
    stack = OrtStack(tiny_bundle, device=ELSEWHERE)
    assert decode(stack) == decode(tiny_stack)
    assert stack.pool.serial >= 1


def test_a_cache_is_as_long_as_its_texts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ease_runtime.ort.buffers.DEVICE_STEP", 32)
    stack = OrtStack(tiny_bundle, device=ELSEWHERE)
    cache = stack.open_cache(2)
    row = stack.reserve_rows(200, [])

    def write(slot: int, start: int, stop: int) -> None:
        for number in range(3):
            inputs = np.arange(start, stop) % 7
            stack.run_segment(number, cache, [Span(slot, start, stop)], inputs, row)

    lengths, held = [], []
    for slot, start, stop in [(0, 0, 5), (1, 0, 40), (1, 40, 41), (1, 41, 70), (1, 10, 11), (1, 11, 50)]:
        write(slot, start, stop)
        lengths.append(cache.length)
        held.append(cache.read(5, 0, 5))
    assert lengths == [32, 64, 64, 96, 32, 64]  # the last but one text was cut
    assert all((values == held[0]).all() for values in held)
    assert held[0].any()
    cache.free(1)
    write(0, 5, 6)
    assert cache.length == 32


def test_nothing_large_crosses_to_the_host(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither caches nor states while tokens are decoded, in a pool that is large enough; logits, from which
    tokens are drawn here, do.
    """
    monkeypatch.setattr("ease_runtime.ort.buffers.POOL_ROWS", 5000)
    monkeypatch.setattr("ease_runtime.ort.buffers.DEVICE_STEP", 32)
    stack = OrtStack(tiny_bundle, device=ELSEWHERE)

    read = DeviceArray.read

    def crossing(self: DeviceArray, *rows: int) -> np.ndarray:
        if self.shape[1:] == (stack.vocab_size,):
            return read(self, *rows)
        raise AssertionError("a buffer was copied to the host")

    monkeypatch.setattr(DeviceArray, "read", crossing)
    produced = decode(stack)
    assert all(len(tokens) == 25 for tokens in produced)
    with pytest.raises(AssertionError, match="copied to the host"):
        stack.pool.read(np.arange(2))


def test_a_broken_row_is_scrubbed_there_too(tiny_bundle: Path) -> None:
    stack = OrtStack(tiny_bundle, device=ELSEWHERE)
    engine = Engine(stack, num_slots=2)
    list(engine.generate(engine.start([1, 2, 3], max_new_tokens=2)))
    with engine.cache.buffers[0][0].on_host() as keys:  # type: ignore[attr-defined]
        keys[1, :, 3] = np.nan
    engine.cache.scrub()
    assert np.isfinite(engine.cache.buffers[0][0].read()).all()  # type: ignore[attr-defined]


def test_the_choice_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "why_no_cuda", lambda: "no usable GPU")
    assert choose_device("cpu") is CPU
    assert choose_device("auto") is CPU
    with pytest.raises(
        DeviceError, match="device 'cuda' does not work here: no usable GPU; use --device cpu, or install"
    ) as caught:
        choose_device("cuda")
    assert "\n" not in str(caught.value)
    with pytest.raises(DeviceError, match="unknown device 'cudda'; did you mean 'cuda'"):
        choose_device("cudda")
    monkeypatch.setattr(device_module, "why_no_cuda", lambda: None)
    assert choose_device("auto") is CUDA
    assert choose_device("cuda") is CUDA


def test_an_onnxruntime_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDA" in (why_no_cuda() or "")


@pytest.mark.cuda
@pytest.mark.skipif(why_no_cuda() is not None, reason=f"CUDA: {why_no_cuda()}")
def test_cuda_says_what_the_cpu_says(tiny_bundle: Path, tiny_stack: OrtStack) -> None:
    """Greedy tokens at full depth; and verify equals full depth, to the bit or said to be up to rounding."""
    stack = OrtStack(tiny_bundle, device=CUDA)
    prompt = [1, 5, 9] * 5
    expected = [t.id for t in _greedy(tiny_stack, prompt)]
    assert [t.id for t in _greedy(stack, prompt)] == expected
    CallProbe(stack, Call("segment", 1, 4, 128, 2)).run()


@pytest.mark.cuda
@pytest.mark.skipif(why_no_cuda() is not None, reason=f"CUDA: {why_no_cuda()}")
@pytest.mark.parametrize("kind", ["tied", "blocks", "routed", "windowed"])
def test_cuda_computes_bf16_as_torch_does(
    precisions: tuple[Path, dict[str, Path]], brain: dict[str, tuple[Path, Path]], kind: str
) -> None:
    """Up to its rounding; and the engine's own loop runs."""
    from ease_export.verify import verify_bundle

    checkpoint, bundle = {**brain, "tied": (precisions[0], precisions[1]["bf16"])}[kind]
    report = verify_bundle(bundle, checkpoint, 16, device="cuda")
    assert report.ok, report
    if kind != "routed":  # which has no propagate
        assert all(len(tokens) == 25 for tokens in decode(OrtStack(bundle, device=CUDA)))


def _greedy(stack: OrtStack, prompt: list[int]) -> list[Token]:
    engine = Engine(stack)
    return list(engine.generate(engine.start(prompt, max_new_tokens=40)))


def test_a_row_near_the_end_beside_long_prompts(tiny_bundle: Path) -> None:
    """Its pads, as many as the others' tokens in that pass, go past the last position."""
    engine = Engine(OrtStack(tiny_bundle, device=ELSEWHERE), num_slots=3)
    last = engine.stack.max_positions - 8
    engine.start([1], max_new_tokens=1)
    row = engine.start([2] * last, max_new_tokens=8)
    engine.start([1], max_new_tokens=1)
    while not row.produced:
        engine.step()
    for count in (150, 106):
        engine.start([5] * count, max_new_tokens=1)
    while engine.busy:
        engine.step()
    assert len(row.produced) == 8


@pytest.fixture
def made_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle is one for CUDA."""
    for name, read in (("load_manifest", load_manifest), ("read_manifest", read_manifest)):
        monkeypatch.setattr(stack_module, name, lambda path, read=read: replace(read(path), target="cuda"))


@pytest.mark.usefixtures("made_for_cuda")
def test_auto_runs_on_the_cpu_what_cuda_cannot_run(
    tiny_bundle: Path, tiny_stack: OrtStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA looks usable and then loads no graph, as without its libraries; `cuda` itself says why."""
    monkeypatch.setattr(device_module, "why_no_cuda", lambda: None)
    stack = open_stack(tiny_bundle)
    assert stack.device is CPU
    (line,) = caplog.messages
    assert line.startswith("cuda cannot run this bundle, so it runs on the CPU: ")
    assert "\n" not in line
    assert decode(stack) == decode(tiny_stack)
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime") as caught:
        open_stack(tiny_bundle, device="cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("made_for_cuda")
def test_auto_tries_every_graph(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that fails only when it runs is found while the bundle is loaded."""

    def run_kv(self: OrtStack, *_: object) -> None:
        if self.device.own_memory:
            raise RuntimeError("CUDA failure 2: out of memory\n at place")

    monkeypatch.setattr(OrtStack, "run_kv", run_kv)
    monkeypatch.setattr(stack_module, "choose_device", lambda name: ELSEWHERE)
    assert open_stack(tiny_bundle).device is CPU
    assert "does not run on cpu: CUDA failure 2: out of memory; " in caplog.text
    with pytest.raises(BundleError, match="out of memory"):
        open_stack(tiny_bundle, device="cuda")


def test_a_broken_bundle_is_no_matter_of_the_device(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "why_no_cuda", lambda: None)
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "head.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"head\.onnx"):
        open_stack(tmp_path / "bundle")


def test_auto_is_what_the_bundle_was_made_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One for a CPU stays there where CUDA works; one that runs elsewhere than it was made for says so."""
    monkeypatch.setattr(device_module, "why_no_cuda", lambda: None)
    assert open_stack(tiny_bundle).device is CPU
    assert not caplog.messages
    with pytest.raises(BundleError):
        open_stack(tiny_bundle, device="cuda")
    (line,) = caplog.messages
    assert "is made for cpu and runs on cuda, slower than one for that: ease-export build" in line
    assert line.endswith("--target cuda")


@pytest.mark.usefixtures("made_for_cuda")
def test_one_for_cuda_runs_on_the_cpu_and_says_so(
    tiny_bundle: Path, tiny_stack: OrtStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_module, "why_no_cuda", lambda: "no GPU")
    for device in ("auto", "cpu"):
        caplog.clear()
        assert decode(open_stack(tiny_bundle, device=device)) == decode(tiny_stack)
        (line,) = caplog.messages
        assert "is made for cuda and runs on cpu" in line
