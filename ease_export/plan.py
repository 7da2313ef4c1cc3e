"""Which graphs a bundle has: where a model is cut, and for each graph its module, inputs and outputs.

Traces and writes nothing.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ease_common.errors import ExportError
from ease_export.layers import CacheForm
from ease_export.modules import (
    ExitHead,
    FirstSegment,
    GateHead,
    Head,
    OverCache,
    PropagateKV,
    ReducedHead,
    Route,
    Routed,
    Segment,
    Similarity,
)
from ease_train.model.blocks import Attention
from ease_train.model.decoder import Block, Decoder, RoutedBlock

HEAD_FILE = "head.onnx"
REDUCED_HEAD_FILE = "reduced_head.onnx"  # of all early exits
SIMILARITY_FILE = "similarity.onnx"
TRACED_LAYERS = 2  # all the others are the second again, with weights of their own, where they are alike


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph to export: its module, and how it is traced.

    `traced` is `module` with the first `num_traced` of its `num_layers` layers (0: it has none); inputs and
    names are those of `traced`.
    """

    file: str
    module: nn.Module
    traced: nn.Module
    inputs: tuple[Any, ...]
    input_names: list[str]
    axes: tuple[Any, ...]
    output_names: list[str]
    weights: str  # the external file of its large weights, unless another graph has written them
    num_layers: int = 0
    num_traced: int = 0


@dataclass(frozen=True)
class Cut:
    """One segment of the model: layers first..last (from 1), its number (from 0) and whether it is a routed
    layer.
    """

    number: int
    first: int
    last: int
    routed: bool

    def file(self, kind: str) -> str:
        """The name of one of its graphs."""
        return f"{kind}_{self.number + 1:02d}.onnx"


def cut_layers(model: Decoder) -> list[Cut]:
    """The segments: cut after every exit, and around every routed layer.

    Raises ExportError when the first layer is routed.
    """
    config = model.config
    routed = {number for number, layer in enumerate(model.layers, 1) if isinstance(layer, RoutedBlock)}
    if 1 in routed:
        raise ExportError(
            "layer 1 is routed: a bundle's first segment must run for every token; train with "
            "routed_layers from 2 on"
        )
    if routed and any(leave.block for leave in model.early_exits.values()):
        raise ExportError(
            "exits with a layer of their own and routed layers do not go together: routed layers have "
            "K/V for some tokens only"
        )
    ends = sorted({*config.exits, *routed, *(layer - 1 for layer in routed)} - {0})
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [
        Cut(number, first, last, first in routed)
        for number, (first, last) in enumerate(zip(starts, ends, strict=True))
    ]


def block_file(model: Decoder, number: int, layer: int) -> str | None:
    return f"block_{number + 1:02d}.onnx" if model.exit(layer).block is not None else None


def exit_file(number: int) -> str:
    return f"exit_{number + 1:02d}.onnx"


def gate_file(model: Decoder, number: int, layer: int) -> str | None:
    return f"gate_{number + 1:02d}.onnx" if model.exit(layer).gate is not None else None


def head_file(model: Decoder, number: int, layer: int) -> str:
    head = model.exit(layer).head
    if head is model.lm_head:
        return HEAD_FILE
    return REDUCED_HEAD_FILE if head is model.reduced_head else f"head_{number + 1:02d}.onnx"


def plan_graphs(model: Decoder, layout: str, dtype: torch.dtype = torch.float32) -> Iterator[GraphSpec]:
    """Every graph of the bundle, one after the other, over caches of a layout; `dtype` is that of all that is
    not quantised.
    """
    form = CacheForm(model, layout, dtype)
    yield _head_plan(HEAD_FILE, Head(model.lm_head), dtype)
    if model.reduced_head is not None:
        yield _head_plan(REDUCED_HEAD_FILE, ReducedHead(model.reduced_head, dtype), dtype)
    for cut in cut_layers(model):
        if cut.routed:
            yield _routed_plan(model, form, cut)
            yield _from_pool(cut.file("route"), Route(model, cut.first), form, ["goes_in"])
            continue
        yield _segment_plan(model, form, cut)
        if cut.number:
            yield _kv_plan(model, form, cut)
    yield _similarity_plan(form)
    for number, layer in enumerate(model.config.exits):
        leave = model.exit(layer)
        if (block := leave.block) is not None:
            yield _block_plan(model, form, Cut(number, layer, layer, routed=False), block)
        yield _from_pool(exit_file(number), ExitHead(model, layer), form, ["exit_hidden"])
        if (file := head_file(model, number, layer)) not in (HEAD_FILE, REDUCED_HEAD_FILE):
            assert isinstance(leave.head, nn.Linear)
            yield _head_plan(file, Head(leave.head), dtype)
        if gate := gate_file(model, number, layer):
            yield _from_pool(gate, GateHead(model, layer), form, ["exit_hidden", "probability"])


# Example sizes, all different and none 1, so that no axis is taken for another or for a constant.
ROWS = 2
PLACES = 3
TOKENS = 5
LENGTH = 16
POOL = 32


Inputs = list[tuple[str, Tensor, dict[int, str]]]  # name, example, axes


def _tokens(name: str, dtype: torch.dtype = torch.int64) -> tuple[str, Tensor, dict[int, str]]:
    return name, torch.ones(TOKENS, dtype=dtype), {0: "N"}


def _states(form: CacheForm) -> Tensor:
    return torch.zeros(POOL, form.dim, dtype=form.dtype)


