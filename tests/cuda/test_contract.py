"""What EASE's graphs and engine do on ONNX Runtime's own CUDA provider, over stand-ins for CUDA's libraries:
no GPU is needed.

Placement, refusals, launches and copies are the provider's own; results are not looked at, since no kernel
runs.
"""

import json
import platform
import sys
from collections import Counter
from itertools import dropwhile, pairwise
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="bundles are exported here")
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("the stand-ins are for Linux on x86-64", allow_module_level=True)

from cuda import standin
from ease_runtime.bundle.manifest import read_manifest
from ease_runtime.engine.engine import CATCH_UPS
from ease_runtime.ort.sessions import ALIGNMENT
from ease_runtime.ort.stack import CUDA_STEPS

HERE = Path(__file__).parent
Made = tuple[Path, Path]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.build(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="session")
def kinds(blocks: Made, routed_with_exits: Made) -> dict[str, Path]:
    """In int4 for CUDA: exits with layers of their own, gates and a reduced head; routed layers."""
    from ease_export.build import export_bundle

    found = {}
    for name, (checkpoint, _) in (("blocks", blocks), ("routed", routed_with_exits)):
        found[name] = checkpoint.parent / "int4-cuda"
        export_bundle(checkpoint, found[name], "int4", target="cuda")
    return found


@pytest.fixture(scope="session")
def bundles(
    tiny_bundle: Path,
    gated: Made,
    blocks: Made,
    routed: Made,
    routed_with_exits: Made,
    precisions: tuple[Path, dict[str, Path]],
    halves: dict[str, Path],
    kinds: dict[str, Path],
    brain: dict[str, Made],
) -> list[Path]:
    """Every kind of graph, every precision, and both targets."""
    return [
        tiny_bundle,
        *(bundle for _, bundle in (gated, blocks, routed, routed_with_exits)),
        *precisions[1].values(),
        *halves.values(),
        *kinds.values(),
        *(bundle for _, bundle in brain.values()),
    ]


def test_every_node_of_every_graph_is_on_cuda(libraries: Path, bundles: list[Path]) -> None:
    """And none is copied between providers."""
    found = json.loads(standin.run_over(libraries, [str(HERE / "placement.py"), *map(str, bundles)]))
    graphs = {Path(path).name for path in found}
    assert graphs >= {
        "segment_01.onnx",
        "kv_02.onnx",
        "block_02.onnx",
        "gate_01.onnx",
        "route_02.onnx",
        "reduced_head.onnx",
        "similarity.onnx",
    }
    elsewhere = {
        path: where
        for path, where in found.items()
        if not isinstance(where, dict) or set(where) != {"CUDAExecutionProvider"}
    }
    assert elsewhere == {}


def test_copies_that_run_later_are_what_was_asked_for(libraries: Path) -> None:
    """The stand-ins do them at the next wait."""
    assert standin.run_over(libraries, [str(HERE / "memory.py")]) == "equal\n"


def decode(
    libraries: Path,
    bundle: Path,
    catch_up: str,
    confidences: list[float],
    log: Path,
    temperature: float = 0.0,
    rows: int = 1,
) -> tuple[list[int], list[standin.Event]]:
    """Depths of the tokens of one of the rows, and what happened for all."""
    script = [str(HERE / "decode.py"), str(bundle)]
    arguments = [*script, catch_up, str(temperature), str(rows), *map(str, confidences)]
    depths = json.loads(standin.run_over(libraries, arguments, log))
    return depths, list(dropwhile(lambda event: event.what != "decoding", standin.events(log)))


def kernels(events: list[standin.Event]) -> list[str]:
    """The names of those that were launched."""
    return [event.what.split()[0] for event in events if event.kind == "kernel"]


def counts(events: list[standin.Event]) -> dict[str, int]:
    """How often the host sent something, fetched something, and waited."""
    found = Counter(event.what.split()[0] if event.kind == "copy" else event.kind for event in events)
    return {kind: found[kind] for kind in ("host-device", "device-host", "sync")}


