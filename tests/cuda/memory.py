"""Uploads from one array that changes at once, downloads, copies of rows: prints "equal" where all is as it
was asked for. Run over the stand-ins.

python tests/cuda/memory.py
"""

import numpy as np

from ease_runtime.ort.device import CUDA, DeviceArray
from ease_runtime.ort.memory import PINNED_BYTES

memory = CUDA.memory
places = [
    DeviceArray((1, 3, PINNED_BYTES // 128), np.int64, CUDA) for _ in range(9)
]  # together more than is pinned
array = np.zeros(places[0].shape, np.int64)
for number, place in enumerate(places):
    array[:] = number
    memory.upload(place.pointer, array)
array[:] = -1
assert [place.read().mean() for place in places] == list(range(9))

large = np.arange(PINNED_BYTES // 2, dtype=np.int64)
there = DeviceArray(large.shape, np.int64, CUDA)
there.write(large)
assert (there.read() == large).all()

rows = DeviceArray((4, 5), np.int64, CUDA)
memory.copy_rows(rows.pointer, 40, there.pointer, 800, 24, 4)
assert rows.read().tolist() == [[100 * row, 100 * row + 1, 100 * row + 2, 0, 0] for row in range(4)]
print("equal")
