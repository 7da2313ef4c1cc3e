"""Passes that are captured as CUDA graphs: what is replayed is what would have run.

Without a GPU, sessions stand in that replay as CUDA does: over the addresses that were bound when a run was
captured, whatever is bound now. They compute on the CPU, so tokens can be compared to the bit.
"""

import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from ease_runtime.cli.show import as_object, print_summary
from ease_runtime.engine.engine import CATCH_UPS, Engine
from ease_runtime.engine.layout import Span
from ease_runtime.engine.sampling import GumbelSampler
from ease_runtime.engine.sequence import Token
from ease_runtime.generation import Timing
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from ease_runtime.ort import sessions
from ease_runtime.ort.device import CUDA, Device, why_no_cuda
from ease_runtime.ort.sessions import captured_size
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import make_policy

pytest.importorskip("torch", reason="bundles are exported here")

ELSEWHERE = Device("cpu", "CPUExecutionProvider", own_memory=True, captures=True)


@pytest.mark.parametrize(
    ("num_tokens", "steps", "expected"),
    [
        (1, (), 1),
        (3, (), 4),
        (5, (), 8),
        (8, (), 8),
        (9, (), 9),
        (5, (6,), 5),
        (3, (6,), 4),
        (6, (6,), 8),
        (5, (6, 17), 5),
    ],
)
def test_a_pass_is_padded_to_one_that_is_captured(
    num_tokens: int, steps: tuple[int, ...], expected: int
) -> None:
    """Unless the pads would let other kernels run: from `steps` on."""
    assert captured_size(num_tokens, steps) == expected


class Recorded:
    """An IOBinding that knows what it is bound to."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.real = session.io_binding()
        self.bound: dict[str, tuple[str, tuple[Any, ...]]] = {}

    def bind_input(self, *arguments: Any) -> None:
        self._bind("bind_input", arguments)

    def bind_output(self, *arguments: Any) -> None:
        self._bind("bind_output", arguments)

    def _bind(self, how: str, arguments: tuple[Any, ...]) -> None:
        self.bound[arguments[0]] = how, arguments
        getattr(self.real, how)(*arguments)


class Replaying:
    """A session whose runs under an id are those of the first run under it."""

    runs: ClassVar[Counter[str]] = Counter()

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.captured: dict[str, ort.IOBinding] = {}
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def io_binding(self) -> Recorded:
        return Recorded(self.session)

    def run_with_iobinding(self, io: Recorded, options: ort.RunOptions) -> None:
        graph = options.get_run_config_entry("gpu_graph_id")
        self.runs["run" if graph == "-1" else "replay" if graph in self.captured else "capture"] += 1
        if graph == "-1":
            self.session.run_with_iobinding(io.real, options)
            return
        if graph not in self.captured:
            self.captured[graph] = self.session.io_binding()
            for how, arguments in io.bound.values():
                getattr(self.captured[graph], how)(*arguments)
        self.session.run_with_iobinding(self.captured[graph], options)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For CUDA, in fp32, whose bits do not depend on how tokens are batched."""
    from ease_export.build import export_bundle

    path = tmp_path_factory.mktemp("captures") / "bundle"
    export_bundle(tiny_checkpoint, path, "fp32", target="cuda")
    return path


