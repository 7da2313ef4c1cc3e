"""The layers as the engine sees them: a cache, a pool of hidden states, and calls that run one graph each.

Nothing else runs a graph, and nothing here decides. What the engine needs of it is the protocol `Stack`;
`ease_runtime.engine.mock.MockStack` is the same interface in numpy, for tests.

Shapes: N new tokens in all, B neighbouring slots of the cache, S new tokens of the longest of them, T length
of a cache buffer, M rows of the pool, D width, V vocabulary.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import BundleError, DeviceError
from ease_runtime.bundle.manifest import FLOATS, ExitInfo, Manifest, load_manifest, read_manifest
from ease_runtime.bundle.signatures import (
    Signature,
    of_block,
    of_exit,
    of_gate,
    of_head,
    of_kv,
    of_route,
    of_segment,
    of_similarity,
)
from ease_runtime.engine.layout import Call, SegmentShape, Span
from ease_runtime.ort.bfloat import read_as, widened
from ease_runtime.ort.buffers import (
    CacheShape,
    DeviceCache,
    DevicePool,
    HiddenPool,
    Int64s,
    Pairs,
    RowCache,
)
from ease_runtime.ort.device import (
    CPU,
    CUDA,
    DEVICES,
    SILENT,
    Device,
    DeviceArray,
    DeviceRows,
    choose_device,
    why_no_cuda,
)
from ease_runtime.ort.load_tests import products_agree, run_every_graph, self_test, try_captures
from ease_runtime.ort.passes import Passes, fill
from ease_runtime.ort.sessions import (
    CAPTURED_SIZES,
    Binding,
    Captures,
    Graph,
    captured_size,
    check_signature,
    load_session,
    start_thread_pool,
)
from ease_runtime.policies import HeadOutput

log = logging.getLogger(__name__)
CUDA_GRAPHS = "EASE_CUDA_GRAPHS"  # 0: passes are not captured

# Tokens from which CUDA's MatMulNBits turns the whole matrix into floats each time, for cuBLAS: 6 in 8 bits,
# 17 in 4 (seen in the kernels that onnxruntime-gpu 1.31 launches). In int4, too, the heads have 8 bits.
CUDA_STEPS = {"int8": (6,), "int4": (6, 17)}


class Cache(Protocol):
    """The keys and values of several sequences, one a slot, every layer.

    The engine only passes it on, and frees its slots.
    """

    num_slots: int

    def free(self, slot: int) -> None:
        """Forget what a slot holds."""

    def scrub(self) -> None:
        """Make what lies past the written positions harmless, after a row has broken."""


@dataclass(frozen=True)
class StackExit:
    """A place where tokens may leave, after `layer`, and what can be done there with rows of the pool.

    `head` and `gate` read what the exit's own layer, `block`, wrote, where there is one. Results are
    overwritten by the next call.
    """

    layer: int
    head: Callable[[Int64s], HeadOutput]
    similarity: Callable[
        [Int64s, Int64s], NDArray[np.float32]
    ]  # max(0, cosine) of rows and of those before the segment
    # the probability that full depth would say the same
    gate: Callable[[Int64s], NDArray[np.float32]] | None = None
    # writes its states to rows from the last number on
    block: Callable[[Cache, Sequence[Span], Int64s, int], None] | None = None

    def can_say(self, what: str) -> bool:
        """Whether it can be asked this."""
        return getattr(self, what, None) is not None

    def ask(self, what: str, rows: Int64s, before: Int64s) -> HeadOutput | NDArray[np.float32]:
        """Its "head", "gate" or "similarity" (with the rows before the segment) for some rows.

        Shape: (N), (N) -> (N).
        """
        if what == "head":
            return self.head(rows)
        if what == "similarity":
            return self.similarity(rows, before)
        assert self.gate is not None, "whoever asks a gate has seen that there is one"
        return self.gate(rows)


class Captured(NamedTuple):
    """How many passes are CUDA graphs by now, and the bytes of the GPU's memory that these took."""

    num_graphs: int = 0
    num_bytes: int = 0


