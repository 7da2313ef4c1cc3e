"""The memory that graphs read and write in place: K/V of several rows, and the pool of hidden states.

Shapes: T length of a cache buffer, M rows of the pool, D width.
"""

import itertools
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import DeviceError, out_of_memory
from ease_runtime.engine.layout import Span
from ease_runtime.ort.bfloat import clear_not_finite, read_as, widened
from ease_runtime.ort.device import Device, DeviceArray
from ease_runtime.ort.sessions import captured_size

MOST_PADS = 256  # of a row: what a pass has of other rows' prompts, schedule.CHUNK
CACHE_STEP = 128  # attention costs with the buffer's length, so it grows with the text, in these steps
DEVICE_STEP = 512  # the same on a device, where a step is a copy of everything
SLACK = 0.125  # rows stay in their buffers while that costs at most so much more than in the best ones
POOL_ROWS = 256  # rows of the hidden pool to begin with

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class CacheShape:
    """How a layer's keys (or values) lie in a buffer: (slots, heads, T, width) by head, or (slots, T, width).

    `heads` is 1 where a position's heads lie together.
    """

    heads: int
    width: int
    by_head: bool

    def buffer(self, num_slots: int, length: int) -> tuple[int, ...]:
        """The shape that graphs see."""
        middle = (self.heads,) if self.by_head else ()
        return (num_slots, *middle, length, self.width)

    @property
    def numbers(self) -> int:
        """Of one position."""
        return self.heads * self.width


@dataclass(frozen=True)
class Run:
    """One pass over some rows: which of the spans it takes, and where in a buffer its rows lie.

    `write_indices` are those of all rows from `first` on, also of those that it only steps over.
    """

    chosen: list[int]
    spans: list[Span]
    first: int
    length: int
    serial: int
    write_indices: list[int]


class Table:
    """Buffers of one length T for keys and values of each layer, with a row for every slot.

    The system commits memory as pages are written: a row that is not used takes none.
    """

    serials = itertools.count()

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic], num_layers: int) -> None:
        self.serial = next(self.serials)
        self.shape = shape  # (slots, heads, T, width)
        self.dtype = dtype
        self.pages: list[list[mmap.mmap]] = [[] for _ in range(num_layers)]
        self.buffers: list[list[NDArray[Any]]] = [[] for _ in range(num_layers)]

    def layer(self, number: int) -> list[NDArray[Any]]:
        """Keys and values of a layer (from 0), zero at first. Raises DeviceError where there is no memory."""
        if not self.buffers[number]:
            self.pages[number] = [self._zeros(), self._zeros()]
            self.buffers[number] = [
                np.frombuffer(pages, self.dtype).reshape(self.shape) for pages in self.pages[number]
            ]
        return self.buffers[number]

    def _zeros(self) -> mmap.mmap:
        """Pages that are given back at once when they are not needed; malloc would keep them."""
        size = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        try:
            return mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
        except (OSError, MemoryError, OverflowError):
            slots, _, length, _ = self.shape
            raise _no_memory(slots, length, 2 * len(self.pages) * size) from None

    def drop(self, number: int, slot: int | None = None) -> None:
        """Give a layer's memory back, or that of one slot, which is zero then."""
        if slot is None:
            self.buffers[number] = []
            self.pages[number] = []
            return
        for pages, buffer in zip(self.pages[number], self.buffers[number], strict=True):
            start, size = slot * buffer.strides[0], buffer.strides[0]
            if sys.platform == "linux" and start % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0:
                pages.madvise(mmap.MADV_DONTNEED, start, size)
            else:
                buffer[slot] = 0.0


