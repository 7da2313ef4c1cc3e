"""Peak memory of a training step: more exits must not mean more logits."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "training.py"


def peak_megabytes(exits: str, distill: float) -> float:
    """What a step of the demo model with a 32k vocabulary takes, beyond the imports."""
    command = [sys.executable, str(BENCH), "--memory-of", exits, str(distill)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_four_exits_cost_at_most_a_quarter_more_memory_than_one(distill: float) -> None:
    assert peak_megabytes("3,6,9,12", distill) <= 1.25 * peak_megabytes("12", 0.0)
