"""The weights of a bundle's graphs: each is made when it is written, and let go.

A tensor that several graphs hold is written once, whatever they call it. In bf16 what is small and decides
stays fp32, and so do norms that bf16 would round (as Gemma's, 1 + w: w is bf16 there).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn

from ease_export.layers import Packed

EXTERNAL_BYTES = 1024  # smaller tensors stay inside the graph
ALIGNMENT = 4096  # of a tensor in its file: a page, so that it can be mapped
MADE_AT_ONCE = 1 << 22  # numbers
BF16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)  # numpy has none of its own
# Weights that stay fp32 in a graph in bf16, by how their names begin in modules.py: of gates, routers and the
# words that a reduced head does not know.
WIDE_IN_BF16 = ("gate.", "router.", "routed.", "log_shares", "first_log_shares")
NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True, kw_only=True)
class GraphTensor:
    """A tensor of a graph, which `made` gives in pieces, one after the other.

    It is of some parts, one below the other, of so many `rows`; `keys` tell them from all other tensors'.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    keys: tuple[Any, ...]
    rows: tuple[int, ...]
    made: Callable[[], Iterable[NDArray[Any]]]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @classmethod
    def of(cls, array: NDArray[Any]) -> Self:
        """One that is there already."""
        rows = (len(array) if array.ndim else 1,)
        return cls(shape=array.shape, dtype=array.dtype, keys=(id(array),), rows=rows, made=lambda: [array])

    @classmethod
    def of_weights(cls, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Self:
        """Weights of the model, one below the other, in a graph's type unless they are whole numbers."""
        first = parts[0]
        dtype = dtype if first.is_floating_point() else first.dtype
        rows = tuple(len(part) if part.ndim else 1 for part in parts)
        return cls(
            shape=(sum(rows), *first.shape[1:]) if first.ndim else (),
            dtype=as_numpy(torch.empty(0, dtype=dtype)).dtype,
            keys=tuple(id(part) for part in parts),
            rows=rows,
            made=lambda: pieces(parts, dtype),
        )

    def array(self) -> NDArray[Any]:
        """The whole."""
        return np.concatenate([np.ravel(piece) for piece in self.made()]).reshape(self.shape)


def pieces(parts: Iterable[Tensor], dtype: torch.dtype) -> Iterator[NDArray[Any]]:
    """The numbers of some weights, in a type."""
    for part in parts:
        for piece in torch.split(part.detach().flatten(), MADE_AT_ONCE):
            yield as_numpy(piece.to(dtype))


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor's numbers, which bf16's are by a type of their own. Shape: (...) -> same."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    found: NDArray[Any] = tensor.numpy()
    return found


def read_as(dtype: torch.dtype) -> torch.dtype:
    """The type of what the host reads, and of what decides, in a graph of a type: numpy has no bf16, whose 8
    bits are few to decide by.
    """
    return torch.float32 if dtype is torch.bfloat16 else dtype


def kept_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a module's floating-point weight in a graph of a type."""
    return read_as(dtype) if name.startswith(WIDE_IN_BF16) else dtype


def graph_weights(module: nn.Module, dtype: torch.dtype) -> dict[str, GraphTensor]:
    """A module's weights and buffers by name, floating-point ones in a type."""
    found: dict[str, tuple[Tensor, ...]] = {
        name: (value,) for name, value in module.state_dict(keep_vars=True).items()
    }
    for name, part in module.named_modules():
        if isinstance(part, Packed):
            found[f"{name}.weight"] = part.parts
    return {name: GraphTensor.of_weights(parts, kept_type(name, dtype)) for name, parts in found.items()}


def keep_norms(graph: onnx.GraphProto, weights: dict[str, GraphTensor], module: nn.Module) -> None:
    """Let norms of a graph in bf16 compute in fp32 where bf16 would round their weights, which then stay as
    they are: kernels take states and weights of one type only.
    """
    wide = graph_weights(module, torch.float32)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        own = [name for name in node.input[1:] if name in wide] if node.op_type in NORMS else []
        if all(_is_bf16(wide[name].array()) for name in own):
            nodes.append(node)
            continue
        weights |= {name: wide[name] for name in own}
        state, output = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{output}/wide", f"{output}/normed"
        before = _cast(state, node.input[0], onnx.TensorProto.FLOAT)
        nodes += [before, node, _cast(node.output[0], output, onnx.TensorProto.BFLOAT16)]
    del graph.node[:]
    graph.node.extend(nodes)


def _is_bf16(array: NDArray[np.float32]) -> bool:
    """Whether bf16 holds all numbers as they are."""
    return bool((array.astype(BF16).astype(np.float32) == array).all())


def _cast(name: str, output: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [output], output, to=to)


class WeightFiles:
    """Writes tensors into the files of a folder, and remembers where each part of them is; parts that lie one
    after the other are found again together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = dict[Any, tuple[str, int, int]]()  # of parts: file, from, to
        self.kept = list[GraphTensor]()  # so that no other tensor gets the same key meanwhile

    def fill(self, graph: onnx.GraphProto, weights: Mapping[str, GraphTensor], file: str) -> None:
        """Give a graph the weights that its nodes name; large ones go to `file` unless they are in one
        already.
        """
        named = dict.fromkeys(name for node in graph.node for name in node.input)
        graph.initializer.extend(self.tensor(name, weights[name], file) for name in named if name in weights)

    def tensor(self, name: str, tensor: GraphTensor, file: str) -> onnx.TensorProto:
        """An initializer of a graph. Its bytes are inside it, or in a file."""
        kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
        proto = onnx.TensorProto(name=name, dims=tensor.shape, data_type=kind)
        if tensor.num_bytes < EXTERNAL_BYTES:
            proto.raw_data = tensor.array().tobytes()
            return proto
        found = self._find(tensor)
        if found is None:
            found = file, self._append(tensor, file)
            self._note(tensor, *found)
        location, offset = found
        proto.raw_data = b""  # which onnx asks for before it marks a tensor as external
        set_external_data(proto, location, offset=offset, length=tensor.num_bytes)
        proto.ClearField("raw_data")
        return proto

    def _find(self, tensor: GraphTensor) -> tuple[str, int] | None:
        """The file that has all parts of a tensor, one after the other, and its offset there."""
        places = [self.places.get(key) for key in tensor.keys]
        if places[0] is None:
            return None
        file, begin, end = places[0]
        for place in places[1:]:
            if place is None or place[:2] != (file, end):
                return None
            end = place[2]
        return file, begin

    def _note(self, tensor: GraphTensor, file: str, begin: int) -> None:
        of_a_row = tensor.num_bytes // sum(tensor.rows)
        for key, rows in zip(tensor.keys, tensor.rows, strict=True):
            self.places[key] = file, begin, begin + rows * of_a_row
            begin += rows * of_a_row
        self.kept.append(tensor)

    def _append(self, tensor: GraphTensor, file: str) -> int:
        """Write a tensor at the next page of a file. Returns its offset in bytes."""
        with (self.folder / file).open("ab") as stream:
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            offset = stream.tell()
            for piece in tensor.made():
                stream.write(np.ascontiguousarray(piece).view(np.uint8).data)
        return offset
