"""Is the bundle the checkpoint? Every graph against torch, and greedy generation of the whole.

    report = verify_bundle(Path("runs/demo/bundle"), Path("runs/demo/checkpoint"))

Differences are relative to the largest magnitude of what is compared: hidden states may be large. What counts
as rounding is measured: torch runs a second time from embeddings that are off by one rounding (weights of
very different sizes carry that far). An int8 or int4 bundle is compared with the model of the same rounded
weights, by graphs that do not round activations: these are what was exported. What rounding them changes, as
the bundle does to be fast, is told beside, and is no fault. In one for CUDA nothing rounds them to int8:
there they are fp16, and so are the limits. A bundle in bf16 runs on CUDA alone, and so does its comparison.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ease_common.errors import ExportError
from ease_export.quantize import BITS, round_trip
from ease_runtime.bundle.manifest import FLOATS, SegmentInfo
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.runner import Runner
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.ort.buffers import DeviceCache, RowCache
from ease_runtime.ort.sessions import load_session
from ease_runtime.ort.stack import Cache, OrtStack, open_stack
from ease_runtime.policies import HeadOutput
from ease_train.model.decoder import Block, Decoder, RoutedBlock
from ease_train.model.exits import TokenScore
from ease_train.training.checkpoint import load_checkpoint, with_exits

TOLERANCE = 1e-5  # of fp32 arithmetic, of the largest magnitude
TOLERANCES = {"fp32": TOLERANCE, "fp16": 1e-2, "bf16": 8e-2}  # by what activations are
# of a margin, a difference of two probabilities each of which fp16 rounds (1.1e-2 in a trained model)
MARGIN_TOLERANCES = {"fp32": TOLERANCE, "fp16": 2e-2, "bf16": 16e-2}
EPSILONS = {"fp32": 2.0**-23, "fp16": 2.0**-11, "bf16": 2.0**-8}  # one rounding
# So many of them at each segment's beginning are allowed for: offsets of int4 with fp16 around came to 2.3,
# six layers of Gemma 3 270M in bf16 to 5.8.
ROUNDINGS = {"fp32": 8, "fp16": 4, "bf16": 8}
EXACT = 1  # MatMulNBits' accuracy level that keeps activations in fp32
NORMAL_95 = 1.96  # standard deviations
NUM_TOKENS = 48  # of the pass that compares graphs
NUM_PREFILLED = 29  # of them in a first pass; the rest in a second, on the filled cache
FROZEN_EVERY = 3  # one token in three is frozen in the propagate comparison
HEAD_ROWS = 32  # tokens of a head call, whose logits are rows x vocabulary


@dataclass(frozen=True)
class Difference:
    """The largest relative difference between a graph's output and torch's, and up to where it is
    rounding.
    """

    graph: str
    output: str
    relative: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.limit


@dataclass(frozen=True)
class Agreement:
    """At how many places of a text an exit's most likely token is the one that it has without rounded
    activations.
    """

    layer: int
    agreed: int
    num_places: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        share = self.agreed / self.num_places
        squared = NORMAL_95**2
        middle = share + squared / (2 * self.num_places)
        spread = (
            NORMAL_95 * (share * (1 - share) / self.num_places + squared / (4 * self.num_places**2)) ** 0.5
        )
        return (middle - spread) / (1 + squared / self.num_places), (middle + spread) / (
            1 + squared / self.num_places
        )


@dataclass(frozen=True)
class Report:
    """What `ease-export verify` found. `agreed` counts greedy tokens equal before the first that differs.

    `is_tie`: that one and torch's are equally likely but for rounding. `rounding`: what rounded activations
    change, exit by exit.
    """

    precision: str
    activations: str
    differences: tuple[Difference, ...]
    num_generated: int
    agreed: int
    is_tie: bool = False
    rounding: tuple[Agreement, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all differences are rounding, and the greedy tokens equal (16 bits around excepted,
        whose rounding is larger).
        """
        equal = self.agreed == self.num_generated or self.is_tie or self.activations != "fp32"
        return equal and all(difference.ok for difference in self.differences)

    @property
    def overflows(self) -> bool:
        """Whether some numbers are not finite in fp16."""
        return self.activations == "fp16" and not all(np.isfinite(d.relative) for d in self.differences)


class ExactStack(OrtStack):
    """A bundle's graphs whose products with quantised weights keep activations in fp32."""

    def _session(self, path: Path) -> ort.InferenceSession:
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = EXACT
        return load_session(
            path,
            self.log_level,
            self.device,
            changed=model.SerializeToString(),
            own_threads=self.own_threads,
            capture=self.captures is not None,
        )


