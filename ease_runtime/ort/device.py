"""Where graphs run and where their buffers live: numpy arrays on the CPU, ONNX Runtime's own memory
on a GPU.
"""

import ctypes
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import DeviceError, did_you_mean

DEVICES = ("auto", "cpu", "cuda")
SILENT = 4  # ONNX Runtime's log level for fatal errors only


@dataclass(frozen=True)
class Device:
    """A place to run.

    `own_memory`: buffers stay there, and the host reads or writes one only whole, and rarely. `options`: of
    its provider.
    """

    name: str  # as ONNX Runtime calls it
    provider: str
    own_memory: bool
    options: Mapping[str, str] = field(default_factory=dict)


CPU = Device("cpu", "CPUExecutionProvider", own_memory=False)
# Products of fp32 keep its 24 bits: a GPU's default for them is TF32, of 11.
CUDA = Device("cuda", "CUDAExecutionProvider", own_memory=True, options={"use_tf32": "0"})


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
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device.name, 0)

    @property
    def pointer(self) -> int:
        """Where it begins, in the device's memory."""
        return int(self.value.data_ptr())

    def read(self) -> NDArray[Any]:
        """A copy for the host."""
        return np.array(self.value.numpy())

    @contextmanager
    def on_host(self) -> Iterator[NDArray[Any]]:
        """A copy to change, which is written back."""
        copy = self.read()
        yield copy
        self.value.update_inplace(copy)
