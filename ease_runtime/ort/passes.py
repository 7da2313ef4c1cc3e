"""Tokens through graphs over the cache: where they stand, and what graphs are bound to (caches, the pool of
hidden states, small inputs).

Shapes: N new tokens in all, B neighbouring slots of the cache, S new tokens of the longest of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_runtime.bundle.manifest import Manifest
from ease_runtime.engine.layout import Span
from ease_runtime.ort.buffers import DeviceCache, HiddenPool, Int64s, RowCache, Run
from ease_runtime.ort.device import Device, DeviceArray
from ease_runtime.ort.sessions import CAPTURED_SIZES, Binding, Graph

BUFFERED = (-1, -1, -1)  # where a pass has its states that go to a buffer, and no rows of the pool
FEW_PLACES = 8  # new tokens of a row up to which the forms of attention for few are faster (measured)


class Passes:
    """Runs passes over a cache and a pool.

    `layers_cached` counts the layers of each part of the cache: segments, then exits' own layers.
    `products_agree` says whether attention may be products (see load_tests.py). `padded` says to how many
    tokens a pass over a lone row is padded.
    """

    def __init__(
        self,
        manifest: Manifest,
        dtype: type[np.generic],
        pool: HiddenPool,
        layers_cached: Sequence[int],
        num_threads: int,
        device: Device,
    ) -> None:
        self.device = device
        self.dim = manifest.dim
        self.num_kv_heads = manifest.num_kv_heads
        self.dtype = dtype
        self.pool = pool
        self.layers_cached = layers_cached
        self.num_threads = num_threads
        self.products_agree = False
        self.padded: Callable[[int], int] = lambda num_tokens: num_tokens

    def run(
        self,
        graph: Graph,
        part: int,
        cache: RowCache | DeviceCache,
        spans: Sequence[Span],
        inputs: Int64s,
        out_row: int | None,
        own: Mapping[str, NDArray[Any]],
        *,
        even: bool,
    ) -> list[Run]:
        """Run tokens through a graph over a part of the cache, in as many passes as the cache says, and let
        their states stand in their own order from `out_row` on.

        `own` are the graph's own inputs (N); `even`: no pass of an odd number of tokens. Returns the passes.
        """
        runs = cache.runs(part, spans)
        if len(runs) == 1:
            binding = self._place(graph, part, cache, runs[0], inputs, own, even)
            self._run_into_pool(binding, out_row, len(inputs), len(inputs))
            return runs
        starts = np.cumsum([0, *(stop - start for _, start, stop in spans)]).tolist()
        order: list[int] = []
        for run in runs:
            tokens = [token for place in run.chosen for token in range(starts[place], starts[place + 1])]
            taken = {name: values[tokens] for name, values in own.items()}
            binding = self._place(graph, part, cache, run, inputs[tokens], taken, even)
            row = None if out_row is None else out_row + len(order)
            self._run_into_pool(binding, row, len(tokens), len(inputs))
            order += tokens
        if out_row is not None:
            self.pool.reorder(out_row, order)
            if "input_ids" in graph.input_names:
                self.pool.reorder(out_row + len(inputs), order)
        return runs

    def _place(
        self,
        graph: Graph,
        part: int,
        cache: RowCache | DeviceCache,
        run: Run,
        inputs: Int64s,
        own: Mapping[str, NDArray[Any]],
        even: bool,
    ) -> Binding:
        """The binding for a run, with the cache, the pool and the small inputs in place.

        It covers the slots from the first to the last span. Those without new tokens, and rows with fewer
        than the longest, write pads past what they hold; so does a lone row that is padded to be captured.
        Where it has to be of an `even` number of tokens, the last one is named twice; its second place is its
        first.
        """
        num_slots = len(run.write_indices)
        num_places = max(stop - start for _, start, stop in run.spans)
        num_tokens = len(inputs) + int(even and len(inputs) % 2)
        if cache.num_slots == 1 and num_tokens == num_places:
            num_places = num_tokens = self.padded(num_tokens)
        binding = graph.binding(run.first, num_slots, num_places, num_tokens)
        fill(binding.own["index" if part else "input_ids"], inputs)
        binding.own["write_indices"][:] = run.write_indices
        for name, values in own.items():
            fill(binding.own[name], values)
        if num_slots > 1:
            places = binding.own["places"]
            _spread(binding.own["spread"], places, run.spans)
            places[len(inputs) :] = places[len(inputs) - 1]
        if binding.bound.get("cache") != (run.serial, run.length):
            self._bind_cache(binding, part, cache, run)
        if part:
            self.bind_pool(binding)
        return binding

    def _bind_cache(self, binding: Binding, part: int, cache: RowCache | DeviceCache, run: Run) -> None:
        """Past and present are one buffer, so the cache is written in place. Passes over a lone row's cache,
        whose addresses come again, are captured.
        """
        first_layer = sum(self.layers_cached[:part])
        shape = cache.shape.buffer(len(run.write_indices), run.length)
        for i in range(self.layers_cached[part]):
            for name, pointer in zip(("key", "value"), cache.pointers(first_layer + i, run), strict=True):
                binding.input_at(f"past_{name}.{i}", self.dtype, shape, pointer)
                binding.output_at(f"present_{name}.{i}", self.dtype, shape, pointer)
        binding.bound["cache"] = (run.serial, run.length)
        binding.captured = cache.num_slots == 1 and len(binding.own["places"]) in CAPTURED_SIZES

    def bind_pool(self, binding: Binding) -> None:
        """Let a graph read the pool where it is now."""
        if binding.bound.get("pool") != self.pool.serial:
            binding.input_at("pool", self.dtype, self.pool.shape, self.pool.row_pointer(0))
            binding.bound["pool"] = self.pool.serial

    def _bind_hidden(self, binding: Binding, out_row: int | None, num_tokens: int, in_all: int) -> None:
        """Let a pass write its tokens' states from a row on, and what the first segment was given, embedded,
        `in_all` rows after.
        """
        if out_row is None or binding.bound.get("hidden") == (self.pool.serial, out_row, in_all):
            return
        shape = (num_tokens, self.dim)
        binding.output_at("hidden", self.dtype, shape, self.pool.row_pointer(out_row))
        if "input_ids" in binding.input_names:
            binding.output_at("embedded", self.dtype, shape, self.pool.row_pointer(out_row + in_all))
        binding.bound["hidden"] = (self.pool.serial, out_row, in_all)

    def _run_into_pool(self, binding: Binding, out_row: int | None, num_tokens: int, in_all: int) -> None:
        """Run a pass whose states, if any, go to the pool; by way of a buffer with a token named twice, and
        where the pass may be captured, whose addresses may not change.
        """
        count = len(binding.own["places"])
        if out_row is not None and binding.captures is not None and binding.captured:
            self._run_by_buffer(binding, out_row, num_tokens, in_all)
            return
        if out_row is None or count == num_tokens:
            self._bind_hidden(binding, out_row, num_tokens, in_all)
            binding.run()
            return
        names = ("hidden", "embedded") if "input_ids" in binding.input_names else ("hidden",)
        if binding.bound.get("hidden") != BUFFERED:
            for name in names:
                binding.output(name, np.zeros((count, self.dim), self.dtype))
            binding.bound["hidden"] = BUFFERED
        binding.run()
        for place, name in enumerate(names):
            first = out_row + place * in_all
            self.pool.states[first : first + num_tokens] = binding.own[name][:num_tokens]

    def _run_by_buffer(self, binding: Binding, out_row: int, num_tokens: int, in_all: int) -> None:
        """Run a pass with its states in a buffer of the binding, on the device, and copy them to the pool."""
        count = len(binding.own["places"])
        names = ("hidden", "embedded") if "input_ids" in binding.input_names else ("hidden",)
        buffer: DeviceArray | None = binding.bound.get("states")
        if buffer is None:
            shape = (len(names) * count, self.dim)
            buffer = binding.bound["states"] = DeviceArray(shape, self.dtype, self.device)
        if binding.bound.get("hidden") != BUFFERED:
            for place, name in enumerate(names):
                binding.output_at(name, self.dtype, (count, self.dim), buffer.row_pointer(place * count))
            binding.bound["hidden"] = BUFFERED
        binding.run()
        row = self.dim * buffer.dtype.itemsize
        to = self.pool.row_pointer(out_row)
        buffer.memory.copy_rows(to, in_all * row, buffer.pointer, count * row, num_tokens * row, len(names))

    def bind(self, binding: Binding, first: int, num_slots: int, num_places: int, num_tokens: int) -> None:
        """Fill a new binding of a graph over the cache with its small inputs."""
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
            matrices = num_slots * self.num_kv_heads
            binding.input("few", np.array(few))
            binding.input("products", np.array(few and self.products_agree and self.num_threads <= matrices))


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


def fill(array: NDArray[Any], values: NDArray[Any]) -> None:
    """Values into an array that may have room for the last of them some times more."""
    array[: len(values)] = values
    array[len(values) :] = values[-1]
