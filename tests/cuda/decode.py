"""Decode over the stand-ins with scripted heads, so that exits are taken: prints the depths as a JSON list.

python tests/cuda/decode.py BUNDLE CATCH_UP TEMPERATURE ROWS [CONFIDENCE...]    # of the first exit, pass by
pass; other exits are never sure
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Greedy, GumbelSampler
from ease_runtime.ort.stack import OrtStack, open_stack
from ease_runtime.policies import HeadOutput, make_policy

PROMPT = [1, 5, 9]


class ScriptedHeads:
    """Stands in for `run_exit`: the head's graphs run, and the figures that they would say are written by the
    script. Logits are what lies on the device.
    """

    def __init__(self, stack: OrtStack, confidences: list[float]) -> None:
        self.run = stack.run_exit
        self.confidences = iter(confidences)

    def __call__(self, number: int, rows: np.ndarray) -> HeadOutput:
        output = self.run(number, rows)
        output.top_id[:] = 7
        output.top_prob[:] = next(self.confidences, 0.1) if number == 0 else 0.1
        return output


def note(what: str) -> None:
    """A line in the stand-ins' log, where it is now."""
    with Path(os.environ["STANDIN_LOG"]).open("a") as log:
        log.write(f"call {what}\n")


bundle, catch_up, temperature, rows, *confidences = sys.argv[1:]
stack = open_stack(Path(bundle), device="cuda")
stack.run_exit = ScriptedHeads(stack, [float(value) for value in confidences])  # type: ignore[method-assign]
note("decoding")  # what was before is the load's
engine = Engine(stack, num_slots=int(rows))
policy = make_policy("max-prob", 0.5, stack.exit_layers)
sampler = GumbelSampler(float(temperature), 0, 1.0, 0) if float(temperature) else Greedy()
requests = [
    engine.start(PROMPT, max_new_tokens=len(confidences), policy=policy, catch_up=catch_up, sampler=sampler)
    for _ in range(int(rows))
]
while engine.busy:
    said = len(requests[0].produced)
    engine.step()
    note("step")
    if len(requests[0].produced) > said:
        note("token")
print(json.dumps([token.depth for token in requests[0].produced]))
