"""Passes of a lone row over the stand-ins, each several times: prints the sizes of caches and passes as a
JSON list, in order, and notes in the log where the last time begins and ends.

python tests/cuda/capture.py BUNDLE     # [[T, N], ...]
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from ease_runtime.engine.layout import Span
from ease_runtime.ort import buffers
from ease_runtime.ort.stack import open_stack

TIMES = 3  # of which the second is captured
buffers.DEVICE_STEP = 64  # texts are short here
stack = open_stack(Path(sys.argv[1]), device="cuda")
assert stack.captures is not None
row = stack.reserve_rows(2, [])
cache = stack.open_cache()


def note(what: str) -> None:
    with Path(os.environ["STANDIN_LOG"]).open("a") as log:
        log.write(f"call {what}\n")


found = []
for start in (10, 70, 140):
    for num_tokens in (1, 2, 3, 4, 5, 8):
        first = stack.reserve_rows(2 * num_tokens, [])
        rows = np.arange(first, first + num_tokens)
        for time in range(TIMES):
            note("begins" if time == TIMES - 1 else "other")
            for number in range(len(stack.layout)):
                inputs = rows if number else np.ones(num_tokens, np.int64)
                stack.run_segment(number, cache, [Span(0, start, start + num_tokens)], inputs, first)
            stack.run_exit(len(stack.exits) - 1, rows)
        note("ends")
        found.append([cache.runs(0, [Span(0, start, start + num_tokens)])[0].length, num_tokens])
print(json.dumps(found))