def verify_bundle(
    bundle: Path, checkpoint_path: Path, num_generated: int = 200, device: str = "auto"
) -> Report:
    """Compare a bundle, on a device by its name, with its checkpoint.

    Raises BundleError, CheckpointError, ExportError when they are not of one shape, DeviceError for a device
    that is not there.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    stack = open_stack(bundle, device=device, kind=ExactStack)
    if {*stack.exit_layers} < {*checkpoint.model.config.exits}:
        checkpoint = with_exits(checkpoint, stack.exit_layers)
    model = checkpoint.model.eval()
    config = model.config
    described = (config.exits, config.vocab_size, config.dim, {*config.gates}, {*config.routed_layers})
    gates = {leave.layer for leave in stack.manifest.exits if leave.gate}
    routed = {segment.first_layer for segment in stack.manifest.segments if segment.route_graph}
    if described != (stack.exit_layers, stack.vocab_size, stack.manifest.dim, gates, routed):
        raise ExportError(
            f"{bundle} was not exported from {checkpoint_path}; export it: ease-export build "
            f"{checkpoint_path} {bundle}"
        )
    precision = stack.manifest.precision
    activations = stack.manifest.activations
    if precision in BITS:
        round_trip(model, precision, checkpoint.grids, FLOATS[activations])
    round_in_place(model, activations)
    num_generated = min(num_generated, stack.max_positions - 1)
    prompt = drawn_ids(stack, 0, 8).tolist()[: stack.max_positions - num_generated]
    with torch.no_grad():
        differences = (*compare_graphs(stack, model), *compare_propagation(stack, model))
        produced = greedy(stack, prompt, num_generated)
        expected = torch_greedy(model, prompt, produced)
        pairs = zip(expected, produced, strict=True)
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        is_tie = agreed < len(produced) and tie(
            model, [*prompt, *expected[:agreed]], produced[agreed], differences
        )
    rounding = (
        rounding_of(stack, open_stack(bundle, device=device), [*prompt, *produced])
        if precision in BITS and activations == "fp32"
        else ()
    )
    return Report(precision, activations, differences, num_generated, agreed, is_tie, rounding)


def drawn_ids(stack: OrtStack, seed: int, count: int) -> NDArray[np.int64]:
    """Random tokens behind the one that stands before a text, whose state is the largest of all in some
    models (Gemma 3 270M: 103,795, the next 20,447), and may pass what fp16 holds. Shape: (count).
    """
    ids = np.random.default_rng(seed).integers(0, stack.vocab_size, count)
    if stack.manifest.start_id is not None:
        ids[0] = stack.manifest.start_id
    return ids


def round_in_place(model: Decoder, activations: str) -> None:
    """Give a model the weights that its bundle has, which is in some activations."""
    if activations == "fp16":
        model.half().float()
    if activations != "bf16":
        return
    own = {id(part) for score in model.modules() if isinstance(score, TokenScore) for part in score.modules()}
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding) and id(part) not in own:
            for weight in part.parameters():
                weight.data = weight.bfloat16().float()
    for name in ("cos", "sin", "local_cos", "local_sin"):
        if hasattr(model, name):
            setattr(model, name, getattr(model, name).bfloat16().float())


def greedy(stack: OrtStack, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of the bundle at full depth."""
    if num_tokens < 1:
        return []
    engine = Engine(stack)
    return [token.id for token in engine.generate(engine.start(prompt, max_new_tokens=num_tokens))]


def tie(model: Decoder, ids: list[int], other: int, differences: tuple[Difference, ...]) -> bool:
    """Whether another token is as likely after a text as torch's most likely one, up to rounding of the
    logits.
    """
    logits = model(torch.tensor([ids]))[0, -1]
    limit = max(difference.limit for difference in differences if difference.output == "logits")
    return bool(logits.max() - logits[other] <= 2 * limit * logits.abs().max())


def rounding_of(exact: OrtStack, stack: OrtStack, ids: list[int]) -> tuple[Agreement, ...]:
    """Where two forms of a bundle say the same of a text, exit by exit."""
    ids = ids[: stack.max_positions]
    pairs = zip(stack.exit_layers, top_tokens(exact, ids), top_tokens(stack, ids), strict=True)
    return tuple(Agreement(layer, int((one == other).sum()), len(ids)) for layer, one, other in pairs)


def top_tokens(stack: OrtStack, ids: list[int]) -> list[NDArray[np.int64]]:
    """Each exit's most likely next token at every place of a text. Shape: one (S) an exit."""
    runner = Runner(stack)
    found = []
    sequence = runner.open(ids, asked=frozenset(range(runner.num_early)))
    for number, shape in enumerate(stack.layout):
        runner.advance(number, [(sequence, 0, len(ids))])
        if shape.exit_index is not None:
            parts = [
                slice(start, min(start + HEAD_ROWS, len(ids))) for start in range(0, len(ids), HEAD_ROWS)
            ]
            said = [runner.ask(shape.exit_index, "head", [(sequence, part)]).top_id.copy() for part in parts]
            found.append(np.concatenate(said))
    return found


