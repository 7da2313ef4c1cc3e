"""int8 and int4 weights, by ONNX Runtime's own quantizer: a scale and a zero point for every 32 numbers of a
row.

Products become MatMulNBits, lookups in the embedding GatherBlockQuantized. The two read the same bytes, so a
tied embedding is stored once; where blocks of 32 do not fill its rows, the lookup cuts off what is behind
their end. In int4, too, the embedding and the LM heads have 8 bits: with 4, SmolLM2-135M lost twice as much
perplexity. Norms, exits' adapters, gates and routers, which are small and decide, stay fp32.

Shapes: O outputs (or words), I inputs, K blocks of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from torch import nn

from ease_train.model.decoder import Decoder, RoutedBlock
from ease_train.model.exits import ReducedHead

BITS = {"int8": 8, "int4": 4}
OUTER_BITS = 8  # of the embedding and the LM heads
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4  # of MatMulNBits: activations are rounded to int8, which is what makes it fast
CONTRIB = "com.microsoft"

Weights = dict[str, NDArray[Any]]


def matrices(model: Decoder, precision: str) -> Iterator[tuple[nn.Linear | nn.Embedding, int]]:
    """The modules whose weights are quantised, with their bits: layers, LM heads and the embedding."""
    leaves = model.early_exits.values()
    own = [leave.block for leave in leaves if leave.block is not None]
    for layer in (*model.layers, *own):
        block = layer.block if isinstance(layer, RoutedBlock) else layer
        yield from ((module, BITS[precision]) for module in block.modules() if isinstance(module, nn.Linear))
    heads = dict.fromkeys((model.lm_head, *(leave.head for leave in leaves)))
    yield from ((head.known if isinstance(head, ReducedHead) else head, OUTER_BITS) for head in heads)
    yield model.embed, OUTER_BITS


@dataclass(frozen=True)
class Quantized:
    """A matrix (O, I) as MatMulNBits reads it: values (O, K, bytes of a block), scales (O, K), zero_points
    (O, bytes).
    """

    bits: int
    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    @classmethod
    def of(cls, matrix: NDArray[np.float32], bits: int) -> Self:
        """A matrix (O, I), quantised."""
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=False, bits=bits)
        return cls(
            bits, *DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix.T))
        )

    def rows(self, first: int, last: int) -> "Quantized":
        """Outputs [first, last), in the same memory."""
        rows = slice(first, last)
        return Quantized(self.bits, self.values[rows], self.scales[rows], self.zero_points[rows])

    def dequantized(self, width: int) -> NDArray[np.float32]:
        """What the kernels compute with. Shape: (O, I), where I is `width`."""
        zeros = unpacked(self.zero_points, self.bits)[:, : self.scales.shape[1], None]
        numbers = (unpacked(self.values, self.bits).astype(np.float32) - zeros) * self.scales[
            ..., None
        ]  # (O, K, 32)
        return numbers.reshape(len(numbers), -1)[:, :width]


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of 4 bits stand two in a byte, the first in its lower half.

    Shape: (..., n) -> (..., 2n), or the same for 8 bits.
    """
    return (
        packed if bits == 8 else np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
    )


class WeightQuantizer:
    """Quantises a model's matrices, each once, and rewrites the nodes that use them."""

    def __init__(self, model: Decoder, precision: str) -> None:
        self.bits = {module.weight.data_ptr(): bits for module, bits in matrices(model, precision)}
        self.done: list[tuple[int, int, Quantized]] = []  # by where a matrix begins and ends in memory

    def quantized(self, matrix: NDArray[np.float32]) -> Quantized:
        """One of the model's matrices (O, I) in blocks, or several of one kind that lie together; the same
        arrays whenever it or some rows of it are asked for.
        """
        begin = matrix.ctypes.data
        end = begin + matrix.nbytes
        for first, last, found in self.done:
            if first <= begin and end <= last:
                row = (begin - first) // matrix.strides[0]
                return found.rows(row, row + len(matrix))
        found = Quantized.of(matrix, self.bits[begin])
        self.done.append((begin, end, found))
        return found

    def rewrite(self, graph: onnx.GraphProto, weights: Weights) -> Weights:
        """Let a graph use quantised matrices. Returns the weights that its nodes name now."""
        added: Weights = {}
        nodes = list[onnx.NodeProto]()
        for node in graph.node:
            place = {"Gemm": 1, "Gather": 0}.get(node.op_type)
            name = None if place is None else node.input[place]
            if name not in weights or weights[name].ctypes.data not in self.bits:
                nodes.append(node)
                continue
            found = self.quantized(weights[name])
            width = weights[name].shape[1]
            nodes += [_product(node, name, found, width)] if place else _lookup(node, name, found, width)
            values = found.values if place else found.values.reshape(len(found.values), -1)
            added |= {
                f"{name}/values": values,
                f"{name}/scales": found.scales,
                f"{name}/zero_points": found.zero_points,
            }
            if not place:
                added |= {
                    f"{name}/{bound}": np.array([number])
                    for bound, number in (("first", 0), ("width", width), ("axis", 1))
                }
        rewritten = onnx.GraphProto(node=nodes)
        del graph.node[:]
        graph.node.extend(rewritten.node)
        return {**weights, **added}


def _product(node: onnx.NodeProto, name: str, found: Quantized, width: int) -> onnx.NodeProto:
    bias = ["", node.input[2]] if len(node.input) > 2 else []  # after the place of g_idx
    inputs = [node.input[0], *(f"{name}/{part}" for part in ("values", "scales", "zero_points")), *bias]
    sizes = {"K": width, "N": len(found.scales), "bits": found.bits, "block_size": BLOCK_SIZE}
    attributes: Any = {**sizes, "accuracy_level": ACCURACY_LEVEL}
    return onnx.helper.make_node(
        "MatMulNBits", inputs, list(node.output), node.name, domain=CONTRIB, **attributes
    )


def _lookup(node: onnx.NodeProto, name: str, found: Quantized, width: int) -> list[onnx.NodeProto]:
    """The lookup, whose rows are as many whole blocks; where `width` does not fill the last, the rest is cut
    off.
    """
    inputs = [f"{name}/values", node.input[1], f"{name}/scales", f"{name}/zero_points"]
    attributes: Any = {"bits": found.bits, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
    full = width % BLOCK_SIZE == 0
    rows = list(node.output) if full else [f"{node.output[0]}/blocks"]
    lookup = onnx.helper.make_node(
        "GatherBlockQuantized", inputs, rows, node.name, domain=CONTRIB, **attributes
    )
    if full:
        return [lookup]
    bounds = [f"{name}/{bound}" for bound in ("first", "width", "axis")]
    return [lookup, onnx.helper.make_node("Slice", [*rows, *bounds], list(node.output), f"{node.name}/cut")]


def round_trip(model: Decoder, precision: str) -> None:
    """Give a model, in place, the weights that its quantised bundle computes with."""
    with torch.no_grad():
        for module, bits in {
            id(module.weight): (module, bits) for module, bits in matrices(model, precision)
        }.values():
            matrix = module.weight.numpy()
            module.weight.copy_(torch.from_numpy(Quantized.of(matrix, bits).dequantized(matrix.shape[1])))


def add_contrib_domain(model: onnx.ModelProto) -> None:
    """Say that a graph uses ONNX Runtime's own operators, if it does."""
    if any(node.domain == CONTRIB for node in model.graph.node):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
