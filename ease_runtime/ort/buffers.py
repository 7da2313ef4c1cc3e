"""The memory that graphs read and write in place: K/V of several rows, and the pool of hidden states.

Shapes: T length of a cache buffer, M rows of the pool, D width.
"""

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import DeviceError
from ease_runtime.ort.device import Device, DeviceArray

MOST_PADS = 256  # of a row: what a pass has of other rows' prompts, schedule.CHUNK
CACHE_STEP = 128  # Attention costs with the buffer's length, so it grows with the text, in these steps
GROWTH = 8  # and by at least this fraction of its length: growing several rows copies them
POOL_ROWS = 256  # rows of the hidden pool to begin with

Int64s = NDArray[np.int64]


class RowCache:
    """K/V of several sequences, one a slot: a buffer (slots, T, kv_dim) for the keys and one for the values
    of each layer.

    `written[k, slot]` positions of segment k have been written; nothing before them is touched by another
    slot's pass. One slot takes its whole length at once, since the system commits memory as pages are
    written, and a shorter T is a shorter view. Several slots share T as a stride: growing copies what is
    written, layer by layer, and is counted in `copied_bytes`.
    """

    serials = itertools.count()

    def __init__(
        self,
        layers_per_segment: Sequence[int],
        num_slots: int,
        kv_dim: int,
        max_positions: int,
        dtype: type[np.generic] = np.float32,
    ) -> None:
        self.dtype = dtype
        self.segment_of = [number for number, count in enumerate(layers_per_segment) for _ in range(count)]
        self.num_slots = num_slots
        self.kv_dim = kv_dim
        self.written = np.zeros((len(layers_per_segment), num_slots), np.int64)
        self.length = max_positions if num_slots == 1 else min(CACHE_STEP, max_positions)
        self.serial = next(self.serials)
        self.copied_bytes = 0
        self.buffers = self._empty(self.length)

    def _empty(self, length: int) -> list[list[NDArray[Any]]]:
        """Zeroed buffers of every layer, which take memory as they are written.

        Raises DeviceError where there is none.
        """
        try:
            return [[self._pages(length), self._pages(length)] for _ in self.segment_of]
        except (OSError, MemoryError, OverflowError):
            size = 2 * len(self.segment_of) * self.num_slots * length * self.kv_dim
            size *= np.dtype(self.dtype).itemsize
            raise DeviceError(
                f"not enough memory for keys and values of {self.num_slots} texts of {length} tokens "
                f"({size / 1e9:.1f} GB); run fewer at once (--batch-size), shorter ones (--max-prompt), or "
                "free some"
            ) from None

    def _pages(self, length: int) -> NDArray[Any]:
        shape = (self.num_slots, length, self.kv_dim)
        size = math.prod(shape) * np.dtype(self.dtype).itemsize
        pages = mmap.mmap(
            -1, size, access=mmap.ACCESS_COPY
        )  # zeros, given back at once when the cache grows; malloc would keep them
        return np.frombuffer(pages, self.dtype).reshape(shape)

    def length_for(self, num_slots: int, needed: int) -> int:
        """The T to bind for a pass over `num_slots` neighbours that writes up to `needed` positions of a row;
        grows when it must.
        """
        if needed > self.length:
            self._resize(-(-max(needed, self.length + self.length // GROWTH) // CACHE_STEP) * CACHE_STEP)
        return min(self.length, -(-needed // CACHE_STEP) * CACHE_STEP) if num_slots == 1 else self.length

    def free(self, slot: int) -> None:
        """Forget a slot. When the others need less than half of T, T shrinks to what they need."""
        self.written[:, slot] = 0
        longest = -(-(int(self.written.max()) + 1) // CACHE_STEP) * CACHE_STEP
        if self.num_slots > 1 and longest <= self.length // 2:
            self._resize(longest)

    def scrub(self) -> None:
        """Zero whatever lies past the written positions: a pad of a broken row may have left what is no
        number there.
        """
        for number, pair in zip(self.segment_of, self.buffers, strict=True):
            for buffer in pair:
                for slot in range(self.num_slots):
                    buffer[slot, self.written[number, slot] :] = 0.0

    def _resize(self, length: int) -> None:
        fresh = self._empty(length)  # all of them first: without memory the cache stays as it was
        self.length, self.serial = length, next(self.serials)
        for number, pair, new in zip(self.segment_of, self.buffers, fresh, strict=True):
            for which, old in enumerate(pair):
                pair[which] = new[which]
                for slot, written in enumerate(self.written[number].tolist()):
                    pair[which][slot, :written] = old[slot, :written]
                    self.copied_bytes += written * self.kv_dim * old.itemsize

    def read(self, layer: int, slot: int, count: int) -> NDArray[Any]:
        """A copy of a layer's (from 0) first `count` keys and values of a slot, for the host.

        Shape: (2, count, kv_dim).
        """
        return np.array([buffer[slot, :count] for buffer in self.buffers[layer]])

    def pointers(self, layer: int, slot: int) -> tuple[int, int]:
        """Where a layer's (from 0) keys and values of a slot begin."""
        key, value = self.buffers[layer]
        return key.ctypes.data + slot * key.strides[0], value.ctypes.data + slot * value.strides[0]


class DeviceCache:
    """As RowCache, in a device's memory: the whole length at once, since the host never copies it."""

    def __init__(
        self,
        layers_per_segment: Sequence[int],
        num_slots: int,
        kv_dim: int,
        max_positions: int,
        dtype: type[np.generic],
        device: Device,
    ) -> None:
        self.num_slots = num_slots
        self.kv_dim = kv_dim
        self.copied_bytes = 0
        self.written = np.zeros((len(layers_per_segment), num_slots), np.int64)
        self.length = (
            max_positions if num_slots == 1 else max_positions + MOST_PADS
        )  # with several rows, pads past the end
        self.serial = next(RowCache.serials)
        shape = (num_slots, self.length, kv_dim)
        self.buffers = [
            (DeviceArray(shape, dtype, device), DeviceArray(shape, dtype, device))
            for _ in range(sum(layers_per_segment))
        ]

    def length_for(self, num_slots: int, needed: int) -> int:
        """The T to bind, as `RowCache.length_for`."""
        assert needed <= self.length, "a pass has more pads than the cache has room for"
        return min(self.length, -(-needed // CACHE_STEP) * CACHE_STEP) if num_slots == 1 else self.length

    def free(self, slot: int) -> None:
        """Forget a slot."""
        self.written[:, slot] = 0

    def scrub(self) -> None:
        """Zero what is no number, wherever a broken row has left it."""
        for pair in self.buffers:
            for buffer in pair:
                with buffer.on_host() as values:
                    values[~np.isfinite(values)] = 0.0

    def read(self, layer: int, slot: int, count: int) -> NDArray[Any]:
        """A copy of a layer's (from 0) first `count` keys and values of a slot, for the host.

        Shape: (2, count, kv_dim).
        """
        return np.array([buffer.read()[slot, :count] for buffer in self.buffers[layer]])

    def pointers(self, layer: int, slot: int) -> tuple[int, int]:
        """Where a layer's (from 0) keys and values of a slot begin."""
        key, value = self.buffers[layer]
        offset = slot * self.length * self.kv_dim * key.dtype.itemsize
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
        return self.array.read()[rows]

    def _write(self, first: NDArray[Any]) -> None:
        with self.array.on_host() as states:
            states[: len(first)] = first

    def _replace(self, num_rows: int) -> None:
        self.array = DeviceArray((num_rows, self.array.shape[1]), self.array.dtype.type, self.device)

    def row_pointer(self, row: int) -> int:
        """Where a row begins in the device's memory."""
        return self.array.pointer + row * self.array.shape[1] * self.array.dtype.itemsize
