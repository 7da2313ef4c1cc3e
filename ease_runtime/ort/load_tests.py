"""What is tried when a bundle is loaded: whether its graphs run here and mask rightly, and which passes give
the bits of which others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ease_common.errors import BundleError, DeviceError
from ease_runtime.engine.layout import Span
from ease_runtime.ort.bfloat import narrowed
from ease_runtime.ort.buffers import DeviceCache, RowCache
from ease_runtime.ort.sessions import Captures

if TYPE_CHECKING:
    from ease_runtime.ort.stack import OrtStack

PRODUCTS_LENGTH = 2000  # tokens in the cache of the pass that compares two forms of attention
SELF_TEST_TOLERANCE = 1e-3  # of the largest magnitude: the test looks for a wrong mask, not for rounding
NOT_FINITE = (
    "its weights hold NaN or infinity, or overflow: get the model's own weights again, then export them"
)
# Lengths of text, and rows and tokens of passes, that are compared with passes of one token: attention on a
# GPU divides its sums by all of these, and by the length of the buffer. So most lengths are right before a
# step of that, which passes of several tokens cross. On a CPU it divides them by none: one length is enough.
LENGTHS = (100, 508, 1020, 4092, 8188, 16_380, 32_764)
LENGTHS_ON_CPU = (1000,)
SHAPES = {1: (2, 8, 17), 2: (3,), 8: (2,)}  # tokens a row, by rows
MOST_ON_CPU = 2  # rows
MOST_TRIED_BYTES = 1 << 28  # of keys and values of all rows in the first segment: they take memory and time
RUNS_OF_CAPTURES = 3  # of each of two tokens: the first of all is without, the second captures
NOISE = 9973  # numbers of noise, repeated; prime, so that no two positions are alike
# times that, by precision (int8 and int4 round activations within products) and by what is around
ROUNDING = {"fp32": 1, "fp16": 20, "bf16": 160, "int8": 50, "int4": 50}


def self_test(stack: "OrtStack") -> None:
    """Three tokens in one pass on a filled cache must give what three passes give.

    Builds of ONNX Runtime before 1.31 align the causal mask top-left there, and say nothing. Equal to the
    bit they are by themselves, or in passes of an even number of tokens, or not at all.
    """
    together, apart = _tried(stack)
    if not (np.isfinite(together).all() and np.isfinite(apart).all()):
        raise BundleError(f"{stack.bundle}: its first segment gives no finite numbers; {NOT_FINITE}")
    scale = float(np.abs(apart).max())
    difference = float(np.abs(together - apart).max())
    rounding = max(ROUNDING[name] for name in (stack.manifest.precision, stack.manifest.activations))
    if not difference <= SELF_TEST_TOLERANCE * scale * rounding:
        raise DeviceError(
            f"self-test failed: several tokens in one pass differ by {difference:.2g} (of "
            f"{scale:.2g}) from one at a time; "
            f"this onnxruntime ({ort.__version__}) masks Attention wrongly; install: pip install "
            "'onnxruntime>=1.31'"
        )
    stack.exact = difference == 0.0
    if not stack.exact and stack.manifest.precision == "int4" and not stack.device.own_memory:
        stack.even = True
        stack.doubles = True
        stack.exact = stack.doubles = bool(np.equal(*_tried(stack)).all())
        stack.even = False
    stack.exact = stack.exact and _exact_everywhere(stack)


def _tried(stack: "OrtStack") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The hidden states of some tokens after the first segment, in passes of three and in passes of
    one.
    """
    length = min(6, stack.max_positions)
    ids = np.arange(length, dtype=np.int64) % stack.vocab_size
    whole = stack.open_cache()
    single = stack.open_cache()
    first = stack.reserve_rows(2 * length + 3, [])  # and the last pass's embeddings
    half = length // 2
    stack.run_segment(0, whole, [Span(0, 0, half)], ids[:half], first)
    stack.run_segment(0, whole, [Span(0, half, length)], ids[half:], first + half)
    for i in range(length):
        stack.run_segment(0, single, [Span(0, i, i + 1)], ids[i : i + 1], first + length + i)
    states = stack.read_states(np.arange(first, first + 2 * length)).astype(np.float32)
    return states[:length], states[length:]


def _exact_everywhere(stack: "OrtStack") -> bool:
    """Whether passes of several tokens and rows give the bits of one token at a time, behind texts of several
    lengths.
    """
    longest = stack.max_positions - max(max(sizes) for sizes in SHAPES.values())
    if longest < 1:
        return True
    lengths = {min(length, longest) for length in (LENGTHS if stack.device.own_memory else LENGTHS_ON_CPU)}
    stack.even = stack.doubles
    shapes = [rows for rows in SHAPES if stack.device.own_memory or rows <= MOST_ON_CPU]
    exact = all(_exact_rows(stack, num_rows, sorted(lengths)) for num_rows in shapes)
    stack.even = False
    return exact


