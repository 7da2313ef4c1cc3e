"""From how many tokens on a segment's and a head's products turn whole matrices into floats: prints a JSON
object, run over the stand-ins with a log.

python tests/cuda/steps.py BUNDLE MOST      # {"segment": [6, 7, ...], "head": [...]}: sizes at which they do
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from ease_runtime.engine.layout import Span
from ease_runtime.ort.stack import open_stack

log = Path(os.environ["STANDIN_LOG"])
stack = open_stack(Path(sys.argv[1]), device="cuda")
row = stack.reserve_rows(200, [])


def run(kind: str, size: int) -> None:
    if kind == "head":
        stack.run_exit(len(stack.exits) - 1, np.full(size, row))
    else:
        stack.run_segment(0, stack.open_cache(), [Span(0, 0, size)], np.ones(size, np.int64), row)


found: dict[str, list[int]] = {}
for kind in ("segment", "head"):
    for size in range(1, int(sys.argv[2]) + 1):
        before = log.stat().st_size
        run(kind, size)
        if b"equantize" in log.read_bytes()[before:]:
            found.setdefault(kind, []).append(size)
print(json.dumps(found))