class RowCache:
    """K/V of several sequences, one a slot, in buffers of several lengths.

    `written[k, slot]` positions of segment k have been written; nothing before them is touched by another
    slot's pass. Attention costs with T, and T is a stride, so a slot lies in a table whose T is little more
    than it needs: alone, or with others of about its length, so that they can share a pass. Rows share a
    table where reading what is past their end costs less than reading the weights once more. Another T means
    to copy what is written, layer by layer; `copied_bytes` counts it.
    """

    def __init__(
        self,
        layers_per_segment: Sequence[int],
        num_slots: int,
        shape: CacheShape,
        weight_bytes: int = 0,
        dtype: type[np.generic] = np.float32,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.segment_of = [number for number, count in enumerate(layers_per_segment) for _ in range(count)]
        self.num_slots = num_slots
        self.position_bytes = 2 * len(self.segment_of) * shape.numbers * np.dtype(dtype).itemsize
        self.weight_positions = (
            weight_bytes / self.position_bytes
        )  # whose K/V are as many bytes as the weights
        self.written = np.zeros((len(layers_per_segment), num_slots), np.int64)
        self.needed = [0] * num_slots  # T that holds a slot
        self.lengths = [0] * num_slots  # T of the table that a slot lies in; 0 in none
        self.tables: dict[int, Table] = {}
        self.copied_bytes = 0

    def runs(self, part: int, spans: Sequence[Span]) -> list[Run]:
        """The passes that new entries of some slots take, with room for them: one, unless rows of very
        different lengths would pay for each other. Notes them as written.

        Raises DeviceError where there is no memory; the cache is then as it was.
        """
        before = list(self.needed)
        num_places = max(stop - start for _, start, stop in spans)
        written = self.written[part]
        changed = False
        for slot, start, _ in spans:
            written[slot] = start
            length = rounded(start + num_places)
            if 2 * length <= self.needed[slot]:  # a text was cut, unless other segments still hold it
                length = max(length, rounded(int(self.written[:, slot].max())))
            if length > self.needed[slot] or 2 * length <= self.needed[slot]:
                self.needed[slot] = length
                changed = True
        if changed:
            try:
                self._arrange()
            except DeviceError:
                self.needed = before
                raise
        groups = self._groups(part, spans, num_places)
        runs = [self._run(part, chosen, [spans[place] for place in chosen]) for chosen in groups]
        for slot, _, stop in spans:
            written[slot] = stop
        return runs

    def _groups(self, part: int, spans: Sequence[Span], num_places: int) -> list[list[int]]:
        """Spans by table, and by gaps between their slots that cost more than another pass, or have no room
        for pads.
        """
        written = self.written[part]
        groups: list[list[int]] = []
        last: dict[int, list[int]] = {}  # of each length, the group that may go on
        for place, (slot, _, _) in enumerate(spans):
            length = self.lengths[slot]
            group = last.get(length)
            if group is not None:
                between = range(spans[group[-1]].slot + 1, slot)
                dear = len(between) * length > self.weight_positions
                full = any(self.lengths[k] == length and written[k] + num_places > length for k in between)
                if dear or full:
                    group = None
            if group is None:
                group = last[length] = []
                groups.append(group)
            group.append(place)
        return groups

    def _run(self, part: int, chosen: list[int], spans: list[Span]) -> Run:
        first = spans[0].slot
        length = self.lengths[first]
        own = [self.lengths[slot] == length for slot in range(self.num_slots)]
        written = self.written[part].tolist()
        slots = range(first, spans[-1].slot + 1)
        write_indices = [written[slot] if own[slot] else 0 for slot in slots]
        return Run(chosen, spans, first, length, self.tables[length].serial, write_indices)

    def free(self, slot: int) -> None:
        """Forget a slot, and give its memory back."""
        self.written[:, slot] = 0
        self.needed[slot] = 0
        length = self.lengths[slot]
        self.lengths[slot] = 0
        if length and length not in self.lengths:
            del self.tables[length]
        elif length:
            for layer in range(len(self.segment_of)):
                self.tables[length].drop(layer, slot)

    def scrub(self) -> None:
        """Zero whatever lies past the written positions: a pad of a broken row may have left what is no
        number there.
        """
        for length, table in self.tables.items():
            for layer, number in enumerate(self.segment_of):
                for slot in range(self.num_slots):
                    if self.lengths[slot] != length:
                        table.drop(layer, slot)
                        continue
                    for buffer in table.layer(layer):
                        buffer[slot, :, self.written[number, slot] :] = 0.0

    def _arrange(self) -> None:
        """Let every slot lie in a table of the right length; what is nearly right stays."""
        slots = [slot for slot in range(self.num_slots) if self.needed[slot]]
        best = shared_lengths([self.needed[slot] for slot in slots], self.weight_positions)
        now = [self.lengths[slot] for slot in slots]
        fits = all(self.needed[slot] <= length for slot, length in zip(slots, now, strict=True))
        if fits and self._cost(now) <= self._cost(best) * (1.0 + SLACK):
            return
        moving = {
            slot: length for slot, length in zip(slots, best, strict=True) if length != self.lengths[slot]
        }
        old = dict(self.tables)
        self.tables = old | {length: self._table(length) for length in {*moving.values()} - old.keys()}
        left = {self.lengths[slot] for slot in moving} - {0}
        before = list(self.lengths)
        for slot, length in moving.items():
            self.lengths[slot] = length
        empty = left - set(self.lengths)
        for layer, number in enumerate(self.segment_of):
            for slot, length in moving.items():
                if not before[slot]:
                    continue
                count = int(self.written[number, slot])
                pairs = zip(self.tables[length].layer(layer), old[before[slot]].layer(layer), strict=True)
                for new, buffer in pairs:
                    kept = min(count, length)
                    new[slot, :, :kept] = buffer[slot, :, :kept]
                    self.copied_bytes += new[slot, :, :kept].nbytes
                if before[slot] not in empty:
                    old[before[slot]].drop(layer, slot)
            for length in empty:
                old[length].drop(layer)
        for length in empty:
            del self.tables[length]

    def _table(self, length: int) -> Table:
        """An empty table with room for every layer. Raises DeviceError where there is no memory."""
        shape = (self.num_slots, self.shape.heads, length, self.shape.width)
        table = Table(shape, self.dtype, len(self.segment_of))
        for layer in range(len(self.segment_of)):
            table.layer(layer)
        return table

    def _cost(self, lengths: Sequence[int]) -> float:
        """Positions that a pass over every slot reads, with the weights of a pass for each length."""
        return sum(lengths) + len(set(lengths)) * self.weight_positions

    def read(self, layer: int, slot: int, count: int) -> NDArray[Any]:
        """A copy of a layer's (from 0) first `count` keys and values of a slot, for the host.

        Shape: (2, count, heads * width).
        """
        if not self.lengths[slot]:
            return np.zeros((2, count, self.shape.numbers), read_as(self.dtype))
        pair = self.tables[self.lengths[slot]].layer(layer)
        return widened(np.array([_flat(buffer[slot, :, :count]) for buffer in pair]))

    def copy_out(self, slot: int, count: int) -> list[NDArray[Any]]:
        """Copies of a slot's first `count` keys and values, by layer.

        Shape: (2, heads, count, width) each.
        """
        table = self.tables[self.lengths[slot]]
        return [
            np.array([buffer[slot, :, :count] for buffer in table.layer(layer)])
            for layer in range(len(self.segment_of))
        ]

    def copy_in(self, slot: int, layers: Sequence[NDArray[Any]], count: int) -> None:
        """Begin an empty slot with the first `count` positions of what `copy_out` gave.

        Raises DeviceError where there is no memory; the slot is then empty.
        """
        self.needed[slot] = rounded(count + 1)
        try:
            self._arrange()
        except DeviceError:
            self.needed[slot] = 0
            raise
        table = self.tables[self.lengths[slot]]
        for layer, values in enumerate(layers):
            for buffer, value in zip(table.layer(layer), values, strict=True):
                buffer[slot, :, :count] = value[:, :count]
        self.written[:, slot] = count

    def pointers(self, layer: int, run: Run) -> tuple[int, int]:
        """Where a layer's (from 0) keys and values of a run's rows begin."""
        key, value = self.tables[run.length].layer(layer)
        offset = run.first * key.strides[0]
        return key.ctypes.data + offset, value.ctypes.data + offset


def _no_memory(slots: int, length: int, num_bytes: int) -> DeviceError:
    return DeviceError(
        f"not enough memory for keys and values of {slots} texts of {length} tokens "
        f"({num_bytes / 1e9:.1f} GB); run fewer at once (--batch-size), shorter ones (--max-prompt), or "
        "free some"
    )


def rounded(length: int, step: int | None = None) -> int:
    """The T for a length: in steps, of 128 unless told, and of 1/32 of a long one, since growing copies."""
    step = step or CACHE_STEP
    while length > 32 * step:
        step *= 2
    return -(-length // step) * step


def shared_lengths(needed: Sequence[int], weight_positions: float) -> list[int]:
    """For each row the T of the table that it is to lie in, so that passes over all rows read least.

    Rows of a table read its T positions each; a table more costs a pass more, which reads the weights.
    """
    order = sorted(range(len(needed)), key=lambda row: needed[row])
    sizes = [needed[row] for row in order]
    costs = [0.0]  # of the shortest rows, by their number
    begins = []
    for stop in range(1, len(sizes) + 1):
        found = [costs[start] + weight_positions + (stop - start) * sizes[stop - 1] for start in range(stop)]
        begins.append(int(np.argmin(found)))
        costs.append(min(found))
    lengths = [0] * len(sizes)
    stop = len(sizes)
    while stop:
        start = begins[stop - 1]
        for place in range(start, stop):
            lengths[order[place]] = sizes[stop - 1]
        stop = start
    return lengths


def _flat(rows: NDArray[Any]) -> NDArray[Any]:
    """Shape: (heads, count, width) -> (count, heads * width)."""
    return rows.swapaxes(0, 1).reshape(rows.shape[1], rows.shape[0] * rows.shape[2])


Pairs = list[tuple[DeviceArray, DeviceArray]]  # keys and values, by layer


class DeviceCache:
    """As RowCache, in a device's memory, with one T for all slots: there a pass more costs more than to read
    past the end of short rows. Another T is a copy within the device; `copied_bytes` counts them.

    A lone row whose passes are captured takes its buffers from `spare` (by T, a power of two of steps) and
    leaves them there: graphs are captured for addresses, which then come again. Of a buffer its passes see
    what they need, in steps, too.
    """

    def __init__(
        self,
        layers_per_segment: Sequence[int],
        num_slots: int,
        shape: CacheShape,
        max_positions: int,
        dtype: type[np.generic],
        device: Device,
        spare: dict[int, list[Pairs]] | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.num_layers = sum(layers_per_segment)
        self.copied_bytes = 0
        self.written = np.zeros((len(layers_per_segment), num_slots), np.int64)
        self.spare = spare if num_slots == 1 else None
        pads = num_slots > 1 or self.spare is not None
        self.longest = rounded(max_positions + (MOST_PADS if pads else 0))  # pads go past it
        self.length = 0
        self.serial = next(Table.serials)
        self.buffers: Pairs = []

    def __del__(self) -> None:
        self._leave()

    def runs(self, part: int, spans: Sequence[Span]) -> list[Run]:
        """As `RowCache.runs`: one pass, always.

        A row alone takes a shorter T where that is a shorter view. Raises DeviceError where there is no
        memory; the cache holds what it held.
        """
        first = spans[0].slot
        num_slots = spans[-1].slot - first + 1
        num_places = max(stop - start for _, start, stop in spans)
        if self.spare is not None:
            num_places = captured_size(num_places)
        for slot, start, _ in spans:
            self.written[part, slot] = start
        write_indices = self.written[part, first : first + num_slots].tolist()
        needed = max(write_indices) + num_places
        self._make_room(needed)
        for slot, _, stop in spans:
            self.written[part, slot] = stop
        view = num_slots == 1 and not self.shape.by_head
        step = CACHE_STEP if self.spare is None else DEVICE_STEP
        length = min(self.length, rounded(needed, step)) if view else self.length
        return [Run(list(range(len(spans))), list(spans), first, length, self.serial, write_indices)]

    def _make_room(self, needed: int) -> None:
        """Another T where this is too short for what is needed, or twice as long as all that there is."""
        kept = int(self.written.max())
        length = min(rounded(max(needed, kept), DEVICE_STEP), self.longest)
        assert needed <= length, "a pass has more pads than the cache has room for"
        if self.spare is None:
            fits = self.length // 2 < length <= self.length
        else:
            fits = length <= self.length
            length = min(DEVICE_STEP << (-(-length // DEVICE_STEP) - 1).bit_length(), self.longest)
        if fits:
            return
        buffers = self._buffers(length)
        position = self.shape.width * np.dtype(self.dtype).itemsize
        pieces = self.num_slots * self.shape.heads
        for pair, old in zip(buffers, self.buffers, strict=False) if kept else ():
            for new, source in zip(pair, old, strict=True):
                to, stride = new.pointer, length * position
                new.memory.copy_rows(
                    to, stride, source.pointer, self.length * position, kept * position, pieces
                )
                self.copied_bytes += pieces * kept * position
        self._leave()
        self.buffers = buffers
        self.length = length
        self.serial = next(Table.serials)

    def _buffers(self, length: int) -> Pairs:
        """Zeros for every layer. Raises DeviceError where there is no memory."""
        if self.spare and self.spare.get(length):
            buffers = self.spare[length].pop()
            for array in itertools.chain(*buffers):
                array.memory.zero(array.pointer, array.num_bytes)
            return buffers
        size = self.shape.buffer(self.num_slots, length)
        try:
            return [
                (DeviceArray(size, self.dtype, self.device), DeviceArray(size, self.dtype, self.device))
                for _ in range(self.num_layers)
            ]
        except RuntimeError as error:  # ONNX Runtime's
            if not out_of_memory(error):
                raise
            num_bytes = 2 * self.num_layers * math.prod(size) * np.dtype(self.dtype).itemsize
            raise _no_memory(self.num_slots, length, num_bytes) from None

    def _leave(self) -> None:
        """Let another cache have the buffers, where they are kept for that."""
        if self.spare is not None and self.buffers:
            self.spare.setdefault(self.length, []).append(self.buffers)
            self.buffers = []

    def free(self, slot: int) -> None:
        """Forget a slot."""
        self.written[:, slot] = 0

    def scrub(self) -> None:
        """Zero what is no number, wherever a broken row has left it."""
        for pair in self.buffers:
            for buffer in pair:
                with buffer.on_host() as values:
                    clear_not_finite(values)

    def read(self, layer: int, slot: int, count: int) -> NDArray[Any]:
        """A copy of a layer's (from 0) first `count` keys and values of a slot, for the host.

        Shape: (2, count, heads * width).
        """
        if not self.length:
            return np.zeros((2, count, self.shape.numbers), read_as(self.dtype))
        shape = (self.shape.heads, self.length, self.shape.width)
        rows = [_flat(buffer.read(slot, 1).reshape(shape)[:, :count]) for buffer in self.buffers[layer]]
        return widened(np.array(rows))

    def pointers(self, layer: int, run: Run) -> tuple[int, int]:
        """Where a layer's (from 0) keys and values of a run's rows begin."""
        key, value = self.buffers[layer]
        offset = run.first * self.length * self.shape.numbers * key.dtype.itemsize
        return key.pointer + offset, value.pointer + offset


class HiddenPool:
    """Hidden states by row, of every sequence.

    More rows are another buffer, so `serial` counts the buffers.
    """

    def __init__(self, dim: int, dtype: type[np.generic] = np.float32) -> None:
        self.serial = 0
        self.top = 0
        self.states = np.zeros((POOL_ROWS, dim), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, D)"""
        num_rows, dim = self.states.shape
        return num_rows, dim

    def reserve(self, num_rows: int, live: Sequence[Int64s]) -> int:
        """See `Stack.reserve_rows`.

        Starts over when nothing lives; packs the living rows when the end is reached.
        """
        if self.top and not any(len(rows) for rows in live):
            self.top = 0
        if self.top + num_rows > self.shape[0]:
            self._pack(num_rows, live)
        first = self.top
        self.top = self.top + num_rows
        return first

    def _pack(self, num_rows: int, live: Sequence[Int64s]) -> None:
        """Move the living rows to the front, of a larger buffer when they and the new ones would fill half of
        this.
        """
        kept = (
            np.concatenate([self.read(rows) for rows in live]) if live else self.read(np.zeros(0, np.int64))
        )
        if len(kept) + num_rows > self.shape[0] // 2:
            self._replace(2 * (len(kept) + num_rows) + POOL_ROWS)
            self.serial += 1
        self._write(kept)
        self.top = 0
        for rows in live:
            rows[:] = np.arange(self.top, self.top + len(rows))
            self.top += len(rows)

    def read(self, rows: Int64s) -> NDArray[Any]:
        """A copy of some rows, for the host."""
        return self.states[rows]

    def _write(self, first: NDArray[Any]) -> None:
        self.states[: len(first)] = first

    def _replace(self, num_rows: int) -> None:
        self.states = np.zeros((num_rows, self.states.shape[1]), self.states.dtype)

    def reorder(self, first: int, order: Sequence[int]) -> None:
        """Let the rows from `first` on stand where `order` says, counted from there."""
        self.states[first + np.array(order)] = self.states[first : first + len(order)].copy()

    def row_pointer(self, row: int) -> int:
        """Where a row begins in memory."""
        return self.states.ctypes.data + row * self.states.strides[0]


class DevicePool(HiddenPool):
    """A pool in a device's memory. The host copies it only when the end is reached."""

    def __init__(self, dim: int, dtype: type[np.generic], device: Device) -> None:
        self.serial = 0
        self.top = 0
        self.device = device
        self.array = DeviceArray((POOL_ROWS, dim), dtype, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, D)"""
        return self.array.shape

    def read(self, rows: Int64s) -> NDArray[Any]:
        """A copy of some rows, for the host."""
        if not len(rows):
            return np.zeros((0, self.shape[1]), self.array.dtype)
        first = int(rows.min())
        return self.array.read(first, int(rows.max()) + 1 - first)[rows - first]

    def _write(self, first: NDArray[Any]) -> None:
        self.array.write(first)

    def _replace(self, num_rows: int) -> None:
        self.array = DeviceArray((num_rows, self.array.shape[1]), self.array.dtype.type, self.device)

    def row_pointer(self, row: int) -> int:
        """Where a row begins in the device's memory."""
        return self.array.row_pointer(row)
