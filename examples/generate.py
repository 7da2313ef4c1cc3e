"""Generate, each token with the layer where it left: python examples/generate.py BUNDLE PROMPT"""

import sys

from rich.console import Console
from rich.text import Text

from ease_runtime import LLM, Options

COLOURS = ("green", "yellow", "magenta", "cyan")  # of the exits, the first one first; the last has none


def main(bundle: str, prompt: str) -> None:
    llm = LLM(bundle)
    layers = llm.stack.exit_layers
    console = Console()
    console.print(prompt, end="", style="dim")
    depths = []
    for event in llm.generate(prompt, Options(max_tokens=60, threshold=0.5, catch_up="propagate")):
        place = next(i for i, layer in enumerate(layers) if event.depth <= layer)
        style = "" if place == len(layers) - 1 else COLOURS[place % len(COLOURS)]
        console.print(Text(event.text, style=style), end="")
        depths.append(event.depth)
    console.print(f"\nmean depth {sum(depths) / len(depths):.2f} of {layers[-1]} layers")


if __name__ == "__main__":
    main(*sys.argv[1:3])
