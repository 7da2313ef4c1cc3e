"""What the cost model says of larger models, on paper: no model is run here.

    python experiments/scale.py        # writes docs/experiments/scale.json

One sequence is decoded. A pass reads every weight that it uses once and takes bytes / bandwidth, whatever the
number of its tokens up to the machine's ridge (where arithmetic takes as long as reading); K/V, activations,
launches and the loop cost nothing. The unit is the time of one layer: full depth costs L + h, where h is the
head's share.

recompute   a token that leaves at exit e costs e + h; one that does not L + h, its pass taking the pending
            ones along. With a gate.
verify      j drafts cost j (e + r h) with a reduced head of r of the whole one's size; the pass that judges
            them costs L + h, and gives (1 - a^(j+1)) / (1 - a) tokens at acceptance a (Leviathan et al. 2023,
            arXiv 2211.17192, equation 1). The best j up to 16.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ease_common.files import write_whole

RESULTS = Path("docs/experiments/scale.json")
LONGEST_DRAFT = 16


@dataclass(frozen=True)
class Shape:
    """A published decoder's sizes."""

    name: str
    layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Numbers in a layer's matrices."""
        attention = self.dim * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.dim * self.ffn_dim

    @property
    def head_weights(self) -> int:
        """Numbers in the LM head."""
        return self.dim * self.vocab_size

    @property
    def head(self) -> float:
        """The head in layers."""
        return self.head_weights / self.layer_weights

    @property
    def all_weights(self) -> int:
        """Numbers that are read for a token at full depth."""
        return self.layers * self.layer_weights + self.head_weights


@dataclass(frozen=True)
class Machine:
    """Bytes and operations a second that it reaches on large matrices, as its maker states them."""

    name: str
    bandwidth: float
    operations: float
    bytes_a_weight: float

    @property
    def ridge(self) -> float:
        """Tokens of a pass from which arithmetic takes longer than reading the weights: two operations a
        weight and token.
        """
        return self.bytes_a_weight * self.operations / (2 * self.bandwidth)


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, True),
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
    Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128, 128256, True),
    Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32000, False),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, False),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, False),
)
MACHINES = (
    Machine("two channels of DDR5-5600, 8 cores with AVX2 at 4 GHz, int8", 89.6e9, 8 * 4e9 * 64, 1.0),
    Machine("H100 SXM, fp16", 3.35e12, 989e12, 2.0),
)


def recompute(shape: Shape, exit_layer: float, leaving: float) -> float:
    """Speed-up when a share of the tokens leaves at one exit, by a gate that costs nothing."""
    return (shape.layers + shape.head) / (
        exit_layer + (1 - leaving) * (shape.layers - exit_layer) + shape.head
    )


def verify(shape: Shape, exit_layer: float, acceptance: float, reduced_head: float) -> float:
    """Speed-up of drafting every token at one exit, at the best number of drafts."""
    full = shape.layers + shape.head
    best = 1.0
    for drafts in range(1, LONGEST_DRAFT + 1):
        tokens = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
        best = max(best, full * tokens / (drafts * (exit_layer + reduced_head * shape.head) + full))
    return best


def break_even(shape: Shape, exit_layer: float, reduced_head: float) -> float | None:
    """The acceptance, to 0.01, from which drafting pays."""
    return next(
        (
            percent / 100
            for percent in range(1, 100)
            if verify(shape, exit_layer, percent / 100, reduced_head) > 1.0
        ),
        None,
    )


def main() -> None:
    rows = []
    for shape in SHAPES:
        quarter = shape.layers / 4
        half = shape.layers / 2
        reduced = 8192 / shape.vocab_size
        rows.append(
            {
                **asdict(shape),
                "billions": shape.all_weights / 1e9,
                "head_in_layers": shape.head,
                "head_share": shape.head_weights / shape.all_weights,
                "bound_half_depth": recompute(shape, half, 1.0),
                "recompute_half_of_them": recompute(shape, half, 0.5),
                "break_even_full_head": break_even(shape, half, 1.0),
                "break_even_reduced_head": break_even(shape, half, reduced),
                "verify_half_80": verify(shape, half, 0.8, reduced),
                "verify_half_90": verify(shape, half, 0.9, reduced),
                "verify_quarter_80": verify(shape, quarter, 0.8, reduced),
                "verify_quarter_90": verify(shape, quarter, 0.9, reduced),
                "tokens_per_second": {
                    m.name: m.bandwidth / (m.bytes_a_weight * shape.all_weights) for m in MACHINES
                },
            }
        )
    machines = [{**asdict(machine), "ridge": machine.ridge} for machine in MACHINES]
    write_whole(RESULTS, json.dumps({"machines": machines, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
