"""A rule of your own for when a token leaves: python examples/own_policy.py BUNDLE PROMPT"""

import sys
from typing import Any

import numpy as np

from ease_runtime import LLM, Options
from ease_runtime.policies import ExitOutput, ThresholdPolicy
from ease_runtime.policies.thresholds import Thresholds


class Collision(ThresholdPolicy):
    """How probable it is that two draws from the exit's head are the same token."""

    def confidence(self, said: ExitOutput, state: Any) -> Any:
        assert said.head is not None, "it asks the head"
        p = np.exp(said.head.logits - said.head.logits.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return np.square(p).sum(axis=-1)


def main(bundle: str, prompt: str) -> None:
    llm = LLM(bundle)
    num_early = len(llm.stack.exit_layers) - 1
    for threshold in (0.1, 0.3, 0.9):
        policy = Collision(Thresholds.of(threshold).for_exits(num_early))
        depths = [event.depth for event in llm.generate(prompt, Options(max_tokens=40), policy=policy)]
        print(f"threshold {threshold}: mean depth {sum(depths) / len(depths):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
