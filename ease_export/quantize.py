"""int8 and int4 weights, by ONNX Runtime's own quantizer: a scale and a zero point for every 32 numbers of a row.

Products become MatMulNBits, lookups in the embedding GatherBlockQuantized. The two read the same bytes, so a tied embedding is
stored once. Norms, exits' adapters, gates and routers, which are small and decide, stay fp32.

Shapes: O outputs (or words), I inputs, K blocks of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from torch import nn

from ease_train.model import Decoder, RoutedBlock

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4  # of MatMulNBits: activations are rounded to int8, which is what makes it fast
CONTRIB = "com.microsoft"

Weights = dict[str, NDArray[Any]]


def matrices(model: Decoder) -> Iterator[nn.Linear | nn.Embedding]:
    """The modules whose weights are quantised: those of the layers, the LM heads, and the embedding where blocks fill its rows."""
    for layer in model.layers:
        block = layer.block if isinstance(layer, RoutedBlock) else layer
        yield from (module for module in block.modules() if isinstance(module, nn.Linear))
    yield from (module for module in (model.lm_head, *model.exit_heads.values()) if isinstance(module, nn.Linear))
    if model.config.dim % BLOCK_SIZE == 0:
        yield model.embed


@dataclass(frozen=True)
class Quantized:
    """A matrix (O, I) as MatMulNBits reads it: values (O, K, bytes of a block), scales (O, K), zero_points (O, bytes)."""

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    def dequantized(self, bits: int, width: int) -> NDArray[np.float32]:
        """What the kernels compute with. Shape: (O, I), where I is `width`."""
        zeros = unpacked(self.zero_points, bits)[:, : self.scales.shape[1], None]
        numbers = (unpacked(self.values, bits).astype(np.float32) - zeros) * self.scales[..., None]  # (O, K, 32)
        return numbers.reshape(len(numbers), -1)[:, :width]


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of 4 bits stand two in a byte, the first in its lower half. Shape: (..., n) -> (..., 2n), or the same for 8 bits."""
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


class WeightQuantizer:
    """Quantises a model's matrices, each once, and rewrites the nodes that use them."""

    def __init__(self, model: Decoder, precision: str) -> None:
        self.bits = BITS[precision]
        self.pointers = {module.weight.data_ptr() for module in matrices(model)}
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=False, bits=self.bits)
        self.quantizer, self.done = DefaultWeightOnlyQuantizer(config), dict[int, Quantized]()

    def quantized(self, matrix: NDArray[np.float32]) -> Quantized:
        """A matrix (O, I) in blocks; the same arrays whenever it is asked for."""
        if (place := matrix.ctypes.data) not in self.done:
            self.done[place] = Quantized(*self.quantizer.qbits_block_quant(np.ascontiguousarray(matrix.T)))
        return self.done[place]

    def rewrite(self, graph: onnx.GraphProto, weights: Weights) -> Weights:
        """Let a graph use quantised matrices. Returns the weights that its nodes name now."""
        added: Weights = {}
        for node in graph.node:
            place = {"Gemm": 1, "Gather": 0}.get(node.op_type)
            name = None if place is None else node.input[place]
            if name in weights and weights[name].ctypes.data in self.pointers:
                found, width = self.quantized(weights[name]), weights[name].shape[1]
                rewritten = self._product(node, name, width, len(found.scales)) if place else self._lookup(node, name)
                values = found.values if place else found.values.reshape(len(found.values), -1)
                added |= {f"{name}/values": values, f"{name}/scales": found.scales, f"{name}/zero_points": found.zero_points}
                node.CopyFrom(rewritten)
        return {**weights, **added}

    def _product(self, node: onnx.NodeProto, name: str, width: int, num_outputs: int) -> onnx.NodeProto:
        bias = ["", node.input[2]] if len(node.input) > 2 else []  # after the place of g_idx
        inputs = [node.input[0], *(f"{name}/{part}" for part in ("values", "scales", "zero_points")), *bias]
        attributes: Any = {"K": width, "N": num_outputs, "bits": self.bits, "block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL}
        return onnx.helper.make_node("MatMulNBits", inputs, list(node.output), node.name, domain=CONTRIB, **attributes)

    def _lookup(self, node: onnx.NodeProto, name: str) -> onnx.NodeProto:
        inputs = [f"{name}/values", node.input[1], f"{name}/scales", f"{name}/zero_points"]
        attributes: Any = {"bits": self.bits, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
        return onnx.helper.make_node("GatherBlockQuantized", inputs, list(node.output), node.name, domain=CONTRIB, **attributes)


def round_trip(model: Decoder, precision: str) -> None:
    """Give a model, in place, the weights that its quantised bundle computes with."""
    quantizer = WeightQuantizer(model, precision)
    with torch.no_grad():
        for module in {id(module.weight): module for module in matrices(model)}.values():
            matrix = module.weight.numpy()
            numbers = quantizer.quantized(matrix).dequantized(quantizer.bits, matrix.shape[1])
            module.weight.copy_(torch.from_numpy(numbers))


def add_contrib_domain(model: onnx.ModelProto) -> None:
    """Say that a graph uses ONNX Runtime's own operators, if it does."""
    if any(node.domain == CONTRIB for node in model.graph.node):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
