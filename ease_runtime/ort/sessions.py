"""ONNX Runtime sessions, and IOBindings over numpy buffers that are kept from pass to pass."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import BundleError, DeviceError
from ease_common.settings import MOST_THREADS
from ease_runtime.bundle.signatures import Signature
from ease_runtime.ort.device import CPU, Device, DeviceArray

INDICES = ("input_ids", "index", "before", "positions", "spread", "places", "write_indices", "top_id")
TYPES = {
    **dict.fromkeys(INDICES, "tensor(int64)"),
    **dict.fromkeys(("active", "goes_in", "few", "products"), "tensor(bool)"),
}  # others: float
ALIGNMENT = 256  # bytes, as CUDA's own allocations have it
BINDINGS_KEPT = 128  # a graph, of different shapes; building one costs about 100 µs


@functools.cache
def start_thread_pool(num_threads: int) -> None:
    """Give the process one ONNX Runtime thread pool, which all sessions share.

    Raises DeviceError when it has another.

    With the default, a spinning pool a session, two segments ran 2x slower and thirty 13x slower than one
    graph.
    """
    if not 0 <= num_threads <= MOST_THREADS:
        raise DeviceError(f"{num_threads} threads: expected 0 (all) to {MOST_THREADS}, 4 a CPU")
    try:
        ort.set_global_thread_pool_sizes(num_threads, 1)
    except Exception:  # ONNX Runtime's exceptions share no base of their own
        raise DeviceError(
            "onnxruntime's thread pool is there already, with another number of threads: a process has one"
        ) from None


@functools.cache
def share_arena() -> None:
    """Give the process one arena for what graphs compute in between, which all sessions share: they never run
    at once.

    With an arena each, every segment keeps what the longest prompt took of it (40 MB more at 135M parameters
    in three segments).
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def load_session(
    path: Path,
    log_level: int,
    device: Device = CPU,
    *,
    changed: bytes | None = None,
    own_threads: bool = False,
) -> ort.InferenceSession:
    """Open a graph, or a `changed` form of it over the same files of weights.

    Raises BundleError when ONNX Runtime cannot.

    Sessions share the process's threads, unless this one has its `own_threads`.
    """
    options = ort.SessionOptions()
    if device.provider != CPU.provider:
        options.add_session_config_entry(
            "session.disable_cpu_ep_fallback", "1"
        )  # a node left on the CPU would be a silent copy
    options.use_per_session_threads = own_threads
    share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = log_level
    if changed is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    try:
        return ort.InferenceSession(
            changed or str(path),
            options,
            providers=[(device.provider, {**device.options, **device.memory.provider_options})],
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise BundleError(
            f"{path} cannot be loaded by onnxruntime {ort.__version__}: {str(error).splitlines()[0]}"
        ) from None


def check_signature(
    session: ort.InferenceSession, path: Path, signature: Signature, floats: str = "tensor(float)"
) -> None:
    """Whether a graph takes and gives what the manifest says, or buffers bound to it would not fit.

    Raises BundleError.
    """
    try:
        _compare_signature(session, path, signature, floats)
    except UnicodeDecodeError:
        raise BundleError(f"{path} holds names that are no UTF-8; export the bundle again") from None


def _compare_signature(session: ort.InferenceSession, path: Path, signature: Signature, floats: str) -> None:
    for found, expected, what in zip(
        (session.get_inputs(), session.get_outputs()), signature, ("inputs", "outputs"), strict=True
    ):
        names = {value.name for value in found}
        if names != set(expected):
            odd = ", ".join(sorted(names ^ set(expected)))
            raise BundleError(
                f"{path} is not the graph that the manifest describes: its {what} differ in {odd}; "
                "export the bundle again"
            )
        for value in found:
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
            if value.type != TYPES.get(value.name, floats) or shape != expected[value.name]:
                raise BundleError(
                    f"{path} is not the graph that the manifest describes: {value.name} is {value.type} "
                    f"{list(value.shape)}, "
                    f"expected {list(expected[value.name])}; export the bundle again"
                )


class Binding:
    """An IOBinding.

    Small inputs and outputs are numpy arrays of its own; the rest is bound by address in the device's memory.
    A device with its own memory has a copy of the small ones in two blocks: one copy sends all inputs before
    a run, and one, the only thing that waits, fetches all outputs after it.
    """

    def __init__(self, session: ort.InferenceSession, input_names: frozenset[str], device: Device) -> None:
        self.session = session
        self.io = session.io_binding()
        self.input_names = input_names
        self.device = device
        # what the changing names are bound to, so that only changes are bound again
        self.bound: dict[str, Any] = {}
        self.own: dict[str, NDArray[Any]] = {}
        self.sent = Block(device)
        self.fetched = Block(device)

    def input(self, name: str, array: NDArray[Any]) -> None:
        """Read an input from a small array, as it is at each run.

        One without axes chooses what a graph does, which the host decides on every device.
        """
        self.own[name] = array
        if self.device.own_memory and array.shape:
            self.sent.names.append(name)
        else:
            self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def output(self, name: str, array: NDArray[Any]) -> None:
        """Write an output into an array, now and in later runs."""
        self.own[name] = array
        if self.device.own_memory:
            self.fetched.names.append(name)
        else:
            self.io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def input_at(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], pointer: int) -> None:
        """Read an input from the device's memory."""
        self.io.bind_input(name, self.device.name, 0, dtype, shape, pointer)

    def output_at(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], pointer: int) -> None:
        """Write an output into the device's memory."""
        self.io.bind_output(name, self.device.name, 0, dtype, shape, pointer)

    def settle(self) -> None:
        """Give the small arrays, which are all there now, their places on a device with its own memory."""
        for block, bind in ((self.sent, self.input_at), (self.fetched, self.output_at)):
            for name, pointer in block.place(self.own).items():
                bind(name, self.own[name].dtype.type, self.own[name].shape, pointer)

    def run(self) -> None:
        """Raises DeviceError where the device fails, in this run or in one before it."""
        self.sent.send()
        try:
            self.session.run_with_iobinding(self.io, unsynchronised() if self.device.own_memory else None)
        except RuntimeError as error:
            raise DeviceError(
                f"a graph of this bundle fails on {self.device.name}: {str(error).splitlines()[0]}"
            ) from None
        self.fetched.fetch()


