"""Peak memory of a training step: more exits must not mean more logits."""

import subprocess
import sys

import pytest

STEP = """
import resource, sys, torch
from ease_train.config import ModelConfig
from ease_train.losses import Objective, exit_loss
from ease_train.model import Decoder

torch.set_num_threads(1)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exits, distill = [int(layer) for layer in sys.argv[1].split(",")], float(sys.argv[2])
model = Decoder(ModelConfig(vocab_size=32768, dim=256, num_layers=12, max_positions=256, exits=exits))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(32768, (4, 257))
for _ in range(2):
    loss, _ = exit_loss(model, ids[:, :-1], ids[:, 1:], Objective(dict.fromkeys(exits, 1.0), distill))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
"""


def peak_megabytes(exits: str, distill: float) -> float:
    """What a step of the demo model with a 32k vocabulary takes, beyond the imports."""
    command = [sys.executable, "-c", STEP, exits, str(distill)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_four_exits_cost_at_most_a_quarter_more_memory_than_one(distill: float) -> None:
    assert peak_megabytes("3,6,9,12", distill) <= 1.25 * peak_megabytes("12", 0.0)
