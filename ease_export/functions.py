"""ONNX functions of our own: attention in the fastest of three forms, and the masks that some of them need.

A function is a node in the graph that names it; ONNX Runtime puts its body in its place when it loads. So
`If` stands around the attention alone, and every layer's is the same node.
"""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 24
DOMAIN = "ease"
FEW_OR_MANY = f"{DOMAIN}::FewOrMany"
MASK = f"{DOMAIN}::Mask"
WINDOW_MASK = f"{DOMAIN}::WindowMask"
MASKS = ("Mask", "WindowMask")


def add_functions(model: onnx.ModelProto) -> None:
    """Give a model the functions that its nodes name, if there are any."""
    named = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    model.functions.extend(
        function for function in (few_or_many(), mask(), window_mask()) if function.name in named
    )
    if named and DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def few_or_many() -> onnx.FunctionProto:
    """Attention of the last S positions to a cache, G groups of R query heads, in one of three forms.

    For few tokens a group's queries are the rows (R*S) of one matrix, so that no keys are repeated: either
    the operator Attention over G heads with a mask, or, where `products`, two products, which several threads
    share. For many it is Attention over H heads, which keeps no mask of a whole buffer. All give the same
    bits, as long as R*S is not 1, T is a whole number of 64s, and products run with no more threads than B*G:
    with more, ONNX Runtime cuts a matrix's columns, and adds up in another order.

    Shapes: q (B, H, S, P), key and value (B, G, T, P), mask (B, 1, R*S, T), lengths (B), few and products ()
    bool -> (B, G, R*S, P) or (B, H, S, P), which lie the same. Attributes: `scale` and `by_group` (0, G, -1,
    P).
    """
    products = [
        _shape_of_groups("rows_shape"),
        _attribute("scale", "value_float", "factor"),
        _node("Reshape", ["q", "rows_shape"], "rows"),
        _node("Mul", ["rows", "factor"], "scaled"),  # right before the product: becomes its alpha
        _node("Transpose", ["key"], "turned", perm=[0, 1, 3, 2]),
        _node("MatMul", ["scaled", "turned"], "scores"),
        _node("Add", ["scores", "mask"], "masked"),
        _node("Softmax", ["masked"], "shares", axis=-1),
        _node("MatMul", ["shares", "value"], "by_products"),
    ]
    few = [
        _shape_of_groups("groups_shape"),
        _node("Reshape", ["q", "groups_shape"], "grouped"),
        _attention(["grouped", "key", "value", "mask"], "few_mixed", is_causal=0),
    ]
    many = [_attention(["q", "key", "value", "", "", "", "lengths"], "many_mixed", is_causal=1)]
    body = [_either("products", products, [_either("few", few, many, "by_operator")], "mixed")]
    inputs = ["q", "key", "value", "mask", "lengths", "few", "products"]
    return _function("FewOrMany", inputs, "mixed", body, ["scale", "by_group"])


def mask() -> onnx.FunctionProto:
    """0 where a query at `row` of its cache sees a position, -inf after it; nothing where many tokens run.

    The buffer's positions are counted by a sum over ones, as `Placement` counts places.

    Shapes: rows (B, R*S), past_key (B, G, T, P), few () bool -> (B, 1, R*S, T), or (1, 1, 1, 1).
    """
    few = [
        *_columns_and_queries(),
        _node("LessOrEqual", ["columns", "queries"], "seen"),
        _constant("nothing", np.float32(0.0)),
        _constant("never", np.float32(-np.inf)),
        _node("Where", ["seen", "nothing", "never"], "few_mask"),
    ]
    many = [_constant("many_mask", np.zeros((1, 1, 1, 1), np.float32))]
    body = [_either("few", few, many, "mask")]
    return _function("Mask", ["rows", "past_key", "few"], "mask", body)


def window_mask() -> onnx.FunctionProto:
    """0 where a query at `row` of its cache sees a position, the last `window` ones, itself included; -inf
    elsewhere, in the type of the cache.

    Shapes: rows (B, R), past_key (B, G, T, P) -> (B, 1, R, T). Attribute: `window`.
    """
    body = [
        *_columns_and_queries(),
        _node("LessOrEqual", ["columns", "queries"], "before"),
        _attribute("window", "value_int", "width"),
        _node("Sub", ["queries", "width"], "behind_it"),
        _node("Greater", ["columns", "behind_it"], "near"),
        _node("And", ["before", "near"], "seen"),
        _constant("nothing", np.float32(0.0)),
        _constant("never", np.float32(-np.inf)),
        _node("Where", ["seen", "nothing", "never"], "wide"),
        _node("CastLike", ["wide", "past_key"], "mask"),
    ]
    return _function("WindowMask", ["rows", "past_key"], "mask", body, ["window"])


def _columns_and_queries() -> list[onnx.NodeProto]:
    """The positions of a buffer as (1, 1, 1, T), and those of queries as (B, 1, R, 1)."""
    return [
        _constant("begin", [0, 0, 0]),
        _constant("end", [1, 1, 1]),
        _constant("axes", [0, 1, 3]),
        _node("Slice", ["past_key", "begin", "end", "axes"], "column"),  # (1, 1, T, 1)
        _node("Cast", ["column"], "some", to=onnx.TensorProto.BOOL),  # CUDA compares no bf16
        _node("Not", ["some"], "none"),
        _node("Or", ["some", "none"], "true"),  # stale entries may be anything
        _node("Cast", ["true"], "ones", to=onnx.TensorProto.INT64),
        _constant("along", 2),
        _node("CumSum", ["ones", "along"], "positions", exclusive=1),
        _constant("line", [1, 1, 1, -1]),
        _node("Reshape", ["positions", "line"], "columns"),
        _constant("behind", [1, 3]),
        _node("Unsqueeze", ["rows", "behind"], "queries"),
    ]


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], **attributes)


def _constant(output: str, value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], value=numpy_helper.from_array(np.asarray(value)))


def _attention(inputs: list[str], output: str, is_causal: int) -> onnx.NodeProto:
    node = _node("Attention", inputs, output, is_causal=is_causal)
    node.attribute.append(_reference("scale", "scale", onnx.AttributeProto.FLOAT))
    return node


def _shape_of_groups(output: str) -> onnx.NodeProto:
    return _attribute("by_group", "value_ints", output)


def _attribute(name: str, kind: str, output: str) -> onnx.NodeProto:
    """A constant that is an attribute of the function."""
    node = helper.make_node("Constant", [], [output])
    types = {
        "value_int": onnx.AttributeProto.INT,
        "value_ints": onnx.AttributeProto.INTS,
        "value_float": onnx.AttributeProto.FLOAT,
    }
    node.attribute.append(_reference(kind, name, types[kind]))
    return node


def _reference(name: str, of: str, kind: Any) -> onnx.AttributeProto:
    return onnx.AttributeProto(name=name, ref_attr_name=of, type=kind)


def _either(
    condition: str, yes: list[onnx.NodeProto], no: list[onnx.NodeProto], output: str
) -> onnx.NodeProto:
    branches = {
        f"{name}_branch": helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=nodes[-1].output[0])])
        for name, nodes in (("then", yes), ("else", no))
    }
    return helper.make_node("If", [condition], [output], **branches)


def _function(
    name: str, inputs: list[str], output: str, body: list[onnx.NodeProto], attributes: Any = ()
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, [output], body, opsets, attributes)
