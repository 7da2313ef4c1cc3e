"""ONNX Runtime sessions, and IOBindings over numpy buffers that are kept from pass to pass."""

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import BundleError, DeviceError
from ease_common.settings import MOST_THREADS
from ease_runtime.bundle.signatures import Signature
from ease_runtime.ort.bfloat import BITS, element_type, read_as
from ease_runtime.ort.device import CPU, Device, DeviceArray
from ease_runtime.ort.memory import Memory

log = logging.getLogger(__name__)

INDICES = ("input_ids", "index", "before", "positions", "spread", "places", "write_indices", "top_id")
TYPES = {
    **dict.fromkeys(INDICES, "tensor(int64)"),
    **dict.fromkeys(("active", "goes_in", "few", "products"), "tensor(bool)"),
}  # others: float
FIGURES = ("logits", "top_prob", "margin", "entropy", "probability", "similarity")  # which the host reads
NAMES = {np.float32: "tensor(float)", np.float16: "tensor(float16)", BITS: "tensor(bfloat16)"}
ALIGNMENT = 256  # bytes, as CUDA's own allocations have it
BINDINGS_KEPT = 128  # a graph, of different shapes; building one costs about 100 µs
CAPTURED_SIZES = (1, 2, 4, 8)  # tokens of passes that are captured; fewer than the next are padded to it
MOST_CAPTURED = 512  # CUDA graphs of a stack
MOST_CAPTURED_BYTES = 1 << 30  # of the GPU's memory that they may have taken before the last one


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
    capture: bool = False,
) -> ort.InferenceSession:
    """Open a graph, or a `changed` form of it over the same files of weights.

    Raises BundleError when ONNX Runtime cannot.

    Sessions share the process's threads, unless this one has its `own_threads`. `capture`: runs may be
    captured as CUDA graphs (see Captures).
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
    graphs = {"enable_cuda_graph": "1"} if capture else {}
    try:
        of_provider = {**device.options, **device.memory.provider_options, **graphs}
        return ort.InferenceSession(
            changed or str(path),
            options,
            providers=[(device.provider, of_provider)],
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise BundleError(
            f"{path} cannot be loaded by onnxruntime {ort.__version__}: {str(error).splitlines()[0]}"
        ) from None


def check_signature(
    session: ort.InferenceSession, path: Path, signature: Signature, dtype: type[np.generic] = np.float32
) -> None:
    """Whether a graph takes and gives what the manifest says, or buffers bound to it would not fit; `dtype`
    is that of its states.

    Raises BundleError.
    """
    try:
        _compare_signature(session, path, signature, dtype)
    except UnicodeDecodeError:
        raise BundleError(f"{path} holds names that are no UTF-8; export the bundle again") from None


def _compare_signature(
    session: ort.InferenceSession, path: Path, signature: Signature, dtype: type[np.generic]
) -> None:
    types = TYPES | dict.fromkeys(FIGURES, NAMES[read_as(dtype)])
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
            if value.type != types.get(value.name, NAMES[dtype]) or shape != expected[value.name]:
                raise BundleError(
                    f"{path} is not the graph that the manifest describes: {value.name} is {value.type} "
                    f"{list(value.shape)}, "
                    f"expected {list(expected[value.name])}; export the bundle again"
                )


def captured_size(num_tokens: int, kernel_steps: Sequence[int] = ()) -> int:
    """How many tokens a pass of so many is padded to, so that it is captured; it stays as it is where it has
    more than all that are, or where the pads would let other kernels run.
    """
    size = next((size for size in CAPTURED_SIZES if size >= num_tokens), num_tokens)
    return num_tokens if any(num_tokens < step <= size for step in kernel_steps) else size


class Captures:
    """The runs of a stack's sessions that are CUDA graphs: one launch each, for dozens of kernels a layer.

    ONNX Runtime captures a run under an id and replays it, whatever is bound then: so an id stands for the
    addresses and shapes that were. It never forgets a graph before its session ends. So graphs and their
    memory are counted, and where there are `MOST_CAPTURED` of them, or they have taken `MOST_CAPTURED_BYTES`,
    other addresses are run without.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.on = True
        self.failed = False
        self.num_bytes = 0
        self.found: dict[Hashable, ort.RunOptions] = {}
        self.without = unsynchronised("-1")

    def run_first(
        self, session: ort.InferenceSession, io: ort.IOBinding, places: Mapping[str, Hashable]
    ) -> ort.RunOptions:
        """The run over some addresses that may capture, after one without: how the next are to be done."""
        key = (id(session), *sorted(places.items()))
        options = self._options(key)
        before = self.memory.num_free()
        try:
            session.run_with_iobinding(io, options)
        except RuntimeError as error:
            self.found.pop(key, None)
            self.memory.stop_capture()
            self.stop(str(error).splitlines()[0])
            session.run_with_iobinding(io, self.without)
            return self.without
        self.num_bytes += max(0, before - self.memory.num_free())
        return options

    def _options(self, key: Hashable) -> ort.RunOptions:
        if key in self.found:
            return self.found[key]
        if len(self.found) == MOST_CAPTURED or self.num_bytes >= MOST_CAPTURED_BYTES:
            return self.without
        self.found[key] = unsynchronised(str(len(self.found) + 1))
        return self.found[key]

    def stop(self, reason: str) -> None:
        """Run everything without from here on."""
        log.warning("passes are not captured as CUDA graphs here, and are slower: %s", reason)
        self.on = False
        self.failed = True