def with_rounding(stack: OrtStack, hidden: Tensor) -> Tensor:
    """States (or logits), and beside them some that are off by a rounding more, of the bundle's activations.

    Shape: (1 or 2, S, D) -> (2, S, D).
    """
    signs = torch.randint(0, 2, hidden.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.stack((hidden[0], hidden[-1] * (1 + EPSILONS[stack.manifest.activations] * signs)))


def difference(stack: OrtStack, graph: str, output: str, found: NDArray[Any], expected: Tensor) -> Difference:
    """What a graph gives against torch's two results, the second from an input that is off by roundings.

    Relative to the largest magnitude expected; 0 where nothing was expected, as of a layer that none entered.
    Shape: found (...), expected (2, ...).
    """
    found, (reference, other) = found.astype(np.float32), expected.numpy()
    tolerances = MARGIN_TOLERANCES if output == "margin" else TOLERANCES
    activations = stack.manifest.activations
    tolerance = tolerances[activations]
    if found.shape == reference.shape and not reference.size:
        return Difference(graph, output, 0.0, tolerance)
    scale = float(np.abs(reference).max()) or 1.0
    relative, rounding = (float(np.abs(values - reference).max()) / scale for values in (found, other))
    return Difference(graph, output, relative, max(tolerance, ROUNDINGS[activations] * rounding))


def torch_greedy(model: Decoder, prompt: list[int], produced: list[int]) -> list[int]:
    """The plain model's greedy token in the place of each that was produced, behind those before it: as many
    as these, and up to the first that differs the text that it gives itself.
    """
    logits = model(torch.tensor([[*prompt, *produced]]))[0, len(prompt) - 1 : -1]
    return [int(token) for token in logits.argmax(-1)]


def compare_graphs(stack: OrtStack, model: Decoder) -> Iterator[Difference]:
    """Segments (in two passes over a cache), exits, heads and gates, each on the runtime's own inputs,
    against the training model.
    """
    runner = Runner(stack)
    count = min(NUM_TOKENS, stack.max_positions)
    ids = drawn_ids(stack, 1, count)
    cut = min(NUM_PREFILLED, count - 1)
    sequence = runner.open(ids.tolist(), asked=frozenset(range(runner.num_early)))
    hidden = model.embed(torch.from_numpy(ids)[None])
    for number, segment in enumerate(stack.manifest.segments):
        exit_index = stack.layout[number].exit_index
        states = []
        outputs = []
        for start, stop in ((0, cut), (cut, count)) if cut else ((0, count),):
            runner.advance(number, [(sequence, start, stop)])
            states.append(runner.states(sequence, start, stop))
            if exit_index is not None:
                outputs.append(exit_outputs(runner, sequence, exit_index, slice(start, stop)))
        before = with_rounding(stack, hidden)
        hidden = model.run_layers(before, segment.first_layer, segment.last_layer)
        yield difference(stack, segment.graph, "hidden", np.concatenate(states), hidden)
        if segment.route_graph:
            yield from compare_routed(stack, model, runner, sequence, before, number)
        else:
            yield from compare_caches(stack, model, runner.cache, before, number)
        if exit_index is not None:
            said = {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
            yield from compare_exit(stack, model, exit_index, said, hidden)
    runner.release(sequence)


def exit_outputs(
    runner: Runner, sequence: TokenSequence, number: int, where: slice
) -> dict[str, NDArray[Any]]:
    """What an exit says of the tokens of a pass that has just run, copied."""
    head: HeadOutput = runner.ask(number, "head", [(sequence, where)])
    found = {name: np.array(getattr(head, name)[...]) for name in ("logits", "top_prob", "margin", "entropy")}
    if runner.stack.exits[number].gate is not None:
        found["probability"] = runner.ask(number, "gate", [(sequence, where)]).copy()
    return found


def compare_routed(
    stack: OrtStack, model: Decoder, runner: Runner, sequence: TokenSequence, hidden: Tensor, number: int
) -> Iterator[Difference]:
    """Who goes into a routed segment (the share that differs), and the K/V of those."""
    segment = stack.manifest.segments[number]
    routed = model.layers[stack.manifest.segments[number].first_layer - 1]
    assert isinstance(routed, RoutedBlock), "the checkpoint has the bundle's layers"
    inside = routed.goes_in(hidden)[0].numpy()
    share = float((sequence.counters.inside[number, : len(inside)] != inside).mean())
    yield Difference(segment.route_graph or "", "goes_in", share, TOLERANCES[stack.manifest.activations])
    positions = torch.from_numpy(np.flatnonzero(inside))
    keys_values = routed.block.attention.keys_values(
        routed.block.attention_norm(hidden[:, positions]),
        *(table[positions] for table in model.rotary(routed)),
    )
    written = _written(runner.cache, segment, len(positions))[0]
    for place, name in enumerate(("present_key", "present_value")):
        yield difference(
            stack, segment.graph, name, written[place], keys_values[place].transpose(1, 2).flatten(2)
        )


def compare_caches(
    stack: OrtStack, model: Decoder, cache: Cache, hidden: Tensor, number: int, frozen: bool = False
) -> Iterator[Difference]:
    """Keys and values that a segment (or its kv graph, of a frozen state) wrote, all layers together."""
    segment = stack.manifest.segments[number]
    count = hidden.shape[1]
    keys = []
    values = []
    for layer in range(segment.first_layer, segment.last_layer + 1):
        block = model.layers[layer - 1]
        assert isinstance(block, Block), "the checkpoint has the bundle's layers"
        tables = (table[:count] for table in model.rotary(block))
        k, v = block.attention.keys_values(block.attention_norm(hidden), *tables)
        keys.append(k.transpose(1, 2).flatten(2))
        values.append(v.transpose(1, 2).flatten(2))
        if not frozen:
            hidden = model.run_layers(hidden, layer, layer)
    written = _written(cache, segment, count)
    graph = (segment.kv_graph or "") if frozen else segment.graph
    yield difference(stack, graph, "present_key", written[:, 0], torch.stack(keys, dim=1))
    yield difference(stack, graph, "present_value", written[:, 1], torch.stack(values, dim=1))


def _written(cache: Cache, segment: SegmentInfo, count: int) -> NDArray[np.float32]:
    """Keys and values of a segment's first `count` entries in the first slot.

    Shape: (layers, 2, count, kv_dim).
    """
    assert isinstance(cache, RowCache | DeviceCache)
    return np.array(
        [cache.read(layer - 1, 0, count) for layer in range(segment.first_layer, segment.last_layer + 1)]
    )


def compare_exit(
    stack: OrtStack, model: Decoder, number: int, said: dict[str, NDArray[Any]], hidden: Tensor
) -> Iterator[Difference]:
    """An exit's graph with its head: logits, and the figures reduced in the graph; its gate, where it has
    one.
    """
    leave = stack.manifest.exits[number]
    exit_hidden = model.exit_hidden(hidden, leave.layer)
    logits = with_rounding(stack, model.exit(leave.layer).head(exit_hidden))  # a product's own results
    probabilities = logits.softmax(-1)
    top = probabilities.topk(2, dim=-1).values
    name = f"{leave.graph} + {leave.head}"
    yield difference(stack, name, "logits", said["logits"], logits)
    yield difference(stack, name, "top_prob", said["top_prob"], top[..., 0])
    yield difference(stack, name, "margin", said["margin"], top[..., 0] - top[..., 1])
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
    yield difference(stack, name, "entropy", said["entropy"], entropy)
    if leave.gate:
        gate = model.exit(leave.layer).gate
        assert gate is not None, "the checkpoint has the bundle's gates"
        yield difference(stack, leave.gate, "probability", said["probability"], gate(exit_hidden))


def compare_propagation(stack: OrtStack, model: Decoder) -> Iterator[Difference]:
    """Each kv graph, and each segment with some tokens frozen (`active`), against the training model; not for
    routed layers.
    """
    if any(shape.routed for shape in stack.layout):
        return
    count = min(NUM_TOKENS, stack.max_positions)
    ids = drawn_ids(stack, 2, count)
    active = np.arange(count) % FROZEN_EVERY != 1
    runner = Runner(stack, num_slots=2)
    last = len(stack.layout) - 1
    left = runner.open(ids.tolist())
    through = runner.open(ids.tolist())
    hidden = model.embed(torch.from_numpy(ids)[None])
    for k, segment in enumerate(stack.manifest.segments):
        hidden = with_rounding(stack, hidden)
        if segment.kv_graph:
            runner.propagate(k, [(left, 0, count)])
            yield from compare_caches(stack, model, runner.cache, hidden, k, frozen=True)
        parts = [(sequence, 0, count) for sequence in ((left, through) if k < last else (through,))]
        runner.advance(k, parts, np.tile(active, len(parts)) if k else None)
        mask = torch.from_numpy(active)[None] if k else None
        hidden = model.run_layers(hidden, segment.first_layer, segment.last_layer, mask)
        if k:
            yield difference(
                stack, segment.graph, "hidden, some frozen", runner.states(through, 0, count), hidden
            )
