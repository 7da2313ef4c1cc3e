"""Safetensors files that are written tensor by tensor, and mapped when they are read: neither holds a model.

write_tensors(path, Tensors({"w": (torch.bfloat16, (2, 3))}, lambda name: made(name)), {})
weights = mapped_tensors(path)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = {  # of types in a file's header
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, `made` when they are asked for: their types and shapes, which are known before."""

    described: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    made: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Those that are there."""
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        return cls(described, tensors.__getitem__)


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a file of tensors, each of which is made when its turn comes, and let go.

    The widest types come first, so that all are aligned. Raises OSError.
    """
    described = tensors.described
    names = sorted(described, key=lambda name: -described[name][0].itemsize)  # else as they are given
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = described[name]
        begin, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": NAMES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            found = tensors.made(name)
            assert (found.dtype, tuple(found.shape)) == (described[name][0], tuple(described[name][1])), name
            file.write(bytes_of(found).data)


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory as far as they are read, and copied where they are written to.

    Raises OSError or SafetensorError.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, in its own memory where it lies in one piece on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return found
