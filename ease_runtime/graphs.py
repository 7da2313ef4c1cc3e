"""ONNX Runtime sessions, and IOBindings over numpy buffers that are kept from pass to pass."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_runtime.errors import BundleError, DeviceError
from ease_runtime.signatures import Signature

INDICES = ("input_ids", "index", "before", "positions", "spread", "places", "write_indices", "top_id")
TYPES = {**dict.fromkeys(INDICES, "tensor(int64)"), **dict.fromkeys(("active", "goes_in"), "tensor(bool)")}  # others: float
BINDINGS_KEPT = 128  # a graph, of different shapes; building one costs about 100 µs


@functools.cache
def start_thread_pool(num_threads: int) -> None:
    """Give the process one ONNX Runtime thread pool, which all sessions share. Raises DeviceError when it has another.

    With the default, a spinning pool a session, two segments ran 2x slower and thirty 13x slower than one graph.
    """
    try:
        ort.set_global_thread_pool_sizes(num_threads, 1)
    except Exception:  # ONNX Runtime's exceptions share no base of their own
        raise DeviceError("onnxruntime's thread pool is there already, with another number of threads: a process has one") from None


def load_session(path: Path, log_level: int) -> ort.InferenceSession:
    """Open a graph. Raises BundleError when ONNX Runtime cannot."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = log_level
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise BundleError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {str(error).splitlines()[0]}") from None


def check_signature(session: ort.InferenceSession, path: Path, signature: Signature) -> None:
    """Whether a graph takes and gives what the manifest says, or buffers bound to it would not fit. Raises BundleError."""
    for found, expected, what in zip((session.get_inputs(), session.get_outputs()), signature, ("inputs", "outputs"), strict=True):
        names = {value.name for value in found}
        if names != set(expected):
            odd = ", ".join(sorted(names ^ set(expected)))
            raise BundleError(f"{path} is not the graph that the manifest describes: its {what} differ in {odd}; export the bundle again")
        for value in found:
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
            if value.type != TYPES.get(value.name, "tensor(float)") or shape != expected[value.name]:
                raise BundleError(
                    f"{path} is not the graph that the manifest describes: {value.name} is {value.type} {list(value.shape)}, "
                    f"expected {list(expected[value.name])}; export the bundle again"
                )


class Binding:
    """An IOBinding over numpy buffers. Small inputs are buffers of its own, written in place before each run."""

    def __init__(self, session: ort.InferenceSession, input_names: frozenset[str]) -> None:
        self.session, self.io, self.input_names = session, session.io_binding(), input_names
        self.bound: dict[str, Any] = {}  # what the changing names are bound to, so that only changes are bound again
        self.own: dict[str, NDArray[Any]] = {}

    def input(self, name: str, array: NDArray[Any]) -> None:
        """Read an input from an array, now and in later runs."""
        self.own[name] = array
        self.input_at(name, array.dtype.type, array.shape, array.ctypes.data)

    def output(self, name: str, array: NDArray[Any]) -> None:
        """Write an output into an array, now and in later runs."""
        self.own[name] = array
        self.output_at(name, array.dtype.type, array.shape, array.ctypes.data)

    def input_at(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], pointer: int) -> None:
        self.io.bind_input(name, "cpu", 0, dtype, shape, pointer)

    def output_at(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], pointer: int) -> None:
        self.io.bind_output(name, "cpu", 0, dtype, shape, pointer)

    def run(self) -> None:
        self.session.run_with_iobinding(self.io)


class Graph:
    """A session with one binding for each shape of its inputs, the least used forgotten. `bind` fills a new one."""

    def __init__(self, session: ort.InferenceSession, bind: Callable[..., None]) -> None:
        self.session, self.bind = session, bind
        self.input_names = frozenset(i.name for i in session.get_inputs())
        self.bindings: OrderedDict[Hashable, Binding] = OrderedDict()

    def binding(self, *shape: int) -> Binding:
        """The binding for a shape, which is passed to `bind` when it is new."""
        if (binding := self.bindings.get(shape)) is None:
            binding = self.bindings[shape] = Binding(self.session, self.input_names)
            self.bind(binding, *shape)
            if len(self.bindings) > BINDINGS_KEPT:
                self.bindings.popitem(last=False)
        else:
            self.bindings.move_to_end(shape)
        return binding