def _pool(form: CacheForm) -> Inputs:
    return [("pool", _states(form), {0: "M"}), _tokens("index")]


def num_traced(layers: Many[nn.Module]) -> int:
    """How many of a segment's layers stand for all: two, unless those after the first differ in what they
    attend to.
    """
    kinds = {(a.window, a.rotated, a.local) for layer in layers[1:] for a in [_attention_of(layer)]}
    return len(layers) if len(kinds) > 1 else min(len(layers), TRACED_LAYERS)


def _attention_of(layer: nn.Module) -> Attention:
    assert isinstance(layer, Block | RoutedBlock)
    return layer.attention


def _over_cache(
    cut: Cut,
    kind: str,
    make: Callable[[Many[nn.Module]], OverCache],
    layers: Many[nn.Module],
    inputs: Inputs,
    outputs: list[str],
) -> GraphSpec:
    """A graph that reads and writes the caches of a segment's layers, after its own inputs and where its
    tokens stand. `make` makes its module over some layers.
    """
    count = num_traced(layers)
    module = make(layers)
    traced = module if count == len(layers) else make(layers[:count])
    form = module.form
    names = [f"{name}.{i}" for i in range(count) for name in ("key", "value")]
    past = [torch.zeros(form.shape(ROWS, LENGTH), dtype=form.dtype) for _ in names]
    ragged: Inputs = [
        ("spread", torch.arange(ROWS * PLACES).clamp(max=TOKENS - 1).reshape(ROWS, PLACES), {0: "B", 1: "S"}),
        ("places", torch.arange(TOKENS), {0: "N"}),
        ("write_indices", torch.zeros(ROWS, dtype=torch.int64), {0: "B"}),
    ]
    if form.by_head:
        ragged += [(name, torch.tensor(True), {}) for name in ("few", "products")]
    return GraphSpec(
        file=cut.file(kind),
        module=module,
        traced=traced,
        inputs=(*(example for _, example, _ in inputs), [example for _, example, _ in ragged], past),
        input_names=[*(name for name, _, _ in [*inputs, *ragged]), *(f"past_{name}" for name in names)],
        axes=(*(axes for _, _, axes in inputs), [axes for _, _, axes in ragged], [form.axes for _ in names]),
        output_names=[*outputs, *(f"present_{name}" for name in names)],
        weights=f"{cut.file('segment' if kind == 'kv' else kind)}.data",
        num_layers=len(layers),
        num_traced=count,
    )


def _segment_plan(model: Decoder, form: CacheForm, cut: Cut) -> GraphSpec:
    layers = [*model.layers[cut.first - 1 : cut.last]]
    active = _tokens("active", torch.bool)
    if cut.number:
        make = partial(Segment, form)
        return _over_cache(cut, "segment", make, layers, [*_pool(form), active], ["hidden"])
    first = partial(FirstSegment, form, embed=model.embed)
    inputs = [_tokens("input_ids"), active]
    return _over_cache(cut, "segment", first, layers, inputs, ["embedded", "hidden"])


def _kv_plan(model: Decoder, form: CacheForm, cut: Cut) -> GraphSpec:
    layers = [*model.layers[cut.first - 1 : cut.last]]
    return _over_cache(cut, "kv", partial(PropagateKV, form), layers, _pool(form), [])


def _block_plan(model: Decoder, form: CacheForm, cut: Cut, block: nn.Module) -> GraphSpec:
    """An exit's own layer, as a segment of one. `cut` has the exit's number."""
    inputs = [*_pool(form), _tokens("active", torch.bool)]
    return _over_cache(cut, "block", partial(Segment, form), [block], inputs, ["hidden"])


def _routed_plan(model: Decoder, form: CacheForm, cut: Cut) -> GraphSpec:
    layers = [*model.layers[cut.first - 1 : cut.last]]
    inputs = [*_pool(form), _tokens("positions")]
    return _over_cache(cut, "segment", partial(Routed, form), layers, inputs, ["hidden"])


def _from_pool(file: str, module: nn.Module, form: CacheForm, outputs: list[str]) -> GraphSpec:
    """A graph over some rows of the pool, without caches."""
    inputs = (_states(form), torch.zeros(TOKENS, dtype=torch.int64))
    return GraphSpec(
        file=file,
        module=module,
        traced=module,
        inputs=inputs,
        input_names=["pool", "index"],
        axes=({0: "M"}, {0: "N"}),
        output_names=outputs,
        weights=f"{file}.data",
    )


def _similarity_plan(form: CacheForm) -> GraphSpec:
    module = Similarity()
    inputs = (_states(form), torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS, dtype=torch.int64))
    return GraphSpec(
        file=SIMILARITY_FILE,
        module=module,
        traced=module,
        inputs=inputs,
        input_names=["pool", "index", "before"],
        axes=({0: "M"}, {0: "N"}, {0: "N"}),
        output_names=["similarity"],
        weights=f"{SIMILARITY_FILE}.data",
    )


def _head_plan(file: str, module: Head, dtype: torch.dtype) -> GraphSpec:
    inputs = (torch.zeros(TOKENS, module.lm_head.in_features, dtype=dtype),)
    return GraphSpec(
        file=file,
        module=module,
        traced=module,
        inputs=inputs,
        input_names=["exit_hidden"],
        axes=({0: "N"},),
        output_names=["logits", "top_id", "top_prob", "margin", "entropy"],
        weights=f"{file}.data",
    )