class Binding:
    """An IOBinding.

    Small inputs and outputs are numpy arrays of its own; the rest is bound by address in the device's memory.
    A device with its own memory has a copy of the small ones in two blocks: one copy sends all inputs before
    a run, and one, the only thing that waits, fetches all outputs after it. Runs are captured where
    `captured`, from the second on over the same addresses.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        input_names: frozenset[str],
        device: Device,
        captures: Captures | None = None,
    ) -> None:
        self.session = session
        self.captures = captures
        self.captured = False
        self.places: dict[str, Hashable] = {}  # on a device with its own memory: what is bound where
        self.runs = 0  # over these
        self.options: ort.RunOptions = None
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
            self.io.bind_input(name, "cpu", 0, element_type(array.dtype.type), array.shape, array.ctypes.data)

    def output(self, name: str, array: NDArray[Any]) -> None:
        """Write an output into an array, now and in later runs."""
        self.own[name] = array
        if self.device.own_memory:
            self.fetched.names.append(name)
        else:
            self.io.bind_output(
                name, "cpu", 0, element_type(array.dtype.type), array.shape, array.ctypes.data
            )

    def input_at(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], pointer: int) -> None:
        """Read an input from the device's memory."""
        self._note_place(name, shape, pointer)
        self.io.bind_input(name, self.device.name, 0, element_type(dtype), shape, pointer)

    def output_at(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], pointer: int) -> None:
        """Write an output into the device's memory."""
        self._note_place(name, shape, pointer)
        self.io.bind_output(name, self.device.name, 0, element_type(dtype), shape, pointer)

    def _note_place(self, name: str, shape: tuple[int, ...], pointer: int) -> None:
        if self.captures is not None:
            self.places[name] = pointer, shape
            self.runs = 0

    def settle(self) -> None:
        """Give the small arrays, which are all there now, their places on a device with its own memory."""
        for block, bind in ((self.sent, self.input_at), (self.fetched, self.output_at)):
            for name, pointer in block.place(self.own).items():
                bind(name, self.own[name].dtype.type, self.own[name].shape, pointer)

    def run(self) -> None:
        """Raises DeviceError where the device fails, in this run or in one before it."""
        self.sent.send()
        try:
            if self.captures is None:
                options = unsynchronised() if self.device.own_memory else None
                self.session.run_with_iobinding(self.io, options)
            else:
                with self.captures.memory.lock:
                    self._run_with(self.captures)
        except RuntimeError as error:
            raise DeviceError(
                f"a graph of this bundle fails on {self.device.name}: {str(error).splitlines()[0]}"
            ) from None
        self.fetched.fetch()

    def _run_with(self, captures: Captures) -> None:
        """A run, the second over the same addresses captured."""
        may = captures.on and self.captured
        if may and self.runs == 1:
            self.options = captures.run_first(self.session, self.io, self.places)
        else:
            self.session.run_with_iobinding(self.io, self.options if may and self.runs else captures.without)
        self.runs += may


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
def unsynchronised(graph_id: str = "") -> ort.RunOptions:
    """For runs that need not be done when ONNX Runtime returns: what reads the results waits for them.

    `graph_id`, where runs may be captured: of the CUDA graph; -1 for none.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if graph_id:
        options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


class Graph:
    """A session with one binding for each shape of its inputs, the least used forgotten.

    `bind` fills a new one.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        bind: Callable[..., None],
        device: Device,
        captures: Captures | None = None,
    ) -> None:
        self.captures = captures
        self.session = session
        self.bind = bind
        self.device = device
        self.input_names = frozenset(i.name for i in session.get_inputs())
        self.bindings: OrderedDict[Hashable, Binding] = OrderedDict()

    def binding(self, *shape: int) -> Binding:
        """The binding for a shape, whose last number is that of tokens, and which is passed to `bind` when it
        is new.
        """
        if (binding := self.bindings.get(shape)) is None:
            binding = Binding(self.session, self.input_names, self.device, self.captures)
            self.bindings[shape] = binding
            binding.captured = shape[-1] in CAPTURED_SIZES
            self.bind(binding, *shape)
            binding.settle()
            if len(self.bindings) > BINDINGS_KEPT:
                self.bindings.popitem(last=False)
        else:
            self.bindings.move_to_end(shape)
        return binding
