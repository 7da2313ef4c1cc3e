"""The external files of a bundle's weights.

A tensor that several graphs hold is written once, whatever they call it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import set_external_data

EXTERNAL_BYTES = 1024  # smaller tensors stay inside the graph
ALIGNMENT = 4096  # of a tensor in its file: a page, so that it can be mapped


class WeightFiles:
    """Writes tensors into the files of a folder, and remembers where each is; tensors are told apart by their
    memory, and rows of one that is there are found in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: list[tuple[int, int, str, int]] = []  # from, to in memory; file, offset
        self.kept: list[NDArray[Any]] = []  # so that no other tensor gets the same memory meanwhile

    def fill(self, graph: onnx.GraphProto, weights: Mapping[str, NDArray[Any]], file: str) -> None:
        """Give a graph the weights that its nodes name; large ones go to `file` unless they are in one
        already.
        """
        named = dict.fromkeys(name for node in graph.node for name in node.input)
        graph.initializer.extend(self.tensor(name, weights[name], file) for name in named if name in weights)

    def tensor(self, name: str, array: NDArray[Any], file: str) -> onnx.TensorProto:
        """An initializer of a graph. Its bytes are inside it, or in a file."""
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = onnx.TensorProto(name=name, dims=array.shape, data_type=kind)
        if array.nbytes < EXTERNAL_BYTES:
            proto.raw_data = array.tobytes()
            return proto
        found = self._find(array)
        if found is None:
            begin = array.ctypes.data
            found = file, self._append(np.ascontiguousarray(array), file)
            self.places.append((begin, begin + array.nbytes, *found))
            self.kept.append(array)
        location, offset = found
        proto.raw_data = b""  # which onnx asks for before it marks a tensor as external
        set_external_data(proto, location, offset=offset, length=array.nbytes)
        proto.ClearField("raw_data")
        return proto

    def _find(self, array: NDArray[Any]) -> tuple[str, int] | None:
        """The file of an array that is written, or is some rows of one that is, and its offset there."""
        begin = array.ctypes.data
        for first, last, file, offset in self.places:
            if first <= begin and begin + array.nbytes <= last:
                return file, offset + begin - first
        return None

    def _append(self, array: NDArray[Any], file: str) -> int:
        """Write an array at the next page of a file. Returns its offset in bytes."""
        with (self.folder / file).open("ab") as stream:
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            offset = stream.tell()
            stream.write(array.data)
        return offset
