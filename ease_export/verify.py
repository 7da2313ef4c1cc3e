"""Is the bundle the checkpoint? Every graph against torch, and greedy generation of the whole.

    report = verify_bundle(Path("runs/demo/bundle"), Path("runs/demo/checkpoint"))

Differences are relative to the largest magnitude of what is compared: hidden states may be large. A bundle below fp32 is compared with
the model of the same rounded weights; what differs then is how its products round activations, so its tokens may differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ease_export.errors import ExportError
from ease_export.quantize import BITS, round_trip
from ease_runtime.buffers import RowCache
from ease_runtime.engine import Engine
from ease_runtime.manifest import SegmentInfo
from ease_runtime.sequence import Sequence
from ease_runtime.stack import Cache, OrtStack, Span
from ease_train.checkpoint import load_checkpoint
from ease_train.model import Block, Decoder, RoutedBlock

TOLERANCE = 1e-5  # fp32, of the largest magnitude
TOLERANCES = {"fp32": TOLERANCE, "fp16": 1e-2, "int8": 0.1, "int4": 0.1}  # by precision, of the largest magnitude
NUM_TOKENS = 48  # of the pass that compares graphs
NUM_PREFILLED = 29  # of them in a first pass; the rest in a second, on the filled cache
FROZEN_EVERY = 3  # one token in three is frozen in the propagate comparison


@dataclass(frozen=True)
class Difference:
    """The largest relative difference between a graph's output and torch's."""

    graph: str
    output: str
    relative: float


@dataclass(frozen=True)
class Report:
    """What `ease-export verify` found. `agreed` counts greedy tokens equal before the first that differs."""

    precision: str
    differences: tuple[Difference, ...]
    num_generated: int
    agreed: int

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.precision]

    @property
    def ok(self) -> bool:
        """Whether all differences are within the precision's tolerance; in fp32 the greedy tokens must be equal, too."""
        equal = self.agreed == self.num_generated or self.precision != "fp32"
        return equal and all(d.relative <= self.tolerance for d in self.differences)


def verify_bundle(bundle: Path, checkpoint_path: Path, num_generated: int = 200) -> Report:
    """Compare a bundle with its checkpoint. Raises BundleError, CheckpointError, ExportError when they are not of one shape."""
    checkpoint, stack = load_checkpoint(checkpoint_path), OrtStack(bundle)
    model = checkpoint.model.eval()
    config = model.config
    described = (config.exits, config.vocab_size, config.dim, {*config.gates}, {*config.routed_layers})
    gates = {leave.layer for leave in stack.manifest.exits if leave.gate}
    routed = {segment.first_layer for segment in stack.manifest.segments if segment.route_graph}
    if described != (stack.exit_layers, stack.vocab_size, stack.manifest.dim, gates, routed):
        raise ExportError(f"{bundle} was not exported from {checkpoint_path}; export it: ease-export build {checkpoint_path} {bundle}")
    precision = stack.manifest.precision
    if precision in BITS:
        round_trip(model, precision)
    elif precision == "fp16":
        model.half().float()  # in place
    num_generated = min(num_generated, stack.max_positions - 1)
    with torch.no_grad():
        differences = [*compare_graphs(stack, model), *compare_propagation(stack, model)]
        prompt = np.random.default_rng(0).integers(0, stack.vocab_size, 8).tolist()[: stack.max_positions - num_generated]
        expected = torch_greedy(model, prompt, num_generated)
    engine = Engine(stack)
    produced = [t.id for t in engine.generate(engine.start(prompt, max_new_tokens=num_generated))]
    equal = np.array(produced) == np.array(expected)
    return Report(precision, tuple(differences), num_generated, num_generated if equal.all() else int(np.argmin(equal)))