class Stack(Protocol):
    """What the engine needs of the layers.

    Segments and exits are numbered from 0; rows are rows of the hidden pool.

    Spans are of different slots, in their order; tokens (inputs, rows) are those of the spans, one after the
    other.
    """

    layout: tuple[SegmentShape, ...]
    exits: list[StackExit]
    vocab_size: int
    max_positions: int
    exact: bool  # several tokens in one pass give the bits of one at a time, with `even` where that needs it
    # tokens of a pass from which on other kernels compute its products, or it is not captured any more, where
    # that makes a step in its time
    kernel_steps: tuple[int, ...]
    even: bool  # no pass of an odd number of tokens, where kernels compute the last of them in another way
    trace: list[Call] | None

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layer of each exit."""

    def open_cache(self, num_slots: int = 1) -> Cache:
        """An empty cache."""

    def reserve_rows(self, num_rows: int, live: Sequence[Int64s]) -> int:
        """The first of `num_rows` free rows in a line.

        Rows named in `live` keep their states; they may move, in place.
        """

    def wait(self) -> None:
        """Until all calls are done: some return before, where nothing that they write is the host's."""

    def captured(self) -> Captured:
        """What is captured as CUDA graphs, for reports; nothing where there are none."""

    def read_states(self, rows: Int64s) -> NDArray[Any]:
        """A copy of hidden states for the host. Shape: (N) -> (N, D)."""

    def run_segment(
        self,
        number: int,
        cache: Cache,
        spans: Sequence[Span],
        inputs: Int64s,
        out_row: int,
        active: NDArray[np.bool_] | None = None,
    ) -> None:
        """Run N tokens through a segment; their hidden states go to rows out_row...

        `inputs` are pool rows, or token ids for segment 0, whose embeddings go to the N rows after. Where
        `active` is False a token is frozen.
        """

    def run_kv(self, number: int, cache: Cache, spans: Sequence[Span], rows: Int64s) -> None:
        """Write the K/V that a segment would hold for frozen hidden states (state propagation)."""

    def run_route(self, number: int, rows: Int64s) -> NDArray[np.bool_]:
        """Which hidden states go into a routed segment. Shape: (N) -> (N)."""

    def run_routed(
        self, number: int, cache: Cache, spans: Sequence[Span], positions: Int64s, rows: Int64s, out_row: int
    ) -> None:
        """Run the tokens that go into a routed segment: spans count what its cache holds.

        Shapes: positions and rows (N).
        """


@dataclass(frozen=True)
class ExitGraphs:
    """An exit's graphs: what it does before its head, the head, and a gate and a layer of its own where it
    has them.
    """

    before_head: Graph
    head: Graph
    gate: Graph | None
    block: Graph | None


