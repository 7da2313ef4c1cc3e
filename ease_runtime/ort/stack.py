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
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import BundleError, DeviceError
from ease_runtime.bundle.manifest import ExitInfo, Manifest, load_manifest, read_manifest
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
from ease_runtime.ort.buffers import CacheShape, DeviceCache, DevicePool, HiddenPool, Int64s, RowCache, Run
from ease_runtime.ort.device import CPU, SILENT, Device, DeviceArray, choose_device
from ease_runtime.ort.sessions import Binding, Graph, check_signature, load_session, start_thread_pool
from ease_runtime.policies import HeadOutput

log = logging.getLogger(__name__)

PRODUCTS_LENGTH = 2000  # tokens in the cache of the pass that compares two forms of attention
SELF_TEST_TOLERANCE = 1e-3  # of the largest magnitude: the test looks for a wrong mask, not for rounding
BUFFERED = (-1, -1, -1)  # where a pass with a token named twice has its states, and no rows of the pool
FEW_PLACES = 8  # new tokens of a row up to which the forms of attention for few are faster (measured)
NOT_FINITE = (
    "its weights hold NaN or infinity, or overflow: get the model's own weights again, then export them"
)
ROUNDING = {
    "fp32": 1,
    "fp16": 20,
    "int8": 50,
    "int4": 50,
}  # times that, by precision: int8 and int4 round activations within products


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
        self.dtype = np.float16 if manifest.precision == "fp16" else np.float32
        self.vocab_size = manifest.vocab_size
        self.max_positions = manifest.max_positions
        self.layout = _layout(manifest)
        self.trace: list[Call] | None = None
        self.num_threads = num_threads or os.cpu_count() or 1
        self.even = False
        self.doubles = False  # whether `even` names the last token twice: some CPUs' 4-bit kernels need it
        self.own_threads = num_threads is None and not start_thread_pool.cache_info().currsize
        if num_threads is not None:
            start_thread_pool(num_threads)
        self.bundle = bundle
        self.log_level = log_level
        heads = {  # first: loading peaks at twice a graph's size
            head: self._load(head, of_head(manifest), self._bind_head)
            for head in dict.fromkeys(e.head for e in manifest.exits)
        }
        self.exit_graphs = [
            ExitGraphs(
                before_head=self._load(e.graph, of_exit(manifest), self._bind_index),
                head=heads[e.head],
                gate=self._load(e.gate, of_gate(manifest), self._bind_gate) if e.gate else None,
                block=self._load(e.block, of_block(manifest), self._bind_segment) if e.block else None,
            )
            for e in manifest.exits
        ]
        self.exits = [self._exit(number, e) for number, e in enumerate(manifest.exits)]
        self.similarity = self._load(manifest.similarity, of_similarity(manifest), self._bind_similarity)
        parts = manifest.segments
        self.segments = [self._load(s.graph, of_segment(manifest, s), self._bind_segment) for s in parts]
        self.kvs = [
            self._load(s.kv_graph, of_kv(manifest, s), self._bind_segment) if s.kv_graph else None
            for s in parts
        ]
        self.layers_cached = [
            *(s.num_layers for s in parts),
            *(int(e.block is not None) for e in manifest.exits),
        ]  # segment by segment, then blocks
        self.routes = [
            self._load(s.route_graph, of_route(manifest), self._bind_route) if s.route_graph else None
            for s in parts
        ]
        self.pool = (
            DevicePool(manifest.dim, self.dtype, device)
            if device.own_memory
            else HiddenPool(manifest.dim, self.dtype)
        )
        self.logits = np.zeros((0, self.vocab_size), self.dtype)
        # exit and rows whose states stand before the head, after a gate
        self.at_head: tuple[int, ...] | None = None
        self.products_agree = False
        try:
            self.products_agree = self._products_agree()
            self._self_test()
            if device.own_memory:
                self.run_every_graph()
        except RuntimeError as error:  # ONNX Runtime's
            raise BundleError(
                f"{bundle} does not run on {device.name}: {str(error).splitlines()[0]}; export the "
                "bundle again"
            ) from None

    def _load(self, name: str, signature: Signature, bind: Callable[..., None]) -> Graph:
        session = self._session(self.bundle / name)
        check_signature(
            session,
            self.bundle / name,
            signature,
            "tensor(float16)" if self.dtype is np.float16 else "tensor(float)",
        )
        return Graph(session, bind, self.device)

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
        return load_session(path, self.log_level, self.device, own_threads=self.own_threads)

    def open_cache(self, num_slots: int = 1) -> RowCache | DeviceCache:
        manifest = self.manifest
        by_head = manifest.cache_layout == "BGTP"
        heads = manifest.num_kv_heads if by_head else 1
        shape = CacheShape(heads, manifest.kv_dim // heads, by_head)
        if self.device.own_memory:
            return DeviceCache(
                self.layers_cached, num_slots, shape, self.max_positions, self.dtype, self.device
            )
        files = [manifest.files.get(f"{segment.graph}.data") for segment in manifest.segments]
        weight_bytes = sum(info.num_bytes for info in files if info is not None)
        return RowCache(self.layers_cached, num_slots, shape, weight_bytes, self.dtype)

    def reserve_rows(self, num_rows: int, live: Sequence[Int64s]) -> int:
        self.at_head = None
        return self.pool.reserve(num_rows, live)

    def read_states(self, rows: Int64s) -> NDArray[Any]:
        return self.pool.read(rows)

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
        return binding.own["goes_in"]

    def run_routed(
        self, number: int, cache: Cache, spans: Sequence[Span], positions: Int64s, rows: Int64s, out_row: int
    ) -> None:
        own = {"positions": positions}
        self._run_over(self.segments[number], "segment", number, cache, spans, rows, out_row, own)

    def run_similarity(self, rows: Int64s, before: Int64s) -> NDArray[np.float32]:
        binding = self._look(self.similarity, rows)
        binding.own["before"][:] = before
        binding.run()
        self._note("similarity", 0, len(rows))
        return binding.own["similarity"]

    def run_gate(self, number: int, rows: Int64s) -> NDArray[np.float32]:
        graph = self.exit_graphs[number].gate
        assert graph is not None, "whoever asks a gate has seen that the bundle has one"
        binding = self._run_before_head(graph, number, rows)
        self.at_head = (number, *rows.tolist())
        self._note("gate", number, len(rows))
        return binding.own["probability"]

    def run_exit(self, number: int, rows: Int64s) -> HeadOutput:
        if self.at_head != (number, *rows.tolist()):  # a gate leaves its states where the head reads them
            self._run_before_head(self.exit_graphs[number].before_head, number, rows)
        self.at_head = None
        head = self.exit_graphs[number].head.binding(len(rows))
        head.run()
        self._note("exit", number, len(rows))
        own = head.own
        return HeadOutput(own["logits"], own["top_id"], own["top_prob"], own["margin"], own["entropy"])

    def _run_before_head(self, graph: Graph, number: int, rows: Int64s) -> Binding:
        """Run an exit's own graph or its gate, which write where the exit's head reads."""
        binding = self._look(graph, rows)
        head = self.exit_graphs[number].head.binding(len(rows))
        if binding.bound.get("head") is not head:
            binding.output_at(
                "exit_hidden", self.dtype, (len(rows), self.manifest.dim), self._exit_hidden(head, len(rows))
            )
            binding.bound["head"] = head
        binding.run()
        return binding

    def _look(self, graph: Graph, rows: Int64s) -> Binding:
        """The binding of a graph that looks at some rows of the pool."""
        binding = graph.binding(len(rows))
        self._bind_pool(binding)
        binding.own["index"][:] = rows
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
        """Run tokens through a graph over the cache, in as many passes as the cache says, and let their
        states stand in their own order from `out_row` on.
        """
        assert isinstance(cache, RowCache | DeviceCache)
        part = number + len(self.layout) if kind == "block" else number
        runs = cache.runs(part, spans)
        if len(runs) == 1:
            binding = self._place(graph, part, cache, runs[0], inputs, own)
            self._run_into_pool(binding, out_row, len(inputs), len(inputs))
            self._note(kind, number, len(inputs), runs[0].length, len(runs[0].write_indices))
            return
        starts = np.cumsum([0, *(stop - start for _, start, stop in spans)]).tolist()
        order: list[int] = []
        for run in runs:
            tokens = [token for place in run.chosen for token in range(starts[place], starts[place + 1])]
            taken = {name: values[tokens] for name, values in own.items()}
            binding = self._place(graph, part, cache, run, inputs[tokens], taken)
            row = None if out_row is None else out_row + len(order)
            self._run_into_pool(binding, row, len(tokens), len(inputs))
            self._note(kind, number, len(tokens), run.length, len(run.write_indices))
            order += tokens
        if out_row is not None:
            self.pool.reorder(out_row, order)
            if "input_ids" in graph.input_names:
                self.pool.reorder(out_row + len(inputs), order)

    def _place(
        self,
        graph: Graph,
        part: int,
        cache: RowCache | DeviceCache,
        run: Run,
        inputs: Int64s,
        own: Mapping[str, NDArray[Any]],
    ) -> Binding:
        """The binding for a run, with the cache, the pool and the small inputs in place.

        It covers the slots from the first to the last span. Those without new tokens, and rows with fewer
        than the longest, write pads past what they hold. Where it has to be of an even number of tokens, the
        last one is named twice; its second place is its first.
        """
        num_slots = len(run.write_indices)
        num_places = max(stop - start for _, start, stop in run.spans)
        odd = self.even and self.doubles and len(inputs) % 2
        binding = graph.binding(run.first, num_slots, num_places, len(inputs) + int(odd))
        _fill(binding.own["index" if part else "input_ids"], inputs)
        binding.own["write_indices"][:] = run.write_indices
        for name, values in own.items():
            _fill(binding.own[name], values)
        if num_slots > 1:
            places = binding.own["places"]
            _spread(binding.own["spread"], places, run.spans)
            places[len(inputs) :] = places[len(inputs) - 1]
        if binding.bound.get("cache") != (run.serial, run.length):
            self._bind_cache(binding, part, cache, run)
        if part:
            self._bind_pool(binding)
        return binding

    def _bind_cache(self, binding: Binding, part: int, cache: RowCache | DeviceCache, run: Run) -> None:
        """Past and present are one buffer, so the cache is written in place."""
        first_layer = sum(self.layers_cached[:part])
        shape = cache.shape.buffer(len(run.write_indices), run.length)
        for i in range(self.layers_cached[part]):
            for name, pointer in zip(("key", "value"), cache.pointers(first_layer + i, run), strict=True):
                binding.input_at(f"past_{name}.{i}", self.dtype, shape, pointer)
                binding.output_at(f"present_{name}.{i}", self.dtype, shape, pointer)
        binding.bound["cache"] = (run.serial, run.length)

    def _bind_pool(self, binding: Binding) -> None:
        if binding.bound.get("pool") != self.pool.serial:
            binding.input_at("pool", self.dtype, self.pool.shape, self.pool.row_pointer(0))
            binding.bound["pool"] = self.pool.serial

    def _bind_hidden(self, binding: Binding, out_row: int | None, num_tokens: int, in_all: int) -> None:
        """Let a pass write its tokens' states from a row on, and what the first segment was given, embedded,
        `in_all` rows after.
        """
        if out_row is None or binding.bound.get("hidden") == (self.pool.serial, out_row, in_all):
            return
        shape = (num_tokens, self.manifest.dim)
        binding.output_at("hidden", self.dtype, shape, self.pool.row_pointer(out_row))
        if "input_ids" in binding.input_names:
            binding.output_at("embedded", self.dtype, shape, self.pool.row_pointer(out_row + in_all))
        binding.bound["hidden"] = (self.pool.serial, out_row, in_all)

    def _run_into_pool(self, binding: Binding, out_row: int | None, num_tokens: int, in_all: int) -> None:
        """Run a pass whose states, if any, go to the pool; with a token named twice, by way of a buffer."""
        count = len(binding.own["places"])
        if out_row is None or count == num_tokens:
            self._bind_hidden(binding, out_row, num_tokens, in_all)
            binding.run()
            return
        names = ("hidden", "embedded") if "input_ids" in binding.input_names else ("hidden",)
        if binding.bound.get("hidden") != BUFFERED:
            for name in names:
                binding.output(name, np.zeros((count, self.manifest.dim), self.dtype))
            binding.bound["hidden"] = BUFFERED
        binding.run()
        for place, name in enumerate(names):
            first = out_row + place * in_all
            self.pool.states[first : first + num_tokens] = binding.own[name][:num_tokens]

    def _bind_segment(
        self, binding: Binding, first: int, num_slots: int, num_places: int, num_tokens: int
    ) -> None:
        for name in binding.input_names & {"input_ids", "index", "positions"}:
            binding.input(name, np.zeros(num_tokens, np.int64))
        if "active" in binding.input_names:
            binding.input("active", np.ones(num_tokens, np.bool_))
        binding.input(
            "spread", np.arange(num_slots * num_places, dtype=np.int64).reshape(num_slots, num_places)
        )
        places = np.arange(num_slots * num_places, dtype=np.int64)
        binding.input("places", places[np.minimum(np.arange(num_tokens), len(places) - 1)])
        binding.input("write_indices", np.zeros(num_slots, np.int64))
        if "few" in binding.input_names:
            few = num_places <= FEW_PLACES
            matrices = num_slots * self.manifest.num_kv_heads
            binding.input("few", np.array(few))
            binding.input("products", np.array(few and self.products_agree and self.num_threads <= matrices))

    def _bind_index(self, binding: Binding, num_tokens: int) -> None:
        binding.input("index", np.zeros(num_tokens, np.int64))

    def _bind_route(self, binding: Binding, num_tokens: int) -> None:
        self._bind_index(binding, num_tokens)
        binding.output("goes_in", np.zeros(num_tokens, np.bool_))

    def _bind_gate(self, binding: Binding, num_tokens: int) -> None:
        self._bind_index(binding, num_tokens)
        binding.output("probability", np.zeros(num_tokens, self.dtype))

    def _bind_similarity(self, binding: Binding, num_tokens: int) -> None:
        self._bind_index(binding, num_tokens)
        binding.input("before", np.zeros(num_tokens, np.int64))
        binding.output("similarity", np.zeros(num_tokens, self.dtype))

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
        if len(self.logits) < num_tokens:  # one buffer for all, since each call overwrites the last one's
            self.logits = np.zeros((2 * num_tokens, self.vocab_size), self.dtype)
        binding.output("logits", self.logits[:num_tokens])
        binding.output("top_id", np.zeros(num_tokens, np.int64))
        for name in ("top_prob", "margin", "entropy"):
            binding.output(name, np.zeros(num_tokens, self.dtype))

    def _self_test(self) -> None:
        """Three tokens in one pass on a filled cache must give what three passes give.

        Builds of ONNX Runtime before 1.31 align the causal mask top-left there, and say nothing. Equal to the
        bit they are by themselves, or in passes of an even number of tokens, or not at all.
        """
        together, apart = self._tried()
        if not (np.isfinite(together).all() and np.isfinite(apart).all()):
            raise BundleError(f"{self.bundle}: its first segment gives no finite numbers; {NOT_FINITE}")
        scale = float(np.abs(apart).max())
        difference = float(np.abs(together - apart).max())
        if not difference <= SELF_TEST_TOLERANCE * scale * ROUNDING[self.manifest.precision]:
            raise DeviceError(
                f"self-test failed: several tokens in one pass differ by {difference:.2g} (of "
                f"{scale:.2g}) from one at a time; "
                f"this onnxruntime ({ort.__version__}) masks Attention wrongly; install: pip install "
                "'onnxruntime>=1.31'"
            )
        self.exact = difference == 0.0
        if not self.exact and self.manifest.precision == "int4" and isinstance(self.pool, HiddenPool):
            self.even = True
            self.doubles = True
            self.exact = self.doubles = bool(np.equal(*self._tried()).all())
            self.even = False

    def _tried(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The hidden states of some tokens after the first segment, in passes of three and in passes of
        one.
        """
        length = min(6, self.max_positions)
        ids = np.arange(length, dtype=np.int64) % self.vocab_size
        whole = self.open_cache()
        single = self.open_cache()
        first = self.reserve_rows(2 * length + 3, [])  # and the last pass's embeddings
        half = length // 2
        self.run_segment(0, whole, [Span(0, 0, half)], ids[:half], first)
        self.run_segment(0, whole, [Span(0, half, length)], ids[half:], first + half)
        for i in range(length):
            self.run_segment(0, single, [Span(0, i, i + 1)], ids[i : i + 1], first + length + i)
        states = self.pool.read(np.arange(first, first + 2 * length)).astype(np.float32)
        return states[:length], states[length:]

    def _products_agree(self) -> bool:
        """Whether attention as products gives the bits of its other form for few tokens, here: with more
        threads than matrices ONNX Runtime adds up in another order, and how many it takes is its own affair.

        False for one thread, too, where the other form is the faster.
        """
        if self.manifest.cache_layout != "BGTP" or self.device.own_memory or self.num_threads == 1:
            return False
        row = self.reserve_rows(4, [])
        cache = self.open_cache()
        assert isinstance(cache, RowCache)
        span = [Span(0, PRODUCTS_LENGTH, PRODUCTS_LENGTH + 1)]
        (run,) = cache.runs(0, span)
        noise = np.random.default_rng(0).standard_normal(run.length * cache.shape.numbers)
        for layer in range(self.layers_cached[0]):
            for buffer in cache.tables[run.length].layer(layer):
                buffer[:] = noise.reshape(buffer.shape)
        for place, products in enumerate((True, False)):
            self.products_agree = products
            self.segments[0].bindings.clear()
            self.run_segment(0, cache, span, np.zeros(1, np.int64), row + 2 * place)
        self.segments[0].bindings.clear()
        one, other = self.pool.read(np.array([row, row + 2]))
        return bool((one == other).all())

    def run_every_graph(self) -> None:
        """One token through each graph, so that one that cannot run here is found before a request is."""
        rows = np.zeros(1, np.int64)
        span = [Span(0, 0, 1)]
        cache = self.open_cache()
        row = self.reserve_rows(2 + 2 * len(self.layout), [])
        for number, shape in enumerate(self.layout):
            out_row = row + 2 * number
            if shape.routed:
                self.run_route(number, rows)
                self.run_routed(number, cache, span, np.zeros(1, np.int64), rows, out_row)
            else:
                if self.kvs[number]:
                    self.run_kv(number, cache, span, rows)
                self.run_segment(number, cache, span, rows, out_row)
            rows = np.array([out_row])
            if (exit_index := shape.exit_index) is None:
                continue
            graphs = self.exit_graphs[exit_index]
            if graphs.block:
                self.run_block(exit_index, cache, span, rows, row + 2 * len(self.layout))
            if graphs.gate:
                self.run_gate(exit_index, rows)
            self.run_exit(exit_index, rows)
        self.run_similarity(rows, rows)


def open_stack(
    bundle: Path, *, device: str = "auto", num_threads: int = 0, kind: type[OrtStack] = OrtStack
) -> OrtStack:
    """A bundle's graphs on a device by its name, as a `kind` of stack.

    "auto" is the device that the bundle was made for, where that works and can run it, else the CPU. One
    line in the log says so where it is another than the bundle was made for, and why. Raises BundleError,
    DeviceError.
    """
    target = read_manifest(bundle).target
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


def _spread(spread: Int64s, places: Int64s, spans: Sequence[Span]) -> None:
    """Which token stands at each place of a row, and where each token stands.

    Shapes: spread (B, S), places (N).

    A row's pads repeat its own last token, so that a broken row breaks no other; slots without new tokens
    repeat the first.
    """
    first = spans[0].slot
    num_places = spread.shape[1]
    token = 0
    spread.fill(0)
    for slot, start, stop in spans:
        count = stop - start
        row = slot - first
        spread[row] = np.minimum(np.arange(token, token + num_places), token + count - 1)
        places[token : token + count] = np.arange(row * num_places, row * num_places + count)
        token += count


def _fill(array: NDArray[Any], values: NDArray[Any]) -> None:
    """Values into an array that may have room for the last of them once more."""
    array[: len(values)] = values
    array[len(values) :] = values[-1]