def _exact_rows(stack: "OrtStack", num_rows: int, lengths: Sequence[int]) -> bool:
    cache = stack.open_cache(num_rows, 1)
    token_bytes = 2 * stack.layers_cached[0] * stack.manifest.kv_dim * np.dtype(stack.dtype).itemsize
    most = MOST_TRIED_BYTES // (num_rows * token_bytes)
    for length in (length for length in lengths if length <= most):  # it grows with them
        _fill_with_noise(stack, cache, [Span(slot, 0, length) for slot in range(num_rows)])
        if not all(_exact_behind(stack, cache, num_rows, length, size) for size in SHAPES[num_rows]):
            return False
    return True


def _exact_behind(
    stack: "OrtStack", cache: RowCache | DeviceCache, num_rows: int, length: int, size: int
) -> bool:
    """Whether the first and the last of `size` new tokens a row, behind `length` others, come out of one pass
    over all rows as they come out alone.
    """
    ids = np.arange(num_rows * size, dtype=np.int64) % stack.vocab_size
    first = stack.reserve_rows(2 * len(ids) + 2, [])  # and the embeddings
    alone = first + 2 * len(ids)
    stack.run_segment(0, cache, [Span(slot, length, length + size) for slot in range(num_rows)], ids, first)
    for slot in range(num_rows):
        for place in (0, size - 1):
            token = slot * size + place
            span = Span(slot, length + place, length + place + 1)
            stack.run_segment(0, cache, [span], ids[token : token + 1], alone)
            together, by_itself = stack.read_states(np.array([first + token, alone]))
            if not np.array_equal(together, by_itself):
                return False
    return True


def _fill_with_noise(stack: "OrtStack", cache: RowCache | DeviceCache, spans: Sequence[Span]) -> None:
    """Give the first segment keys and values to read, other ones at every position."""
    noise = narrowed(np.random.default_rng(0).standard_normal(NOISE), stack.dtype)
    runs = cache.runs(0, spans)
    for layer in range(stack.layers_cached[0]):
        if isinstance(cache, DeviceCache):
            for array in cache.buffers[layer]:
                array.write(np.resize(noise, array.shape))
        else:
            for run in runs:
                for values in cache.tables[run.length].layer(layer):
                    values[:] = np.resize(noise, values.shape)


def products_agree(stack: "OrtStack") -> bool:
    """Whether attention as products gives the bits of its other form for few tokens, here: with more
    threads than matrices ONNX Runtime adds up in another order, and how many it takes is its own affair.

    False for one thread, too, where the other form is the faster.
    """
    if stack.manifest.cache_layout != "BGTP" or stack.device.own_memory or stack.num_threads == 1:
        return False
    row = stack.reserve_rows(4, [])
    cache = stack.open_cache()
    span = [Span(0, PRODUCTS_LENGTH, PRODUCTS_LENGTH + 1)]
    _fill_with_noise(stack, cache, span)
    for place, products in enumerate((True, False)):
        stack.passes.products_agree = products
        stack.segments[0].bindings.clear()
        stack.run_segment(0, cache, span, np.zeros(1, np.int64), row + 2 * place)
    stack.segments[0].bindings.clear()
    one, other = stack.pool.read(np.array([row, row + 2]))
    return bool((one == other).all())


def try_captures(stack: "OrtStack", captures: Captures) -> None:
    """Stop captures where replays are not right. What is tried after this runs without.

    Two tokens in turns, at the first segment and its exit, without captures and then with them: uncaptured,
    captured and replayed they must say the same, to the bit.
    """
    cache = stack.open_cache()
    row = stack.reserve_rows(2, [])  # and the embedding

    def states_of(token: int) -> NDArray[np.float32]:
        ids = np.array([token % stack.vocab_size])
        stack.run_segment(0, cache, [Span(0, 0, 1)], ids, row)
        figures = stack.run_exit(0, np.array([row])).top_prob
        return np.concatenate([stack.read_states(np.array([row]))[0], figures]).astype(np.float32)

    captures.on = False
    expected = [states_of(token) for token in range(2)]
    captures.on = True
    found = [states_of(place % 2) for place in range(2 * RUNS_OF_CAPTURES)]
    if not all(np.array_equal(states, expected[place % 2]) for place, states in enumerate(found)):
        captures.stop("replays say other things than runs")
    captures.on = False


def run_every_graph(stack: "OrtStack") -> None:
    """One token through each graph, so that one that cannot run here is found before a request is."""
    rows = np.zeros(1, np.int64)
    span = [Span(0, 0, 1)]
    cache = stack.open_cache()
    row = stack.reserve_rows(2 + 2 * len(stack.layout), [])
    for number, shape in enumerate(stack.layout):
        out_row = row + 2 * number
        if shape.routed:
            stack.run_route(number, rows)
            stack.run_routed(number, cache, span, np.zeros(1, np.int64), rows, out_row)
        else:
            if stack.kvs[number]:
                stack.run_kv(number, cache, span, rows)
            stack.run_segment(number, cache, span, rows, out_row)
        rows = np.array([out_row])
        if (exit_index := shape.exit_index) is None:
            continue
        graphs = stack.exit_graphs[exit_index]
        if graphs.block:
            stack.run_block(exit_index, cache, span, rows, row + 2 * len(stack.layout))
        if graphs.gate:
            stack.run_gate(exit_index, rows)
        stack.run_exit(exit_index, rows)
    stack.run_similarity(rows, rows)