@pytest.fixture
def stack(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> OrtStack:
    """Over sessions that replay, its caches growing in short steps."""
    monkeypatch.setattr("ease_runtime.ort.buffers.DEVICE_STEP", 32)
    monkeypatch.setattr(Replaying, "runs", Counter())
    return over(Replaying, bundle, monkeypatch)


def over(kind: type[Replaying], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> OrtStack:
    load = sessions.load_session

    def load_session(*arguments: Any, capture: bool, **options: Any) -> Any:
        session = load(*arguments, **options)
        return kind(session) if capture else session

    monkeypatch.setattr("ease_runtime.ort.stack.load_session", load_session)
    return OrtStack(bundle, device=ELSEWHERE)


def decode(stack: OrtStack) -> list[list[Token]]:
    """Every catch-up and two kinds of policy; long texts and short ones, over caches old and new."""
    layers = stack.exit_layers
    policies = make_policy("max-prob", [0.4], layers), make_policy("similarity", [0.6], layers)
    found = []
    for i, catch_up in enumerate(CATCH_UPS):
        engine = Engine(stack)
        for policy, length in itertools.product(policies, (7, 80)):
            prompt = [1 + i, 5, 9, 4] * 20
            sampler = GumbelSampler(0.8, 0, 1.0, i)
            request = engine.start(
                prompt[:length], max_new_tokens=20, policy=policy, catch_up=catch_up, sampler=sampler
            )
            found.append(list(engine.generate(request)))
    return found


def test_replays_say_what_runs_say(bundle: Path, stack: OrtStack) -> None:
    """And most passes are replays."""
    expected = OrtStack(bundle)
    before = Counter(Replaying.runs)
    assert decode(stack) == decode(expected)
    runs = Replaying.runs - before
    assert runs["replay"] > 5 * (runs["run"] + runs["capture"])
    assert stack.captures is not None
    assert len(stack.captures.found) >= runs["capture"] > 0


def test_a_lone_rows_caches_come_again(stack: OrtStack) -> None:
    """So that no request captures what two before it ran, once without and once to capture it."""
    decode(stack)
    decode(stack)
    before = Replaying.runs["capture"]
    decode(stack)
    assert Replaying.runs["capture"] == before


def test_other_passes_are_not_captured(stack: OrtStack) -> None:
    """Over the cache of several rows, and of more than 8 tokens."""
    cache = stack.open_cache(2)
    row = stack.reserve_rows(64, [])
    before = Replaying.runs["run"]
    for _ in range(4):
        stack.run_segment(0, cache, [Span(1, 0, 1)], np.ones(1, np.int64), row)
        stack.run_segment(0, cache, [Span(0, 0, 9)], np.ones(9, np.int64), row)
    assert Replaying.runs["run"] == before + 8


def test_a_batch_is_not_captured(bundle: Path, stack: OrtStack) -> None:
    """But its exits are, of up to 8 rows. Rows alone in it are no lone rows: their caches come not again."""
    graphs = [graph for graph in (*stack.segments, *stack.kvs) if graph is not None]
    before = [len(graph.session.captured) for graph in graphs]
    found = [batch(stack), batch(stack), batch(OrtStack(bundle))]
    assert found[0] == found[1] == found[2]
    assert [len(graph.session.captured) for graph in graphs] == before
    assert all(graphs.head.session.captured for graphs in stack.exit_graphs)


def batch(stack: OrtStack) -> list[list[Token]]:
    """Five texts in three slots, under every catch-up."""
    engine = Engine(stack, num_slots=3)
    policy = make_policy("max-prob", [0.4], stack.exit_layers)
    requests = [
        engine.start([1 + i, 5, 9] * (1 + 3 * i), max_new_tokens=12 + 5 * i, policy=policy, catch_up=catch_up)
        for i, catch_up in enumerate((*CATCH_UPS, *CATCH_UPS)[:5])
    ]
    while engine.busy:
        engine.step()
    return [request.produced for request in requests]


def test_what_is_captured_is_counted(bundle: Path, stack: OrtStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a server's metrics, and beside what is generated; 1,000 bytes are gone at each look here."""
    pytest.importorskip("prometheus_client")
    from ease_runtime.server.metrics import Metrics

    assert stack.captures is not None
    free = itertools.count(10**9, -1000)
    monkeypatch.setattr(stack.captures.memory, "num_free", lambda: next(free))
    known = len(stack.captures.found)
    metrics = Metrics(stack, 1)
    llm = TextEngine(stack, Tokenizer.from_file(str(bundle / "tokenizer.json")))
    timing = Timing()
    events = list(llm.generate("And", Options(max_tokens=20), timing))
    captured = stack.captured()
    assert captured.num_graphs > known > 0
    assert captured.num_bytes == 1000 * (captured.num_graphs - known)
    figures = metrics.text().decode()
    assert f"ease_captured_graphs {captured.num_graphs:.1f}\n" in figures
    assert f"ease_captured_bytes {captured.num_bytes:.1f}\n" in figures
    assert as_object(events, timing, None, llm)["captured"] == captured._asdict()
    console = Console(file=io.StringIO(), width=200)
    print_summary(events, timing, stack, None, console)
    line = f"{captured.num_graphs} passes are CUDA graphs by now, in 0.0 MB"
    assert line in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_captured_is_bounded(stack: OrtStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """In number and in bytes; other addresses then run without, and say the same."""
    assert stack.captures is not None
    monkeypatch.setattr(sessions, "MOST_CAPTURED", len(stack.captures.found) + 3)
    tokens = decode(stack)
    assert len(stack.captures.found) == sessions.MOST_CAPTURED
    monkeypatch.setattr(sessions, "MOST_CAPTURED", 10**6)
    monkeypatch.setattr(stack.captures, "num_bytes", sessions.MOST_CAPTURED_BYTES)
    captured = Replaying.runs["capture"]
    assert decode(stack) == tokens
    assert Replaying.runs["capture"] == captured


def test_wrong_replays_are_found_at_load(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then nothing is captured, and one line says so."""

    class Forgetful(Replaying):
        """Replays run nothing."""

        def run_with_iobinding(self, io: Recorded, options: ort.RunOptions) -> None:
            if options.get_run_config_entry("gpu_graph_id") not in self.captured:
                super().run_with_iobinding(io, options)

    stack = over(Forgetful, bundle, monkeypatch)
    assert stack.captures is not None
    assert stack.captures.failed
    (line,) = caplog.messages
    assert line.startswith("passes are not captured as CUDA graphs here, and are slower: ")
    assert decode(stack) == decode(OrtStack(bundle))


def test_a_capture_that_fails_runs_without(
    bundle: Path, stack: OrtStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As all that come after it do."""
    assert stack.captures is not None
    run = Replaying.run_with_iobinding

    def fails(self: Replaying, io: Recorded, options: ort.RunOptions) -> None:
        if options.get_run_config_entry("gpu_graph_id") not in ("-1", *self.captured):
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing\nat place")
        run(self, io, options)

    monkeypatch.setattr(Replaying, "run_with_iobinding", fails)
    assert decode(stack) == decode(OrtStack(bundle))
    (line,) = caplog.messages
    assert line.endswith("slower: CUDA failure 900: operation not permitted when stream is capturing")
    assert stack.captures.failed


def test_they_can_be_turned_off(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASE_CUDA_GRAPHS", "0")
    assert OrtStack(bundle, device=ELSEWHERE).captures is None


@pytest.mark.cuda
@pytest.mark.skipif(why_no_cuda() is not None, reason=f"CUDA: {why_no_cuda()}")
@pytest.mark.parametrize("precision", ["as it is", "bf16"])
def test_on_a_gpu_too(bundle: Path, precisions: tuple[Path, dict[str, Path]], precision: str) -> None:
    """To the bit: the same kernels run."""
    stack = OrtStack(precisions[1].get(precision, bundle), device=CUDA)
    assert stack.captures is not None
    found = decode(stack)
    assert not stack.captures.failed
    stack.captures.on = False
    assert decode(stack) == found


def test_near_the_last_position(stack: OrtStack) -> None:
    """Pads go past it."""
    engine = Engine(stack)
    last = stack.max_positions - 3
    policy = make_policy("max-prob", [0.4], stack.exit_layers)
    tokens = list(
        engine.generate(engine.start([2] * last, max_new_tokens=3, policy=policy, catch_up="verify"))
    )
    assert len(tokens) == 3
