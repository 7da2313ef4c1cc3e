"""Matrices on a grid: whole numbers of few bits, with a scale for each block of a row.

What a file of 4 or 8 bits holds, what a checkpoint keeps of it beside the weights, and what a kernel reads.
Shapes: O outputs (or words), I inputs, K blocks of a row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

ROUNDED = "rounded"  # the kind of a grid that no file brought
SYMMETRIC = (True, True)  # the end of a form: without offsets, without zero points
PARTS = ("numbers", "scales", "offsets", "zeros")  # in a checkpoint's file


@dataclass(frozen=True)
class Grid:
    """A matrix (O, I): `scales * (number - zero) + offsets`, block by block.

    `kind` is the type's name in the file that it comes from. `numbers` of `bits` bits are packed, (O, K,
    bytes of a block); the last block of a row may reach past its end. `scales` (O, K), and so are `offsets`
    or `zeros` where there are some. Without `zeros`, 0 is the number 0 where there are offsets, or else the
    middle one.
    """

    kind: str
    bits: int
    block: int
    numbers: NDArray[np.uint8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None
    zeros: NDArray[np.uint8] | None = None

    @property
    def middle(self) -> int:
        """The number that stands for 0 on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def form(self) -> tuple[int, int, bool, bool]:
        """What kernels have to know before they read any of it."""
        return self.bits, self.block, self.offsets is None, self.zeros is None

    def dequantized(self, width: int) -> NDArray[np.float32]:
        """The weights. Shape: (O, I), where I is `width`."""
        numbers = unpacked(self.numbers, self.bits).astype(np.float32)
        if self.zeros is not None:
            numbers -= self.zeros[..., None]
        elif self.offsets is None:
            numbers -= self.middle
        values = numbers * self.scales[..., None]
        if self.offsets is not None:
            values += self.offsets[..., None]
        return values.reshape(len(values), -1)[:, :width]

    def is_exactly(self, matrix: NDArray[np.float32]) -> bool:
        """Whether a matrix (O, I) is this one, number by number."""
        rows, width = matrix.shape
        fits = rows == len(self.scales) and self.scales.shape[1] == -(-width // self.block)
        return fits and np.array_equal(self.dequantized(width), matrix)

    def rows(self, first: int, last: int) -> Self:
        """Outputs [first, last), in the same memory."""
        arrays = {part: array[first:last] for part in PARTS if (array := getattr(self, part)) is not None}
        return replace(self, **arrays)

    def halved(self) -> Self:
        """With scales and offsets that fp16 holds: scales, and what a block is offset by from its middle."""
        scales = self.scales.astype(np.float16).astype(np.float32)
        offsets = None
        if self.offsets is not None:
            from_middle = (self.offsets + self.middle * self.scales).astype(np.float16)
            offsets = from_middle - self.middle * scales
        return replace(self, scales=scales, offsets=offsets)

    def widened(self) -> Self:
        """The same symmetric grid in 8 bits."""
        if self.bits == 8:
            return self
        assert self.form[2:] == SYMMETRIC, "only a symmetric grid has its zero in the middle of either form"
        numbers = unpacked(self.numbers, self.bits) + np.uint8(128 - self.middle)
        return type(self)(self.kind, 8, self.block, numbers, self.scales)


def joined(grids: Sequence[Grid]) -> Grid:
    """Matrices of one form, one below the other: their products side by side."""
    first = grids[0]
    if len(grids) == 1:
        return first
    offsets = [grid.offsets for grid in grids if grid.offsets is not None]
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Grid(
        first.kind,
        first.bits,
        first.block,
        np.concatenate([grid.numbers for grid in grids]),
        np.concatenate([grid.scales for grid in grids]),
        np.concatenate(offsets) if offsets else None,
        np.concatenate(zeros) if zeros else None,
    )


def packed(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of 4 bits two in a byte, the first in its lower half; those of 8 as they are.

    Shape: (..., 2n) -> (..., n), or the same for 8 bits.
    """
    return numbers if bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << np.uint8(4)


def unpacked(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """What `packed` has packed. Shape: (..., n) -> (..., 2n), or the same for 8 bits."""
    if bits == 8:
        return numbers
    return np.stack((numbers & 15, numbers >> 4), axis=-1).reshape(*numbers.shape[:-1], -1)


def save_grids(grids: Mapping[str, Grid], path: Path) -> None:
    """Write grids by the names of their weights."""
    arrays = dict[str, NDArray[Any]]()
    forms = {}
    for name, grid in grids.items():
        arrays |= {f"{name}/{part}": array for part in PARTS if (array := getattr(grid, part)) is not None}
        forms[name] = {"kind": grid.kind, "bits": grid.bits, "block": grid.block}
    save_file(arrays, path, metadata={"forms": json.dumps(forms)})


def load_grids(path: Path) -> dict[str, Grid]:
    """The grids of a file, by the names of their weights.

    Raises OSError, ValueError, KeyError or SafetensorError for one that is damaged.
    """
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        forms = json.loads((file.metadata() or {})["forms"])
    return {
        name: Grid(
            **form,
            **{part: arrays[f"{name}/{part}"] for part in PARTS if f"{name}/{part}" in arrays},
        )
        for name, form in forms.items()
    }
