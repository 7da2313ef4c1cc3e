"""Perplexity and speed over thresholds, a table and a plot: python examples/sweep.py BUNDLE TEXT OUT.svg"""

import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from ease_eval.measure.documents import Document
from ease_eval.measure.table import Amounts, make_table
from ease_runtime import LLM
from ease_train.data.corpora import load_documents

matplotlib.use("svg")
AMOUNTS = Amounts(scored_tokens=400, num_texts=2, prompt_tokens=16, new_tokens=24, num_rounds=2)


def main(bundle: str, text: str, out: str) -> None:
    llm = LLM(bundle)
    documents = [Document.of(llm, one) for one in load_documents(text, "train")]
    asked = {"thresholds": [0.2, 0.5, 0.8], "catch_ups": ["recompute"], "amounts": AMOUNTS}
    table = make_table(Path(bundle), llm, documents, source=text, split="train", **asked)
    print(table.markdown())
    pyplot.plot([row.speedup for row in table.rows], [row.ppl for row in table.rows], "o")
    pyplot.xlabel("speed-up")
    pyplot.ylabel("perplexity")
    pyplot.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