class OrtStack:
    """A bundle's graphs in ONNX Runtime.

        stack = OrtStack(Path("runs/demo/bundle"))

    `num_threads` are those of the process, 0 for all; with None each graph has its own, where the process has
    none yet, and the process is free to choose later. Raises BundleError when the bundle cannot be trusted or
    loaded, DeviceError when its graphs compute something wrong here.
    """

    def __init__(
        self, bundle: Path, *, num_threads: int | None = 0, log_level: int = 3, device: Device = CPU
    ) -> None:
        manifest = self.manifest = load_manifest(bundle)
        self.device = device
        self.dtype = FLOATS[manifest.activations]
        self.figure_dtype = read_as(self.dtype)  # of logits, and of what exits say
        self.vocab_size = manifest.vocab_size
        self.max_positions = manifest.max_positions
        self.layout = _layout(manifest)
        self.trace: list[Call] | None = None
        self.num_threads = num_threads or os.cpu_count() or 1
        self.exact = False
        self.kernel_steps = CUDA_STEPS.get(manifest.precision, ()) if device is CUDA else ()
        self.even = False
        self.doubles = False  # whether `even` names the last token twice: some CPUs' 4-bit kernels need it
        self.own_threads = num_threads is None and not start_thread_pool.cache_info().currsize
        if num_threads is not None:
            start_thread_pool(num_threads)
        self.bundle = bundle
        self.log_level = log_level
        parts = manifest.segments
        self.layers_cached = [
            *(s.num_layers for s in parts),
            *(int(e.block is not None) for e in manifest.exits),
        ]  # segment by segment, then blocks
        self.captures = Captures(device.memory) if device.captures and captures_here(manifest) else None
        self.spare: dict[int, list[Pairs]] | None = None if self.captures is None else {}
        heads = {  # first: loading peaks at twice a graph's size
            head: self._load(head, of_head(manifest), self._bind_head)
            for head in dict.fromkeys(e.head for e in manifest.exits)
        }
        self.exit_graphs = [
            ExitGraphs(
                before_head=self._load(e.graph, of_exit(manifest), self._bind_index),
                head=heads[e.head],
                gate=self._load(e.gate, of_gate(manifest), self._bind_gate) if e.gate else None,
                block=self._load(e.block, of_block(manifest), self._bind_over_cache) if e.block else None,
            )
            for e in manifest.exits
        ]
        self.exits = [self._exit(number, e) for number, e in enumerate(manifest.exits)]
        self.similarity = self._load(manifest.similarity, of_similarity(manifest), self._bind_similarity)
        self.segments = [self._load(s.graph, of_segment(manifest, s), self._bind_over_cache) for s in parts]
        self.kvs = [
            self._load(s.kv_graph, of_kv(manifest, s), self._bind_over_cache) if s.kv_graph else None
            for s in parts
        ]
        self.routes = [
            self._load(s.route_graph, of_route(manifest), self._bind_route) if s.route_graph else None
            for s in parts
        ]
        self.pool = (  # after the graphs: without CUDA's libraries these say why
            DevicePool(manifest.dim, self.dtype, device)
            if device.own_memory
            else HiddenPool(manifest.dim, self.dtype)
        )
        self.passes = Passes(manifest, self.dtype, self.pool, self.layers_cached, self.num_threads, device)
        self.passes.padded = self.padded
        self.logits = np.zeros((0, self.vocab_size), self.figure_dtype)
        self.logits_there: DeviceArray | None = None  # on a device with its own memory
        # exit and rows whose states stand before the head, after a gate
        self.at_head: tuple[int, ...] | None = None
        try:
            self.passes.products_agree = products_agree(self)
            if self.captures is not None:
                try_captures(self, self.captures)
            self_test(self)
            if device.own_memory:
                run_every_graph(self)
            if self.captures is not None and self.spare is not None:
                self.captures.on = not self.captures.failed
                self.spare.clear()  # of the texts that were tried
                if self.captures.on:
                    self.kernel_steps = (*self.kernel_steps, CAPTURED_SIZES[-1] + 1)
        except RuntimeError as error:  # ONNX Runtime's
            raise BundleError(
                f"{bundle} does not run on {device.name}: {str(error).splitlines()[0]}; {_remedy(manifest)}"
            ) from None

    def padded(self, num_tokens: int) -> int:
        """Of how many tokens a pass of so many is, so that it is captured."""
        if self.captures is None or self.captures.failed:
            return num_tokens
        return captured_size(num_tokens, self.kernel_steps)

    def _load(self, name: str, signature: Signature, bind: Callable[..., None]) -> Graph:
        session = self._session(self.bundle / name)
        check_signature(
            session,
            self.bundle / name,
            signature,
            self.dtype,
        )
        return Graph(session, bind, self.device, self.captures)

    def _exit(self, number: int, info: ExitInfo) -> StackExit:
        return StackExit(
            info.layer,
            head=lambda rows: self.run_exit(number, rows),
            similarity=lambda rows, before: self.run_similarity(rows, before),
            gate=(lambda rows: self.run_gate(number, rows)) if info.gate else None,
            block=(lambda *arguments: self.run_block(number, *arguments)) if info.block else None,
        )

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self.manifest.exit_layers

    def _session(self, path: Path) -> ort.InferenceSession:
        capture = self.captures is not None
        return load_session(path, self.log_level, self.device, own_threads=self.own_threads, capture=capture)

    def open_cache(self, num_slots: int = 1, num_parts: int | None = None) -> RowCache | DeviceCache:
        """An empty cache, of the first parts alone where a number of them is given."""
        layers = self.layers_cached[:num_parts]
        manifest = self.manifest
        by_head = manifest.cache_layout == "BGTP"
        heads = manifest.num_kv_heads if by_head else 1
        shape = CacheShape(heads, manifest.kv_dim // heads, by_head)
        if self.device.own_memory:
            spare = {} if num_parts and self.spare is not None else self.spare  # others need every layer
            return DeviceCache(layers, num_slots, shape, self.max_positions, self.dtype, self.device, spare)
        files = [manifest.files.get(f"{segment.graph}.data") for segment in manifest.segments]
        weight_bytes = sum(info.num_bytes for info in files if info is not None)
        return RowCache(layers, num_slots, shape, weight_bytes, self.dtype)

    def reserve_rows(self, num_rows: int, live: Sequence[Int64s]) -> int:
        self.at_head = None
        return self.pool.reserve(num_rows, live)

    def captured(self) -> Captured:
        if self.captures is None:
            return Captured()
        return Captured(len(self.captures.found), self.captures.num_bytes)

    def wait(self) -> None:
        if self.device.own_memory:
            self.device.memory.wait()

    def read_states(self, rows: Int64s) -> NDArray[Any]:
        return widened(self.pool.read(rows))

    def run_segment(
        self,
        number: int,
        cache: Cache,
        spans: Sequence[Span],
        inputs: Int64s,
        out_row: int,
        active: NDArray[np.bool_] | None = None,
    ) -> None:
        own = {"active": np.ones(len(inputs), np.bool_) if active is None else active}
        self._run_over(self.segments[number], "segment", number, cache, spans, inputs, out_row, own)

    def run_kv(self, number: int, cache: Cache, spans: Sequence[Span], rows: Int64s) -> None:
        graph = self.kvs[number]
        assert graph is not None, (
            "the first segment runs for every token: there is nothing to propagate into it"
        )
        self._run_over(graph, "kv", number, cache, spans, rows)

    def run_block(self, number: int, cache: Cache, spans: Sequence[Span], rows: Int64s, out_row: int) -> None:
        graph = self.exit_graphs[number].block
        assert graph is not None, "whoever runs an exit's block has seen that it has one"
        self._run_over(graph, "block", number, cache, spans, rows, out_row)

    def run_route(self, number: int, rows: Int64s) -> NDArray[np.bool_]:
        graph = self.routes[number]
        assert graph is not None, "every token runs a segment that is not routed"
        binding = self._look(graph, rows)
        binding.run()
        self._note("route", number, len(rows))
        return binding.own["goes_in"][: len(rows)]

    def run_routed(
        self, number: int, cache: Cache, spans: Sequence[Span], positions: Int64s, rows: Int64s, out_row: int
    ) -> None:
        own = {"positions": positions}
        self._run_over(self.segments[number], "segment", number, cache, spans, rows, out_row, own)

    def run_similarity(self, rows: Int64s, before: Int64s) -> NDArray[np.float32]:
        binding = self._look(self.similarity, rows)
        fill(binding.own["before"], before)
        binding.run()
        self._note("similarity", 0, len(rows))
        return binding.own["similarity"][: len(rows)]

    def run_gate(self, number: int, rows: Int64s) -> NDArray[np.float32]:
        graph = self.exit_graphs[number].gate
        assert graph is not None, "whoever asks a gate has seen that the bundle has one"
        binding = self._run_before_head(graph, number, rows)
        self.at_head = (number, *rows.tolist())
        self._note("gate", number, len(rows))
        return binding.own["probability"][: len(rows)]

    def run_exit(self, number: int, rows: Int64s) -> HeadOutput:
        if self.at_head != (number, *rows.tolist()):  # a gate leaves its states where the head reads them
            self._run_before_head(self.exit_graphs[number].before_head, number, rows)
        self.at_head = None
        head = self.exit_graphs[number].head.binding(self.padded(len(rows)))
        head.run()
        self._note("exit", number, len(rows))
        logits = head.bound["logits"]
        rows_of = DeviceRows(logits, 0, len(rows)) if isinstance(logits, DeviceArray) else logits
        figures = (head.own[name][: len(rows)] for name in ("top_id", "top_prob", "margin", "entropy"))
        return HeadOutput(rows_of, *figures)

    def _run_before_head(self, graph: Graph, number: int, rows: Int64s) -> Binding:
        """Run an exit's own graph or its gate, which write where the exit's head reads."""
        binding = self._look(graph, rows)
        num_tokens = self.padded(len(rows))
        head = self.exit_graphs[number].head.binding(num_tokens)
        if binding.bound.get("head") is not head:
            binding.output_at(
                "exit_hidden",
                self.dtype,
                (num_tokens, self.manifest.dim),
                self._exit_hidden(head, num_tokens),
            )
            binding.bound["head"] = head
        binding.run()
        return binding

    def _look(self, graph: Graph, rows: Int64s) -> Binding:
        """The binding of a graph that looks at some rows of the pool."""
        binding = graph.binding(self.padded(len(rows)))
        self.passes.bind_pool(binding)
        fill(binding.own["index"], rows)
        return binding

    def _note(
        self, graph: str, number: int, num_tokens: int, cache_length: int = 0, num_slots: int = 1
    ) -> None:
        if self.trace is not None:
            self.trace.append(Call(graph, number, num_tokens, cache_length, num_slots))

    def _run_over(
        self,
        graph: Graph,
        kind: str,
        number: int,
        cache: Cache,
        spans: Sequence[Span],
        inputs: Int64s,
        out_row: int | None = None,
        own: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        assert isinstance(cache, RowCache | DeviceCache)
        part = number + len(self.layout) if kind == "block" else number
        even = self.even and self.doubles
        for run in self.passes.run(graph, part, cache, spans, inputs, out_row, own, even=even):
            num_tokens = sum(stop - start for _, start, stop in run.spans)
            self._note(kind, number, num_tokens, run.length, len(run.write_indices))

    def _bind_over_cache(self, binding: Binding, *shape: int) -> None:
        self.passes.bind(binding, *shape)

    def _bind_index(self, binding: Binding, num_tokens: int) -> None:
        binding.input("index", np.zeros(num_tokens, np.int64))

    def _bind_route(self, binding: Binding, num_tokens: int) -> None:
        self._bind_index(binding, num_tokens)
        binding.output("goes_in", np.zeros(num_tokens, np.bool_))

    def _bind_gate(self, binding: Binding, num_tokens: int) -> None:
        self._bind_index(binding, num_tokens)
        binding.output("probability", np.zeros(num_tokens, self.figure_dtype))

    def _bind_similarity(self, binding: Binding, num_tokens: int) -> None:
        self._bind_index(binding, num_tokens)
        binding.input("before", np.zeros(num_tokens, np.int64))
        binding.output("similarity", np.zeros(num_tokens, self.figure_dtype))

    def _exit_hidden(self, head: Binding, num_tokens: int) -> int:
        """Where a head reads its states: a buffer of its binding, which exits and gates write."""
        states = head.bound.get("exit_hidden")
        if states is None:
            shape = (num_tokens, self.manifest.dim)
            states = (
                DeviceArray(shape, self.dtype, self.device)
                if self.device.own_memory
                else np.zeros(shape, self.dtype)
            )
            head.bound["exit_hidden"] = states
        return states.pointer if isinstance(states, DeviceArray) else int(states.ctypes.data)

    def _bind_head(self, binding: Binding, num_tokens: int) -> None:
        binding.input_at(
            "exit_hidden", self.dtype, (num_tokens, self.manifest.dim), self._exit_hidden(binding, num_tokens)
        )
        self._bind_logits(binding, num_tokens)
        binding.output("top_id", np.zeros(num_tokens, np.int64))
        for name in ("top_prob", "margin", "entropy"):
            binding.output(name, np.zeros(num_tokens, self.figure_dtype))

    def _bind_logits(self, binding: Binding, num_tokens: int) -> None:
        """One buffer for all heads, since each call overwrites the last one's; on a device it stays there."""
        shape = (2 * num_tokens, self.vocab_size)
        if self.device.own_memory:
            if self.logits_there is None or self.logits_there.shape[0] < num_tokens:
                self.logits_there = DeviceArray(shape, self.figure_dtype, self.device)
            binding.output_at(
                "logits", self.figure_dtype, (num_tokens, self.vocab_size), self.logits_there.pointer
            )
            binding.bound["logits"] = self.logits_there
            return
        if len(self.logits) < num_tokens:
            self.logits = np.zeros(shape, self.figure_dtype)
        binding.output("logits", self.logits[:num_tokens])
        binding.bound["logits"] = binding.own["logits"]


def open_stack(
    bundle: Path, *, device: str = "auto", num_threads: int = 0, kind: type[OrtStack] = OrtStack
) -> OrtStack:
    """A bundle's graphs on a device by its name, as a `kind` of stack.

    "auto" is the device that the bundle was made for, where that works and can run it, else the CPU. One
    line in the log says so where it is another than the bundle was made for, and why. Raises BundleError,
    DeviceError; for one in bf16 wherever CUDA does not work.
    """
    manifest = read_manifest(bundle)
    target = manifest.target
    if manifest.activations == "bf16" and device in DEVICES:
        check_not_on_cpu(bundle, device)
        device = CUDA.name
    chosen = CPU if device == "auto" and target == CPU.name else choose_device(device)
    if chosen.name != target:
        log.warning(
            "%s is made for %s and runs on %s, slower than one for that: ease-export build CHECKPOINT BUNDLE "
            "--target %s",
            bundle,
            target,
            chosen.name,
            chosen.name,
        )
    if chosen is CPU:
        return kind(bundle, num_threads=num_threads)
    try:
        return kind(bundle, num_threads=num_threads, log_level=SILENT, device=chosen)
    except (BundleError, DeviceError) as error:
        if device != "auto":
            raise
        reason = str(error)
    stack = kind(bundle, num_threads=num_threads)  # a bundle that is broken everywhere says so here
    log.warning("%s cannot run this bundle, so it runs on the CPU: %s", chosen.name, reason)
    return stack


def check_not_on_cpu(bundle: Path, device: str) -> None:
    """Raise DeviceError where a bundle in bf16 would run on the CPU: ONNX Runtime has no such kernels there
    for most of it.
    """
    why = "--device cpu is asked for"
    if device != CPU.name:
        missing = why_no_cuda()
        if missing is None:
            return
        why = f"{missing} (where there is a GPU: pip install 'ease-lm[cuda]')"
    raise DeviceError(
        f"{bundle} is in bf16, which onnxruntime computes on CUDA alone, and {why}; build one that runs on "
        "the CPU: ease-export build CHECKPOINT BUNDLE --precision fp32 --target cpu"
    )


def captures_here(manifest: Manifest) -> bool:
    """Whether a bundle's passes may be captured as CUDA graphs: not those that choose a form of attention
    while they run, and not where the variable EASE_CUDA_GRAPHS is 0.
    """
    return manifest.cache_layout == "BTK" and os.environ.get(CUDA_GRAPHS) != "0"


def _remedy(manifest: Manifest) -> str:
    """What to do where a device does not run a bundle's graphs."""
    if manifest.activations == "bf16":
        return "where a card has no bf16: ease-export build CHECKPOINT BUNDLE --precision fp16"
    return "export the bundle again"


def _layout(manifest: Manifest) -> tuple[SegmentShape, ...]:
    exits = {leave.layer: (number, leave) for number, leave in enumerate(manifest.exits)}
    shapes = []
    for segment in manifest.segments:
        number, leave = exits.get(segment.last_layer, (None, None))
        block = leave is not None and leave.block is not None
        shapes.append(
            SegmentShape(
                segment.num_layers, number, segment.kind == "routed", segment is manifest.segments[-1], block
            )
        )
    return tuple(shapes)
