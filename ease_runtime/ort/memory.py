"""A device's memory as the host sees it: what goes there, what comes back, and copies from place to place.

With CUDA everything is put into one stream in the order in which it is asked for: what graphs launch (every
session of the process is given that stream) and the copies here. So a graph reads what was sent before it,
the next one what it wrote, and only `download` waits.
"""

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import DeviceError

TO_DEVICE, TO_HOST, WITHIN = 1, 2, 3  # cudaMemcpyKind
PINNED_BYTES = 1 << 20  # a direction


class Memory(Protocol):
    """Reads and writes a device's memory, by address."""

    provider_options: dict[str, str]  # of every session that works on this memory
    lock: threading.RLock  # who has it is alone: what is asked for meanwhile would be captured, too

    def wait(self) -> None:
        """Until all that was asked for is done."""

    def num_free(self) -> int:
        """Bytes that nothing has."""

    def stop_capture(self) -> None:
        """Give up a capture that has failed, so that the memory can be used again."""

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """Write an array there; it may change as soon as this returns."""

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """Fill an array from there, when all that was asked for before is done."""

    def zero(self, pointer: int, num_bytes: int) -> None:
        """Write zeros there."""

    def copy_rows(
        self, to: int, to_stride: int, source: int, source_stride: int, num_bytes: int, count: int
    ) -> None:
        """Copy `count` pieces of `num_bytes` each, which begin a stride apart."""


class HostMemory:
    """The host's own memory in the part of a device's."""

    def __init__(self) -> None:
        self.provider_options: dict[str, str] = {}
        self.lock = threading.RLock()

    def wait(self) -> None:
        pass

    def num_free(self) -> int:
        return 0

    def stop_capture(self) -> None:
        pass

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: NDArray[Any], pointer: int) -> None:
        assert array.flags.c_contiguous
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def zero(self, pointer: int, num_bytes: int) -> None:
        ctypes.memset(pointer, 0, num_bytes)

    def copy_rows(
        self, to: int, to_stride: int, source: int, source_stride: int, num_bytes: int, count: int
    ) -> None:
        for row in range(count):
            ctypes.memmove(to + row * to_stride, source + row * source_stride, num_bytes)


class CudaMemory:
    """A GPU's memory, through CUDA's runtime library, which onnxruntime-gpu has loaded.

    Its stream is an ordinary one, which waits for CUDA's default stream and is waited for by it: what ONNX
    Runtime does there (weights, while it loads) is in order with the rest, too. A copy runs later than the
    call that asks for it, so arrays go by way of pinned memory that is not used again before the next wait.
    Raises DeviceError for whatever CUDA refuses, and for what failed in a graph before it.
    """

    def __init__(self) -> None:
        major = str(ort.cuda_version).split(".")[0]
        name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
        try:
            self.library = ctypes.CDLL(name)
        except OSError:
            raise DeviceError(
                f"CUDA's runtime library ({name}) is missing; install: pip install 'ease-lm[cuda]'"
            ) from None
        address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        create = self._function("cudaStreamCreate", ctypes.POINTER(ctypes.c_void_p))
        self._copy = self._function("cudaMemcpyAsync", address, address, size, number, address)
        self._copy_rows = self._function(
            "cudaMemcpy2DAsync", address, size, address, size, size, size, number, address
        )
        self._set = self._function("cudaMemsetAsync", address, number, size, address)
        self._synchronize = self._function("cudaStreamSynchronize", address)
        self._pin = self._function("cudaMallocHost", ctypes.POINTER(ctypes.c_void_p), size)
        self._sizes = self._function("cudaMemGetInfo", *[ctypes.POINTER(ctypes.c_size_t)] * 2)
        self._end_capture = self._function("cudaStreamEndCapture", address, ctypes.POINTER(ctypes.c_void_p))
        stream = ctypes.c_void_p()
        create(ctypes.byref(stream))
        assert stream.value is not None, "CUDA made no stream"
        self.stream = stream.value
        self.lock = threading.RLock()
        self.leaving, self.arriving = self._pinned(), self._pinned()
        self.num_leaving = 0  # bytes of `leaving` that copies may not have read yet
        self.provider_options = {
            "user_compute_stream": str(self.stream),
            "use_ep_level_unified_stream": "1",
        }

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        with self.lock:
            for start in range(0, array.nbytes, PINNED_BYTES):
                num_bytes = min(PINNED_BYTES, array.nbytes - start)
                if self.num_leaving + num_bytes > PINNED_BYTES:
                    self.wait()
                pinned = self.leaving + self.num_leaving
                ctypes.memmove(pinned, array.ctypes.data + start, num_bytes)
                self._copy(pointer + start, pinned, num_bytes, TO_DEVICE, self.stream)
                self.num_leaving += num_bytes

    def download(self, array: NDArray[Any], pointer: int) -> None:
        assert array.flags.c_contiguous
        with self.lock:
            for start in range(0, array.nbytes, PINNED_BYTES):
                num_bytes = min(PINNED_BYTES, array.nbytes - start)
                self._copy(self.arriving, pointer + start, num_bytes, TO_HOST, self.stream)
                self.wait()
                ctypes.memmove(array.ctypes.data + start, self.arriving, num_bytes)

    def zero(self, pointer: int, num_bytes: int) -> None:
        with self.lock:
            self._set(pointer, 0, num_bytes, self.stream)

    def copy_rows(
        self, to: int, to_stride: int, source: int, source_stride: int, num_bytes: int, count: int
    ) -> None:
        with self.lock:
            self._copy_rows(to, to_stride, source, source_stride, num_bytes, count, WITHIN, self.stream)

    def wait(self) -> None:
        with self.lock:
            self._synchronize(self.stream)
            self.num_leaving = 0

    def stop_capture(self) -> None:
        with contextlib.suppress(DeviceError):  # it says that it has failed
            self._end_capture(self.stream, ctypes.byref(ctypes.c_void_p()))

    def num_free(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._sizes(ctypes.byref(free), ctypes.byref(total))
        return free.value

    def _pinned(self) -> int:
        found = ctypes.c_void_p()
        self._pin(ctypes.byref(found), PINNED_BYTES)
        assert found.value is not None, "CUDA pinned no memory"
        return found.value

    def _function(self, name: str, *types: Any) -> Callable[..., None]:
        """A function of the library that raises DeviceError for the error that it returns."""
        function = getattr(self.library, name)
        function.argtypes = types
        function.restype = ctypes.c_int
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

        def checked(*arguments: Any) -> None:
            if error := function(*arguments):
                said = self.library.cudaGetErrorString(error).decode()
                raise DeviceError(f"CUDA error {error} in {name}: {said}")

        return checked


@functools.cache
def cuda_memory() -> CudaMemory:
    """The process's GPU memory, with the stream that all its sessions share."""
    return CudaMemory()