@pytest.mark.parametrize(
    ("catch_up", "precision"),
    [(catch_up, precision) for precision in ("fp16", "bf16") for catch_up in CATCH_UPS]
    + [("recompute", "int4")],
)
def test_the_engines_own_loop_runs_and_leaves_early(
    libraries: Path,
    precisions: tuple[Path, dict[str, Path]],
    halves: dict[str, Path],
    catch_up: str,
    precision: str,
    tmp_path: Path,
) -> None:
    confidences = [0.9, 0.1, 0.9, 0.9, 0.1, 0.9]
    bundle = {**precisions[1], **halves}[precision]
    depths, events = decode(libraries, bundle, catch_up, confidences, tmp_path / "log")
    if catch_up == "verify":  # full depth says the same token every time, so that all drafts stand
        assert len(depths) == len(confidences)
        assert 3 in depths
    else:
        assert depths == [3 if confidence > 0.5 else 6 for confidence in confidences]
    assert len(kernels(events)) > 100
    assert any("flash" in name for name in kernels(events)), "16 bits around take Flash"


FULL = [0.1] * 8
EARLY = [0.1] + [0.9] * 7  # the prompt's token at full depth, then all at the first of three exits


def test_a_token_that_leaves_launches_less(libraries: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    _, full = decode(libraries, tiny_bundle, "propagate", FULL, tmp_path / "full")
    _, early = decode(libraries, tiny_bundle, "propagate", EARLY, tmp_path / "early")
    assert len(kernels(early)) < 0.75 * len(kernels(full))


@pytest.mark.parametrize(("confidences", "segments"), [(FULL, 8 * 3), (EARLY, 3 + 7)])
def test_a_segment_and_its_exit_take_two_copies_there_one_back_and_one_wait(
    libraries: Path, tiny_bundle: Path, tmp_path: Path, confidences: list[float], segments: int
) -> None:
    """The head needs nothing, and the next segment reads the states where the last one wrote them."""
    _, events = decode(libraries, tiny_bundle, "propagate", confidences, tmp_path / "log")
    assert counts(events) == {"host-device": 2 * segments, "device-host": segments, "sync": segments}


@pytest.mark.parametrize(("temperature", "tokens"), [(0.0, 0), (1.0, 8)])
def test_logits_leave_the_device_where_something_is_drawn_from_them(
    libraries: Path, tiny_bundle: Path, tmp_path: Path, temperature: float, tokens: int
) -> None:
    """Once a token, then. Else what comes back is of one size for any model."""
    _, events = decode(libraries, tiny_bundle, "propagate", FULL, tmp_path / "log", temperature)
    fetched = Counter(e.num_bytes for e in events if e.kind == "copy" and e.what.startswith("device-host"))
    logits = {read_manifest(tiny_bundle).vocab_size * 4: tokens} if tokens else {}
    assert fetched == {4 * ALIGNMENT: 8 * 3, **logits}


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_lone_rows_passes_are_captured(
    libraries: Path,
    halves: dict[str, Path],
    precisions: tuple[Path, dict[str, Path]],
    precision: str,
    tmp_path: Path,
) -> None:
    """Of 1, 2, 4 or 8 tokens, others padded to these, in caches of one, two and three steps: two segments, an
    exit and its head are a launch each. In 8 bits 5 tokens stay 5: from 6 on other kernels run.
    """
    log = tmp_path / "log"
    bundle = {**precisions[1], **halves}[precision]
    found = json.loads(standin.run_over(libraries, [str(HERE / "capture.py"), str(bundle)], log))
    sizes = [1, 2, 3, 4, 5, 8]
    assert found == [[length, size] for length in (64, 128, 192) for size in sizes]
    last: list[Counter[str]] = []
    for event in standin.events(log):
        if event.what == "begins":
            last.append(Counter())
        elif last:
            last[-1][event.what if event.what == "ends" else event.kind] += not last[-1]["ends"]
    launches = [(counts["replay"], counts["kernel"] > 0, counts["begin"]) for counts in last]
    alone = 5 if precision == "int8" else None
    assert launches == 3 * [(0, True, 0) if size == alone else (4, False, 0) for size in sizes]
    assert captured(log) <= LEGAL


def test_a_batch_captures_its_exits_alone(
    libraries: Path, precisions: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """A pass of three rows through a segment launches its kernels; the exit and its head are one each."""
    log = tmp_path / "log"
    depths, events = decode(libraries, precisions[1]["fp16"], "propagate", FULL, log, rows=3)
    assert depths == [6] * len(FULL)
    found = max(
        (Counter(e.kind for e in step) for step in between(events, "step")), key=lambda step: step["replay"]
    )
    assert found["replay"] == 2
    assert found["kernel"] > 50
    assert captured(log) <= LEGAL


def between(events: list[standin.Event], what: str) -> list[list[standin.Event]]:
    """What happened in each "step" of the engine, or for each "token" of the first row, but the first."""
    ends = [place for place, event in enumerate(events) if event.what == what]
    return [events[start:stop] for start, stop in pairwise(ends)]


PRODUCTS = {"cublasGemmEx", "cublasSgemm_v2"}  # the latter of routers beside bf16
LEGAL = {"kernel", "memset", "device-device", "cudaGetLastError", *PRODUCTS}


def captured(log: Path) -> set[str]:
    """What was asked for while graphs were captured: no wait, no allocation and nothing of the host's memory,
    which would be other memory at a replay.
    """
    inside = [event for event in standin.events(log) if event.captured]
    return {event.what.split()[0] if event.kind in ("copy", "call") else event.kind for event in inside}


@pytest.mark.parametrize(
    ("name", "catch_up"),
    [
        *((precision, catch_up) for precision in ("fp16", "bf16") for catch_up in CATCH_UPS),
        *(
            (name, "recompute")
            for name in ("blocks", "routed", "blocks bf16", "routed bf16", "windowed bf16")
        ),
    ],
)
def test_what_is_captured_can_be(
    libraries: Path,
    precisions: tuple[Path, dict[str, Path]],
    kinds: dict[str, Path],
    brain: dict[str, Made],
    name: str,
    catch_up: str,
    tmp_path: Path,
) -> None:
    in_bf16 = {f"{kind} bf16": bundle for kind, (_, bundle) in brain.items()}
    decode(libraries, {**precisions[1], **kinds, **in_bf16}[name], catch_up, [0.9, 0.1] * 8, tmp_path / "log")
    assert {"kernel", "cublasGemmEx"} <= captured(tmp_path / "log") <= LEGAL


@pytest.mark.parametrize(("variable", "replays"), [("1", 3 * 2), ("0", 0)], ids=["captured", "off"])
def test_a_token_is_a_launch_for_each_segment_exit_and_head(
    libraries: Path,
    precisions: tuple[Path, dict[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    replays: int,
    tmp_path: Path,
) -> None:
    """At full depth, of two segments. The variable turns it off."""
    monkeypatch.setenv("EASE_CUDA_GRAPHS", variable)
    _, events = decode(libraries, precisions[1]["fp16"], "propagate", FULL, tmp_path / "log")
    last = between(events, "token")[-1]
    assert counts(last) == {"host-device": 2 * 2, "device-host": 2, "sync": 2}
    found = Counter(event.kind for event in last)
    assert found["replay"] == replays
    assert found["kernel"] == 0 if replays else found["kernel"] > 100
    fetched = [event.num_bytes for event in last if event.what.startswith("device-host")]
    assert fetched == [4 * ALIGNMENT] * 2, "no logits"


def test_everything_is_in_one_stream(libraries: Path, gated: Made, tmp_path: Path) -> None:
    """So that nothing is read before it is written, though nothing waits in between."""
    _, events = decode(libraries, gated[1], "recompute", EARLY, tmp_path / "log")
    streams = Counter(event.stream for event in events if event.kind in ("kernel", "copy", "memset", "sync"))
    products = {event.stream for event in standin.events(tmp_path / "log") if event.what.startswith("cublas")}
    (stream,) = streams
    assert stream, "the default stream would wait for all others"
    assert products - {None} == {stream}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize(("precision", "segment_from"), [("int8", 6), ("int4", 17)])
def test_products_change_kernels_where_the_cost_model_says(
    libraries: Path,
    precisions: tuple[Path, dict[str, Path]],
    halves: dict[str, Path],
    precision: str,
    segment_from: int,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """From there on the whole matrix is turned into floats each time; heads have 8 bits in both."""
    monkeypatch.setenv("EASE_CUDA_GRAPHS", "0")  # replays name no kernels
    bundle = (halves if target == "cuda" else precisions[1])[precision]
    arguments = [str(HERE / "steps.py"), str(bundle), "20"]
    found = json.loads(standin.run_over(libraries, arguments, tmp_path / "log"))
    assert found == {"segment": list(range(segment_from, 21)), "head": list(range(6, 21))}
    assert set(CUDA_STEPS[precision]) == {segment_from, 6}
