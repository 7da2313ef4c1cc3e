"""bf16, a type that numpy does not have: its bits are kept as np.uint16, a type of no graph here.

states = narrowed(np.array([1.0, 3.14159]), np.uint16)    # of a pool or a cache in bf16
widened(states)                                           # 1.0, 3.140625 in fp32
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_runtime.bundle.manifest import FLOATS

BITS = FLOATS["bf16"]
ELEMENT_TYPE = 16  # onnx.TensorProto.BFLOAT16
EXPONENT = 0x7F80  # all of it is set in NaN and infinity
NUM_CUT = 16  # bits of fp32 that bf16 does not have


def element_type(dtype: type[np.generic]) -> Any:
    """What ONNX Runtime calls a type of numpy's: that, or the number of one that numpy does not have."""
    return ELEMENT_TYPE if dtype is BITS else dtype


def read_as(dtype: type[np.generic]) -> type[np.generic]:
    """The type in which the host reads numbers that graphs keep in one."""
    return np.float32 if dtype is BITS else dtype


def widened(values: NDArray[Any]) -> NDArray[Any]:
    """bf16 as fp32, which is exact; any other type as it is. Shape: (...) -> same."""
    if values.dtype != BITS:
        return values
    return (values.astype(np.uint32) << NUM_CUT).view(np.float32)


def narrowed(values: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """Finite numbers in a type, rounded to nearest, ties to even. Shape: (...) -> same."""
    if dtype is not BITS:
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> NUM_CUT) & 1
    return ((bits + (1 << (NUM_CUT - 1)) - 1 + odd) >> NUM_CUT).astype(BITS)


def clear_not_finite(values: NDArray[Any]) -> None:
    """Zero what is NaN or infinite, in place."""
    if values.dtype == BITS:
        values[(values & EXPONENT) == EXPONENT] = 0
    else:
        values[~np.isfinite(values)] = 0.0
