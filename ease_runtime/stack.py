"""The layers as the engine sees them: a cache, a pool of hidden states, and calls that run one graph each.

This is the only module that touches ONNX Runtime, and it decides nothing. What the engine needs of it is the protocol
`Stack`; `ease_runtime.mock.MockStack` is the same interface in numpy, for tests.

Shapes: S new tokens, T length of a cache buffer, M rows of the pool, N tokens at an exit, D width, V vocabulary.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_runtime.errors import BundleError, DeviceError
from ease_runtime.manifest import Manifest, SegmentInfo, load_manifest
from ease_runtime.policy import HeadOutput

CACHE_STEP = 128  # Attention costs with the buffer's length, so the bound length grows with the text, in these steps
POOL_ROWS = 256  # rows of the hidden pool to begin with
BINDINGS_KEPT = 64  # one IOBinding a graph and a number of tokens; building one costs about 100 µs
SELF_TEST_TOLERANCE = 1e-3  # of the largest magnitude: the test looks for a wrong mask, not for rounding

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Call:
    """One graph call, for whoever traces them: what it ran, over how many tokens, with which cache length."""

    graph: str  # "segment", "kv", "route", or "exit" and "gate" (an exit's graph and the head or the gate after it)
    number: int  # of the segment or exit, from 0
    num_tokens: int
    cache_length: int


@dataclass(frozen=True)
class SegmentShape:
    """What the engine knows of a segment: its layers, the exit at its end (from 0) if there is one, and whether tokens go around it."""

    num_layers: int
    exit_index: int | None
    routed: bool = False


class Cache(Protocol):
    """The keys and values of one sequence, every layer. The engine only passes it on."""


class Stack(Protocol):
    """What the engine needs of the layers. Segments and exits are numbered from 0; rows are rows of the hidden pool."""

    layout: tuple[SegmentShape, ...]
    exit_layers: tuple[int, ...]
    vocab_size: int
    max_positions: int
    has_gates: bool  # at every early exit
    trace: list[Call] | None

    def open_cache(self) -> Cache:
        """An empty cache for one sequence."""

    def reserve_rows(self, num_rows: int, live: Sequence[Int64s]) -> int:
        """The first of `num_rows` free rows in a line. Rows named in `live` keep their states; they may move, in place."""

    def run_segment(
        self, number: int, cache: Cache, start: int, inputs: Int64s, out_row: int, active: NDArray[np.bool_] | None = None
    ) -> None:
        """Run S tokens at positions start.. through a segment; their hidden states go to rows out_row...

        `inputs` are token ids for segment 0 and pool rows for the others. Where `active` is False a token is frozen.
        """

    def run_kv(self, number: int, cache: Cache, start: int, rows: Int64s) -> None:
        """Write the K/V that a segment would hold for frozen hidden states at positions start.. (state propagation)."""

    def run_route(self, number: int, rows: Int64s) -> NDArray[np.bool_]:
        """Which hidden states go into a routed segment. Shape: (S) -> (S)."""

    def run_routed(self, number: int, cache: Cache, written: int, positions: Int64s, rows: Int64s, out_row: int) -> None:
        """Run the tokens that go into a routed segment, after the `written` ones that its cache holds. Shapes: positions and rows (S)."""

    def run_gate(self, number: int, rows: Int64s) -> NDArray[np.float32]:
        """An exit's gate: the probability that full depth would say the same. Shape: (N) -> (N), overwritten by the next call."""

    def run_exit(self, number: int, rows: Int64s) -> HeadOutput:
        """What an exit's head says of the hidden states in `rows`. The result is overwritten by the next call."""


@functools.cache
def _start_thread_pool(num_threads: int) -> None:
    """Give the process one ONNX Runtime thread pool, which all sessions share.

    With the default, a spinning pool a session, two segments ran 2x slower and thirty 13x slower than one graph.
    """
    try:
        ort.set_global_thread_pool_sizes(num_threads, 1)
    except Exception:  # ONNX Runtime's exceptions share no base of their own
        raise DeviceError("onnxruntime's thread pool is there already, with another number of threads: a process has one") from None


