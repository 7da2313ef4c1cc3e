"""A module becomes an ONNX graph: torch.onnx traces it, weights are left out, and its second layer is
repeated to the depth asked for.

    # its nodes name the module's weights, which are written later
    graph = Tracer(model, torch.float32).graph(plan)

A trace takes seconds, so modules of one form are traced once in a process, whatever their depth and weights.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from ease_common.errors import ExportError
from ease_export.functions import DOMAIN, MASKS, OPSET, add_functions
from ease_export.layers import Packed
from ease_export.plan import GraphSpec
from ease_export.weights import kept_type
from ease_train.model.decoder import Decoder

COMPARED_SIZE = 1024  # numbers: torch.onnx looks for equal weights up to this size
# bytes; what is larger came of a weight, and would be the same in every graph of that form
LARGEST_CONSTANT = 1024
OF_DEPTH = ("num_layers", "exits", "gates", "routed_layers")  # which layers there are, not how they are made
OF_A_LAYER = ("blocks", "past_key", "past_value", "present_key", "present_value")


class Tracer:
    """Traces the plans of a model, each form once for all models whose layers are alike."""

    traced: ClassVar[dict[tuple[str, ...], onnx.ModelProto]] = {}

    def __init__(self, model: Decoder, dtype: torch.dtype) -> None:
        self.dtype = dtype
        fields = {name: value for name, value in asdict(model.config).items() if name not in OF_DEPTH}
        self.layers = f"{dtype} {fields}"

    def graph(self, plan: GraphSpec) -> onnx.ModelProto:
        """The graph of a plan, all its layers, without weights."""
        form = (self.layers, repr(plan.traced), *plan.input_names, *plan.output_names)
        if form not in self.traced:
            self.traced[form] = trace(plan, self.dtype)
        model = onnx.ModelProto()
        model.CopyFrom(self.traced[form])
        if plan.num_layers > plan.num_traced:
            repeat_layer(model.graph, plan.num_layers)
        return model


def trace(plan: GraphSpec, dtype: torch.dtype) -> onnx.ModelProto:
    """The graph of a plan's `traced` module, whose weights are named and not there, in a type.

    Raises ExportError when one was folded away.
    """
    axes = torch.utils._pytree.tree_map_only(str, lambda _: Dim.DYNAMIC, plan.axes)
    module = on_stand_ins(plan.traced, dtype)
    with torch.no_grad(), _quiet_export():
        program = torch.onnx.export(
            module.eval(),
            plan.inputs,
            input_names=plan.input_names,
            output_names=plan.output_names,
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    weights = plan.traced.state_dict().keys()
    for name, value in program.model.graph.initializers.items():
        if name in weights:
            value.const_value = ir.tensor(np.zeros(0, np.float32))  # nothing large is serialised
    model = program.model_proto
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    if folded := [tensor.name for tensor in constants if len(tensor.raw_data) > LARGEST_CONSTANT]:
        raise ExportError(
            f"{plan.file}: torch.onnx {torch.__version__} folded weights into constants: {', '.join(folded)}"
        )
    del (
        model.graph.initializer[:],
        model.graph.value_info[:],
        model.metadata_props[:],
        model.graph.metadata_props[:],
    )
    model.graph.initializer.extend(constants)
    for node in model.graph.node:
        del node.metadata_props[:]
    add_functions(model)
    return model


def on_stand_ins(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module on other weights of the same shapes, floating-point ones in a type.

    Large ones are never written, so that they take no memory. Small ones have numbers of their own:
    torch.onnx would make one weight of two that are equal.
    """
    weights = [*module.named_parameters(), *module.named_buffers()]
    packed = [part for packed in module.modules() if isinstance(packed, Packed) for part in packed.parts]
    others = {id(weight): stand_in(weight, kept_type(name, dtype)) for name, weight in weights}
    return deepcopy(module, {**{id(part): part for part in packed}, **others})


def stand_in(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor to trace with in a weight's place."""
    small = weight.numel() <= COMPARED_SIZE
    if weight.is_floating_point():
        made = torch.rand if small else torch.empty
        other = made(weight.shape, dtype=dtype)
    else:
        other = torch.randperm(weight.numel()).view_as(weight) if small else weight
    return nn.Parameter(other, weight.requires_grad) if isinstance(weight, nn.Parameter) else other


def repeat_layer(graph: onnx.GraphProto, num_layers: int) -> None:
    """Give a graph of two layers `num_layers`, each one a copy of the second that reads and is read by its
    neighbours.

    The second layer is what its weights and caches reach. What it takes of the first, if anything, is the
    hidden state.
    """
    second = reached_by(graph, 1)
    first = reached_by(graph, 0)
    made = {name for index in second for name in graph.node[index].output}
    taken = {name for index in second for name in graph.node[index].input}
    carried = taken & {name for index in first for name in graph.node[index].output} - made
    given = made & {value.name for value in graph.output if "." not in value.name}
    assert len(carried) == len(given) <= 1, "a layer hands on one hidden state, or none"

    def renamed(name: str, layer: int) -> str:
        if name in carried:
            return name if layer == 1 else f"{next(iter(given))}/{layer - 1}"
        if name in given:
            return name if layer == num_layers - 1 else f"{name}/{layer}"
        kind, _, inner = name.partition(".")
        if kind in OF_A_LAYER and inner.split(".")[0] == "1":
            return f"{kind}.{layer}{inner[1:]}"
        return f"{name}/{layer}" if name in made else name

    repeated = onnx.GraphProto()
    repeated.node.extend(node for index, node in enumerate(graph.node) if index not in second)
    for layer in range(1, num_layers):
        for index in second:
            node = repeated.node.add()
            node.CopyFrom(graph.node[index])
            node.name = f"{node.name}/{layer}"
            node.input[:] = [renamed(name, layer) for name in node.input]
            node.output[:] = [renamed(name, layer) for name in node.output]
    del graph.node[:]
    graph.node.extend(repeated.node)
    for values in (graph.input, graph.output):
        ends = [value for value in values if value.name.endswith(".1")]
        for layer in range(2, num_layers):
            for value in ends:
                values.add().CopyFrom(value)
                values[-1].name = f"{value.name[:-2]}.{layer}"


def reached_by(graph: onnx.GraphProto, layer: int) -> list[int]:
    """The nodes that depend on a layer's weights or caches: their indices, in order.

    Our own functions but attention read of a cache only how long it is.
    """
    starts = tuple(f"{kind}.{layer}." for kind in OF_A_LAYER)
    reached = set[str]()
    indices = []
    for index, node in enumerate(graph.node):
        if node.domain == DOMAIN and node.op_type in MASKS:
            continue
        if any(name in reached or f"{name}.".startswith(starts) for name in node.input):
            reached.update(node.output)
            indices.append(index)
    return indices


@contextmanager
def _quiet_export() -> Iterator[None]:
    """torch.onnx's exporter warns of its own internals; its errors still come through."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