def relative_difference(found: NDArray[Any], expected: Tensor) -> float:
    """Largest absolute difference over the largest magnitude expected; 0 where nothing was expected, as of a layer that none entered."""
    found, reference = found.astype(np.float32), expected.numpy()
    if found.shape == reference.shape and not reference.size:
        return 0.0
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def torch_greedy(model: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of the plain model, the whole text anew for each."""
    ids = torch.tensor([prompt])
    for _ in range(num_tokens):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[0, len(prompt) :].tolist()


def compare_graphs(stack: OrtStack, model: Decoder) -> Iterator[Difference]:
    """Segments (in two passes over a cache), exits, heads and gates, each on the runtime's own inputs, against the training model."""
    engine, count = Engine(stack), min(NUM_TOKENS, stack.max_positions)
    ids = np.random.default_rng(1).integers(0, stack.vocab_size, count)
    sequence = engine.open(ids.tolist())
    hidden = model.embed(torch.from_numpy(ids)[None])
    for number, segment in enumerate(stack.manifest.segments):
        states = np.zeros((count, stack.manifest.dim), np.float32)  # kept here: behind the last segment the pool may reuse their rows
        for start, stop in ((0, min(NUM_PREFILLED, count)), (min(NUM_PREFILLED, count - 1), count)):
            engine.advance(number, [(sequence, start, stop)])
            sequence.done[number] = stop
            states[start:stop] = stack.pool.states[sequence.rows[start:stop]]
        before, hidden = hidden, model.run_layers(hidden, segment.first_layer, segment.last_layer)
        yield Difference(segment.graph, "hidden", relative_difference(states, hidden[0]))
        if segment.route_graph:
            yield from compare_routed(stack, model, engine, sequence, before, number)
        else:
            yield from compare_caches(stack, model, engine.cache, before, number)
        if (exit_index := stack.layout[number].exit_index) is not None:
            first = stack.reserve_rows(2 * count, [sequence.live_rows()])
            stack.pool.states[first : first + count] = states
            rows = np.arange(first, first + count)
            if stack.blocks[exit_index]:
                stack.run_block(exit_index, engine.cache, [Span(0, 0, count)], rows, first + count)
                rows += count
            yield from compare_exit(stack, model, exit_index, rows, hidden)
    engine.release(sequence)


def compare_routed(
    stack: OrtStack, model: Decoder, engine: Engine, sequence: Sequence, hidden: Tensor, number: int
) -> Iterator[Difference]:
    """Who goes into a routed segment (the share that differs), and the K/V of those."""
    segment, routed = stack.manifest.segments[number], model.layers[stack.manifest.segments[number].first_layer - 1]
    assert isinstance(routed, RoutedBlock), "the checkpoint has the bundle's layers"
    inside = routed.goes_in(hidden)[0].numpy()
    yield Difference(segment.route_graph or "", "goes_in", float((sequence.inside[number, : len(inside)] != inside).mean()))
    positions = torch.from_numpy(np.flatnonzero(inside))
    keys_values = routed.block.attention.keys_values(
        routed.block.attention_norm(hidden[:, positions]), model.cos[positions], model.sin[positions]
    )
    written = _written(engine.cache, segment, len(positions))[0]
    for place, name in enumerate(("present_key", "present_value")):
        yield Difference(segment.graph, name, relative_difference(written[place], keys_values[place][0].transpose(0, 1).flatten(1)))


def compare_caches(
    stack: OrtStack, model: Decoder, cache: Cache, hidden: Tensor, number: int, frozen: bool = False
) -> Iterator[Difference]:
    """Keys and values that a segment (or its kv graph, of a frozen state) wrote, all layers together."""
    segment, count = stack.manifest.segments[number], hidden.shape[1]
    keys, values = [], []
    for layer in range(segment.first_layer, segment.last_layer + 1):
        block = model.layers[layer - 1]
        assert isinstance(block, Block), "the checkpoint has the bundle's layers"
        k, v = block.attention.keys_values(block.attention_norm(hidden), model.cos[:count], model.sin[:count])
        keys.append(k[0].transpose(0, 1).flatten(1))
        values.append(v[0].transpose(0, 1).flatten(1))
        if not frozen:
            hidden = model.run_layers(hidden, layer, layer)
    written = _written(cache, segment, count)
    graph = (segment.kv_graph or "") if frozen else segment.graph
    yield Difference(graph, "present_key", relative_difference(written[:, 0], torch.stack(keys)))
    yield Difference(graph, "present_value", relative_difference(written[:, 1], torch.stack(values)))


def _written(cache: Cache, segment: SegmentInfo, count: int) -> NDArray[np.float32]:
    """Keys and values of a segment's first `count` entries in the first slot. Shape: (layers, 2, count, kv_dim)."""
    assert isinstance(cache, RowCache)
    pairs = cache.buffers[segment.first_layer - 1 : segment.last_layer]
    return np.array([[buffer[0, :count] for buffer in pair] for pair in pairs])


def compare_exit(stack: OrtStack, model: Decoder, number: int, rows: NDArray[np.int64], hidden: Tensor) -> Iterator[Difference]:
    """An exit's graph with its head: logits, and the figures reduced in the graph."""
    leave = stack.manifest.exits[number]
    exit_hidden = model.exit_hidden(hidden, leave.layer)[0]
    logits = model.exit(leave.layer).head(exit_hidden)
    probabilities = logits.softmax(-1)
    top = probabilities.topk(2, dim=-1).values
    output = stack.run_exit(number, rows)
    name = f"{leave.graph} + {leave.head}"
    yield Difference(name, "logits", relative_difference(output.logits, logits))
    yield Difference(name, "top_prob", relative_difference(output.top_prob, top[:, 0]))
    yield Difference(name, "margin", relative_difference(output.margin, top[:, 0] - top[:, 1]))
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
    yield Difference(name, "entropy", relative_difference(output.entropy, entropy))
    if leave.gate:
        gate = model.exit(leave.layer).gate
        assert gate is not None
        expected = gate(exit_hidden)
        yield Difference(leave.gate, "probability", relative_difference(stack.run_gate(number, rows), expected))


def compare_propagation(stack: OrtStack, model: Decoder) -> Iterator[Difference]:
    """Each kv graph, and each segment with some tokens frozen (`active`), against the training model; not for routed layers."""
    if any(shape.routed for shape in stack.layout):
        return
    count = min(NUM_TOKENS, stack.max_positions)
    ids = np.random.default_rng(2).integers(0, stack.vocab_size, count)
    active = np.arange(count) % FROZEN_EVERY != 1
    cache, rows, whole = stack.open_cache(), ids, [Span(0, 0, count)]
    hidden = model.embed(torch.from_numpy(ids)[None])
    for k, segment in enumerate(stack.manifest.segments):
        if segment.kv_graph:
            stack.run_kv(k, cache, whole, rows)
            yield from compare_caches(stack, model, cache, hidden, k, frozen=True)
        out = stack.reserve_rows(2 * count, [rows] if k else [])
        stack.run_segment(k, cache, whole, rows, out, active if k else None)
        rows = np.arange(out, out + count)
        mask = torch.from_numpy(active)[None] if k else None
        hidden = model.run_layers(hidden, segment.first_layer, segment.last_layer, mask)
        if k:
            yield Difference(segment.graph, "hidden, some frozen", relative_difference(stack.pool.states[rows], hidden[0]))
