"""How fast a request runs beside full depth, of rounds in which both take turns."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from ease_runtime.generation import Timing
from ease_runtime.llm import LLM
from ease_runtime.options import Options

ROUNDS = 5


@dataclass(frozen=True)
class Comparison:
    """Speeds of each round, in tokens a second: as asked, and at full depth. Without rounds there was nothing
    to compare.
    """

    asked: tuple[float, ...] = ()
    full_depth: tuple[float, ...] = ()

    @property
    def ratios(self) -> list[float]:
        """As asked over full depth, of each round."""
        return [asked / full for asked, full in zip(self.asked, self.full_depth, strict=True)]

    def line(self) -> str:
        """For who reads."""
        if not self.asked:
            return (
                "full depth: no token left early and no draft was accepted, so that it says the same as "
                "fast; lower the threshold, or give another drafter"
            )
        ratios = self.ratios
        return (
            f"full depth: {median(self.full_depth):.0f} tokens/s; as asked {median(ratios):.2f}x as fast "
            f"({min(ratios):.2f}–{max(ratios):.2f} in {len(ratios)} rounds that took turns)"
        )

    def to_json(self) -> dict[str, Any]:
        """For `--json`: null without rounds."""
        ratios = self.ratios
        return {
            "rounds": len(ratios),
            "tokens_per_second": median(self.asked) if ratios else None,
            "full_depth_tokens_per_second": median(self.full_depth) if ratios else None,
            "speedup": median(ratios) if ratios else None,
            "speedup_range": [min(ratios), max(ratios)] if ratios else None,
        }


def compare(llm: LLM, prompt: str, options: Options, said: Timing, depths: list[int]) -> Comparison:
    """Time a prompt again as it was asked for and at full depth, in turns; not at all where its answer, of
    these depths, had no token that left early or that was drafted.
    """
    if not said.num_accepted and min(depths, default=0) >= llm.stack.exit_layers[-1]:
        return Comparison()
    asked: list[float] = []
    full: list[float] = []
    for number in range(ROUNDS):
        pair = [(asked, options), (full, options.at_full_depth())]
        for speeds, how in pair if number % 2 else pair[::-1]:
            timing = Timing()
            list(llm.generate(prompt, how, timing))
            speeds.append(timing.tokens_per_second)
    return Comparison(tuple(asked), tuple(full)) if all(full) and all(asked) else Comparison()
