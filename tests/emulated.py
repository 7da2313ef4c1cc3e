"""Bundles in bf16 on the CPU, which has no such kernels: each node computes in fp32, and what was bf16 is
rounded to it.

    stack = EmulatedStack(bundle)     # otherwise an OrtStack

What it does not know is how kernels round within a node, as Flash does its shares of attention.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, inliner, shape_inference

from ease_runtime.ort.sessions import load_session
from ease_runtime.ort.stack import OrtStack


def cast(name: str, output: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [output], to=to)


def rounded(name: str) -> Iterator[onnx.NodeProto]:
    """From `name`/exact, what a node gives in fp32, `name` in bf16 and `name`/fp32."""
    yield cast(f"{name}/exact", name, TensorProto.BFLOAT16)
    yield cast(name, f"{name}/fp32", TensorProto.FLOAT)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the same inputs, outputs and weights, whose nodes take and give fp32 in bf16's place."""
    model = shape_inference.infer_shapes(inliner.inline_local_functions(model), strict_mode=True)
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    narrow = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    narrow |= {weight.name for weight in graph.initializer if weight.data_type == TensorProto.BFLOAT16}
    outside = [*graph.input, *graph.initializer]
    nodes = [
        cast(value.name, f"{value.name}/fp32", TensorProto.FLOAT) for value in outside if value.name in narrow
    ]
    for node in graph.node:
        assert not any(attribute.HasField("g") for attribute in node.attribute), "no branches in bf16"
        for constant in node.attribute:
            if constant.name == "value" and constant.t.data_type == TensorProto.BFLOAT16:
                narrow.update(node.output)
        made = [name for name in node.output if name in narrow]
        if node.op_type == "Constant" and made:
            nodes += [node, cast(made[0], f"{made[0]}/fp32", TensorProto.FLOAT)]
            continue
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        node.input[:] = [f"{name}/fp32" if name in narrow else name for name in node.input]
        node.output[:] = [f"{name}/exact" if name in narrow else name for name in node.output]
        nodes.append(node)
        for name in made:
            nodes += rounded(name)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


class EmulatedStack(OrtStack):
    """A bundle in bf16 on the CPU."""

    def _session(self, path: Path) -> ort.InferenceSession:
        model = emulated(onnx.load(path, load_external_data=False))
        changed = model.SerializeToString()
        return load_session(path, self.log_level, changed=changed, own_threads=self.own_threads)