class Block:
    """Small arrays in a line, in the host's memory and in the device's, so that one copy moves them all."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.names: list[str] = []
        self.host = np.zeros(0, np.uint8)
        self.array: DeviceArray | None = None

    def place(self, own: dict[str, NDArray[Any]]) -> dict[str, int]:
        """Move the arrays of its names into the block, and say where they are on the device."""
        if not self.names:
            return {}
        sizes = [-(-own[name].nbytes // ALIGNMENT) * ALIGNMENT for name in self.names]
        starts = np.cumsum([0, *sizes]).tolist()
        self.host = np.zeros(starts[-1], np.uint8)
        self.array = DeviceArray(self.host.shape, np.uint8, self.device)
        for name, start in zip(self.names, starts, strict=False):
            array = own[name]
            own[name] = self.host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            own[name][...] = array
        return {name: self.array.pointer + start for name, start in zip(self.names, starts, strict=False)}

    def send(self) -> None:
        """Copy the host's side to the device."""
        if self.array is not None:
            self.array.memory.upload(self.array.pointer, self.host)

    def fetch(self) -> None:
        """Copy the device's side to the host, when it is written."""
        if self.array is not None:
            self.array.memory.download(self.host, self.array.pointer)


@functools.cache
def unsynchronised() -> ort.RunOptions:
    """For runs that need not be done when ONNX Runtime returns: what reads the results waits for them."""
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


class Graph:
    """A session with one binding for each shape of its inputs, the least used forgotten.

    `bind` fills a new one.
    """

    def __init__(self, session: ort.InferenceSession, bind: Callable[..., None], device: Device) -> None:
        self.session = session
        self.bind = bind
        self.device = device
        self.input_names = frozenset(i.name for i in session.get_inputs())
        self.bindings: OrderedDict[Hashable, Binding] = OrderedDict()

    def binding(self, *shape: int) -> Binding:
        """The binding for a shape, which is passed to `bind` when it is new."""
        if (binding := self.bindings.get(shape)) is None:
            binding = self.bindings[shape] = Binding(self.session, self.input_names, self.device)
            self.bind(binding, *shape)
            binding.settle()
            if len(self.bindings) > BINDINGS_KEPT:
                self.bindings.popitem(last=False)
        else:
            self.bindings.move_to_end(shape)
        return binding
