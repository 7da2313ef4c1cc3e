"""Where graphs run and where their buffers live: numpy arrays on the CPU, ONNX Runtime's own memory
on a GPU.
"""

import ctypes
import functools
import io
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import DeviceError, did_you_mean
from ease_runtime.ort.bfloat import element_type
from ease_runtime.ort.memory import HostMemory, Memory, cuda_memory

DEVICES = ("auto", "cpu", "cuda")
SILENT = 4  # ONNX Runtime's log level for fatal errors only


@dataclass(frozen=True)
class Device:
    """A place to run.

    `own_memory`: buffers stay there, and the host reads or writes one only whole, and rarely. `options`: of
    its provider. `captures`: its passes can be captured as CUDA graphs.
    """

    name: str  # as ONNX Runtime calls it
    provider: str
    own_memory: bool
    options: Mapping[str, str] = field(default_factory=dict)
    captures: bool = False

    @property
    def memory(self) -> Memory:
        """Its memory, for who reads and writes it by address. Raises DeviceError where CUDA is missing."""
        return cuda_memory() if self.provider == CUDA.provider else HostMemory()


CPU = Device("cpu", "CPUExecutionProvider", own_memory=False)
# Products of fp32 keep its 24 bits: a GPU's default for them is TF32, of 11.
CUDA = Device("cuda", "CUDAExecutionProvider", own_memory=True, options={"use_tf32": "0"}, captures=True)


def choose_device(name: str) -> Device:
    """The device of a name; "auto" is CUDA where it works.

    Raises DeviceError for an unknown name, or CUDA where it is missing.
    """
    if name not in DEVICES:
        raise DeviceError(f"unknown device '{name}'; {did_you_mean(name, DEVICES)}")
    if name == "cpu":
        return CPU
    reason = why_no_cuda()
    if reason is None:
        return CUDA
    if name == "cuda":
        raise DeviceError(
            f"device 'cuda' does not work here: {reason}; use --device cpu, or install: pip install "
            "'ease-lm[cuda]'"
        )
    return CPU


def why_no_cuda() -> str | None:
    """What keeps CUDA from working, in a line; None when it works."""
    if CUDA.provider not in ort.get_available_providers():
        return f"this onnxruntime ({ort.__version__}) has no CUDA"
    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(driver)
    except OSError:
        return f"no NVIDIA driver ({driver}) is installed"
    ort.set_default_logger_severity(SILENT)
    try:
        with redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), CUDA.name, 0)
    except Exception:  # a RuntimeError, or whatever a driver raises
        return "no usable GPU or CUDA library was found"
    finally:
        ort.set_default_logger_severity(2)
    return None


class DeviceArray:
    """An array in a device's memory, zero at first."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic], device: Device) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.memory = device.memory
        self.value: Any = ort.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type(dtype), device.name, 0
        )
        self.memory.zero(self.pointer, self.num_bytes)

    @property
    def pointer(self) -> int:
        """Where it begins, in the device's memory."""
        return int(self.value.data_ptr())

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def row_pointer(self, row: int) -> int:
        """Where a row of its first axis begins."""
        return self.pointer + row * math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, first: int = 0, count: int | None = None) -> NDArray[Any]:
        """A copy for the host, of `count` rows of the first axis from `first` on, or of all of them."""
        copy = np.empty((self.shape[0] if count is None else count, *self.shape[1:]), self.dtype)
        self.memory.download(copy, self.row_pointer(first))
        return copy

    def write(self, rows: NDArray[Any]) -> None:
        """Overwrite its first rows."""
        self.memory.upload(self.pointer, np.ascontiguousarray(rows, self.dtype))

    @contextmanager
    def on_host(self) -> Iterator[NDArray[Any]]:
        """A copy to change, which is written back."""
        copy = self.read()
        yield copy
        self.write(copy)


class DeviceRows:
    """Rows (N, W) of an array on a device: slices stay there, any other index fetches them all, once."""

    def __init__(self, array: DeviceArray, first: int, count: int) -> None:
        self.array = array
        self.first = first
        self.shape = (count, *array.shape[1:])

    def __getitem__(self, part: Any) -> Any:
        if not isinstance(part, slice):
            return self.on_host[part]
        first, stop, step = part.indices(self.shape[0])
        assert step == 1, "rows in a line"
        return DeviceRows(self.array, self.first + first, max(0, stop - first))

    @functools.cached_property
    def on_host(self) -> NDArray[Any]:
        """A copy for the host."""
        return self.array.read(self.first, self.shape[0])
