"""What --compare says: a ratio with its range, or that there was nothing to compare."""

from pathlib import Path

import pytest

from ease_runtime import LLM, Options
from ease_runtime.cli.comparison import ROUNDS, Comparison, compare


@pytest.mark.parametrize(
    ("comparison", "line", "speedup", "bounds"),
    [
        (
            Comparison((20.0, 10.0, 30.0), (10.0, 10.0, 10.0)),
            "full depth: 10 tokens/s; as asked 2.00x as fast (1.00–3.00 in 3 rounds that took turns)",
            2.0,
            [1.0, 3.0],
        ),
        (Comparison(), "full depth: no token left early", None, None),
    ],
)
def test_what_is_said(
    comparison: Comparison, line: str, speedup: float | None, bounds: list[float] | None
) -> None:
    assert comparison.line().startswith(line)
    told = comparison.to_json()
    assert (told["speedup"], told["speedup_range"]) == (speedup, bounds)


@pytest.mark.parametrize(("threshold", "rounds"), [(0.0, ROUNDS), (1.0, 0)])
def test_rounds_where_a_token_left(tiny_bundle: Path, threshold: float, rounds: int) -> None:
    llm = LLM(tiny_bundle)
    options = Options(max_tokens=4, threshold=threshold)
    said = llm.complete("And the king", options)
    compared = compare(llm, "And the king", options, said.timing, said.depths)
    assert len(compared.asked) == len(compared.full_depth) == rounds