def _load_session(path: Path, log_level: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = log_level
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise BundleError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {str(error).splitlines()[0]}") from None


class OrtCache:
    """K/V of one sequence as one buffer, layer by layer. Memory is taken by the system as pages are written."""

    _serials = itertools.count()

    def __init__(self, num_layers: int, capacity: int, kv_dim: int) -> None:
        self.serial = next(self._serials)
        self.capacity, self.kv_dim = capacity, kv_dim
        self.buffers = np.zeros((num_layers, 2, 1, capacity, kv_dim), np.float32)

    def length_for(self, num_tokens: int) -> int:
        """The cache length to bind so that `num_tokens` fit: the next step, at most the capacity."""
        return min(self.capacity, -(-num_tokens // CACHE_STEP) * CACHE_STEP)

    def pointers(self, layer: int) -> tuple[int, int]:
        """Where a layer's (from 0) keys and values begin."""
        return self.buffers[layer, 0].ctypes.data, self.buffers[layer, 1].ctypes.data


class HiddenPool:
    """Hidden states by row. A longer T or more rows change what is bound, so `serial` counts the buffers."""

    def __init__(self, dim: int) -> None:
        self.serial, self.top = 0, 0
        self.states = np.zeros((POOL_ROWS, dim), np.float32)

    def reserve(self, num_rows: int, live: Sequence[Int64s]) -> int:
        """See `Stack.reserve_rows`. Starts over when nothing lives; packs the living rows when the end is reached."""
        if self.top and not any(len(rows) for rows in live):
            self.top = 0
        if self.top + num_rows > len(self.states):
            self._pack(num_rows, live)
        first, self.top = self.top, self.top + num_rows
        return first

    def _pack(self, num_rows: int, live: Sequence[Int64s]) -> None:
        kept = np.concatenate([self.states[rows] for rows in live]) if live else self.states[:0]
        if len(kept) + num_rows > len(self.states) // 2:
            self.states = np.zeros((2 * (len(kept) + num_rows) + POOL_ROWS, self.states.shape[1]), np.float32)
            self.serial += 1
        self.states[: len(kept)] = kept
        self.top = 0
        for rows in live:
            rows[:] = np.arange(self.top, self.top + len(rows))
            self.top += len(rows)

    def row_pointer(self, row: int) -> int:
        """Where a row begins in memory."""
        return self.states.ctypes.data + row * self.states.strides[0]


class _Binding:
    """An IOBinding over numpy buffers. Small inputs are buffers of its own, written in place before each run."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session, self.io = session, session.io_binding()
        self.bound: dict[str, Any] = {}  # what the changing names are bound to, so that only changes are bound again
        self.own: dict[str, NDArray[Any]] = {}

    def input(self, name: str, array: NDArray[Any]) -> None:
        self.own[name] = array
        self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def output(self, name: str, array: NDArray[Any]) -> None:
        self.own[name] = array
        self.io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        self.session.run_with_iobinding(self.io)


class _Graph:
    """A session with one binding for each number of tokens, the least used forgotten."""

    def __init__(self, session: ort.InferenceSession, bind: Callable[[_Binding, int], None]) -> None:
        self.session, self.bind = session, bind
        self.bindings: OrderedDict[int, _Binding] = OrderedDict()

    def binding(self, num_tokens: int) -> _Binding:
        if (binding := self.bindings.get(num_tokens)) is None:
            binding = self.bindings[num_tokens] = _Binding(self.session)
            self.bind(binding, num_tokens)
            if len(self.bindings) > BINDINGS_KEPT:
                self.bindings.popitem(last=False)
        else:
            self.bindings.move_to_end(num_tokens)
        return binding


class OrtStack:
    """A bundle's graphs in ONNX Runtime, one row at a time.

        stack = OrtStack(Path("runs/demo/bundle"))

    Raises BundleError when the bundle cannot be trusted or loaded, DeviceError when its graphs compute something wrong here.
    """

    def __init__(self, bundle: Path, *, num_threads: int = 0, log_level: int = 3) -> None:
        self.manifest: Manifest = load_manifest(bundle)
        self.exit_layers = self.manifest.exit_layers
        self.vocab_size, self.max_positions = self.manifest.vocab_size, self.manifest.max_positions
        places = {layer: number for number, layer in enumerate(self.exit_layers)}
        self.layout = tuple(SegmentShape(s.num_layers, places.get(s.last_layer), s.kind == "routed") for s in self.manifest.segments)
        self.has_gates = all(leave.gate for leave in self.manifest.exits[:-1])
        self.trace: list[Call] | None = None
        _start_thread_pool(num_threads)
        load = functools.cache(lambda name: _load_session(bundle / name, log_level))
        heads = {e.head: _Graph(load(e.head), self._bind_head) for e in self.manifest.exits}  # first: loading peaks at twice a graph's size
        self.heads = [heads[e.head] for e in self.manifest.exits]
        self.exits = [_Graph(load(e.graph), self._bind_exit) for e in self.manifest.exits]
        self.segments = [_Graph(load(s.graph), self._bind_segment) for s in self.manifest.segments]
        self.kvs = [_Graph(load(s.kv_graph), self._bind_segment) if s.kv_graph else None for s in self.manifest.segments]
        self.routes = [_Graph(load(s.route_graph), self._bind_route) if s.route_graph else None for s in self.manifest.segments]
        self.gates = [_Graph(load(e.gate), self._bind_gate) if e.gate else None for e in self.manifest.exits]
        self.pool = HiddenPool(self.manifest.dim)
        self.at_head: tuple[int, ...] | None = None  # exit and rows whose states stand before the head, after a gate
        self._self_test()

    def open_cache(self) -> OrtCache:
        return OrtCache(self.manifest.num_layers, self.max_positions, self.manifest.kv_dim)

    def reserve_rows(self, num_rows: int, live: Sequence[Int64s]) -> int:
        self.at_head = None
        return self.pool.reserve(num_rows, live)

    def run_segment(
        self, number: int, cache: Cache, start: int, inputs: Int64s, out_row: int, active: NDArray[np.bool_] | None = None
    ) -> None:
        binding = self._place(self.segments[number], "segment", number, cache, start, inputs)
        binding.own["active"][0] = True if active is None else active
        self._bind_hidden(binding, len(inputs), out_row)
        binding.run()

    def run_kv(self, number: int, cache: Cache, start: int, rows: Int64s) -> None:
        graph = self.kvs[number]
        assert graph is not None, "the first segment runs for every token: there is nothing to propagate into it"
        self._place(graph, "kv", number, cache, start, rows).run()

    def run_route(self, number: int, rows: Int64s) -> NDArray[np.bool_]:
        graph = self.routes[number]
        assert graph is not None, "every token runs a segment that is not routed"
        binding = graph.binding(len(rows))
        self._bind_pool(binding)
        binding.own["index"][:] = rows
        binding.run()
        self._note("route", number, len(rows))
        return binding.own["goes_in"]

    def run_routed(self, number: int, cache: Cache, written: int, positions: Int64s, rows: Int64s, out_row: int) -> None:
        binding = self._place(self.segments[number], "segment", number, cache, written, rows)
        binding.own["positions"][0] = positions
        self._bind_hidden(binding, len(rows), out_row)
        binding.run()

    def run_gate(self, number: int, rows: Int64s) -> NDArray[np.float32]:
        graph = self.gates[number]
        assert graph is not None, "whoever asks a gate has seen that the bundle has one"
        binding = self._run_before_head(graph, number, rows)
        self.at_head = (number, *rows.tolist())
        self._note("gate", number, len(rows))
        return binding.own["probability"]

    def run_exit(self, number: int, rows: Int64s) -> HeadOutput:
        if self.at_head != (number, *rows.tolist()):  # a gate leaves its states where the head reads them
            self._run_before_head(self.exits[number], number, rows)
        self.at_head = None
        head = self.heads[number].binding(len(rows))
        head.run()
        self._note("exit", number, len(rows))
        own = head.own
        return HeadOutput(own["logits"], own["top_id"], own["top_prob"], own["margin"], own["entropy"])

    def _run_before_head(self, graph: _Graph, number: int, rows: Int64s) -> _Binding:
        """Run an exit's own graph or its gate, which write where the exit's head reads."""
        binding, head = graph.binding(len(rows)), self.heads[number].binding(len(rows))
        self._bind_pool(binding)
        binding.own["index"][:] = rows
        if binding.bound.get("head") is not head:
            binding.output("exit_hidden", head.own["exit_hidden"])
            binding.bound["head"] = head
        binding.run()
        return binding

    def _note(self, graph: str, number: int, num_tokens: int, cache_length: int = 0) -> None:
        if self.trace is not None:
            self.trace.append(Call(graph, number, num_tokens, cache_length))

    def _place(self, graph: _Graph, kind: str, number: int, cache: Cache, start: int, inputs: Int64s) -> _Binding:
        """The binding for these tokens, with the cache, the pool and the small inputs in place."""
        assert isinstance(cache, OrtCache)
        num_tokens = len(inputs)
        length = cache.length_for(start + num_tokens)
        binding = graph.binding(num_tokens)
        binding.own["input_ids" if number == 0 else "index"][0] = inputs
        binding.own["write_indices"][0] = start
        if binding.bound.get("cache") != (cache.serial, length):
            self._bind_cache(binding, self.manifest.segments[number], cache, length)
        if number:
            self._bind_pool(binding)
        self._note(kind, number, num_tokens, length)
        return binding

    def _bind_cache(self, binding: _Binding, segment: SegmentInfo, cache: OrtCache, length: int) -> None:
        """Past and present are one buffer, so the cache is written in place; a longer T is a longer view of it."""
        shape = (1, length, cache.kv_dim)
        for i in range(segment.num_layers):
            for name, pointer in zip(("key", "value"), cache.pointers(segment.first_layer - 1 + i), strict=True):
                binding.io.bind_input(f"past_{name}.{i}", "cpu", 0, np.float32, shape, pointer)
                binding.io.bind_output(f"present_{name}.{i}", "cpu", 0, np.float32, shape, pointer)
        binding.bound["cache"] = (cache.serial, length)

    def _bind_pool(self, binding: _Binding) -> None:
        if binding.bound.get("pool") != self.pool.serial:
            binding.input("pool", self.pool.states)
            binding.bound["pool"] = self.pool.serial

    def _bind_hidden(self, binding: _Binding, num_tokens: int, out_row: int) -> None:
        if binding.bound.get("hidden") != (self.pool.serial, out_row):
            shape = (1, num_tokens, self.manifest.dim)
            binding.io.bind_output("hidden", "cpu", 0, np.float32, shape, self.pool.row_pointer(out_row))
            binding.bound["hidden"] = (self.pool.serial, out_row)

    def _bind_segment(self, binding: _Binding, num_tokens: int) -> None:
        names = {i.name for i in binding.session.get_inputs()}
        binding.input("input_ids" if "input_ids" in names else "index", np.zeros((1, num_tokens), np.int64))
        binding.input("write_indices", np.zeros(1, np.int64))
        if "active" in names:
            binding.input("active", np.ones((1, num_tokens), np.bool_))
        if "positions" in names:
            binding.input("positions", np.zeros((1, num_tokens), np.int64))

    def _bind_exit(self, binding: _Binding, num_tokens: int) -> None:
        binding.input("index", np.zeros(num_tokens, np.int64))

    def _bind_route(self, binding: _Binding, num_tokens: int) -> None:
        binding.input("index", np.zeros(num_tokens, np.int64))
        binding.output("goes_in", np.zeros(num_tokens, np.bool_))

    def _bind_gate(self, binding: _Binding, num_tokens: int) -> None:
        binding.input("index", np.zeros(num_tokens, np.int64))
        binding.output("probability", np.zeros(num_tokens, np.float32))

    def _bind_head(self, binding: _Binding, num_tokens: int) -> None:
        binding.input("exit_hidden", np.zeros((num_tokens, self.manifest.dim), np.float32))
        binding.output("logits", np.zeros((num_tokens, self.vocab_size), np.float32))
        binding.output("top_id", np.zeros(num_tokens, np.int64))
        for name in ("top_prob", "margin", "entropy"):
            binding.output(name, np.zeros(num_tokens, np.float32))

    def _self_test(self) -> None:
        """Three tokens in one pass on a filled cache must give what three passes give.

        Builds of ONNX Runtime before 1.31 align the causal mask top-left there, and say nothing.
        """
        length = min(6, self.max_positions)
        ids = np.arange(length, dtype=np.int64) % self.vocab_size
        whole, single = self.open_cache(), self.open_cache()
        first = self.reserve_rows(2 * length, [])
        half = length // 2
        self.run_segment(0, whole, 0, ids[:half], first)
        self.run_segment(0, whole, half, ids[half:], first + half)
        for position in range(length):
            self.run_segment(0, single, position, ids[position : position + 1], first + length + position)
        together, apart = self.pool.states[first : first + length], self.pool.states[first + length : first + 2 * length]
        scale = float(np.abs(apart).max())
        difference = float(np.abs(together - apart).max())
        if not difference <= SELF_TEST_TOLERANCE * scale:
            raise DeviceError(
                f"self-test failed: several tokens in one pass differ by {difference:.2g} (of {scale:.2g}) from one at a time; "
                f"this onnxruntime ({ort.__version__}) masks Attention wrongly; install: pip install 'onnxruntime>=1.31'"
            )
