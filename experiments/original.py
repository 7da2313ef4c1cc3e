"""The original EASE's table under its own protocol, then with one thing changed at a time.

    # adds what original.json lacks
    python experiments/original.py [--only PROTOCOL]... [--method NAME]... [--compiled]

The protocol: characters of WikiText-2 (the first 100,000 of train, the first 10,000 of validation),
consecutive windows of 64, batches of 32 (incomplete ones dropped, always in the same order), width 64, 4
heads, 3 layers, AdamW at 1e-3, gradient norm 1.0, at most 50 epochs, stopped at the first whose validation
perplexity is above the one before. Every epoch's figures are kept, of every run.
"""

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from ease_common.files import write_whole
from ease_train.data.corpora import load_documents
from ease_train.methods.originals import LayeredDecoder, original_config
from ease_train.methods.universal import PRESETS, Batch, UniversalConfig, UniversalTrainer

RESULTS = Path("docs/experiments/original.json")
SEEDS = (42, 43, 44, 45, 46)
WINDOW = 64
BATCH = 32
ASYMMETRIC = {1: 0.7, 2: 0.0, 3: 0.3}


@dataclass(frozen=True)
class Protocol:
    """What a run is done under: the original's by default."""

    name: str = "original"
    num_characters: int = 100_000
    epochs: int = 50
    patience: int = 0  # epochs without a better perplexity that are forgiven
    more_validation: bool = False  # the first 200,000 characters of the split decide when to stop, not 10,000
    final_norm: bool = False
    learning_rate: float = 1e-3


ORIGINAL = Protocol()


def rate_of(rate: float) -> Protocol:
    return replace(ORIGINAL, name=f"learning rate {rate:g}", learning_rate=rate)


RATES = (rate_of(2e-3), rate_of(4e-3))  # beside 1e-3, for every method
PROTOCOLS = (
    ORIGINAL,
    replace(ORIGINAL, name="patience 5", patience=5),
    replace(ORIGINAL, name="more validation text", more_validation=True),
    replace(ORIGINAL, name="final norm", final_norm=True),
    replace(ORIGINAL, name="200,000 characters", num_characters=200_000),
    rate_of(5e-4),
    *RATES,
    replace(
        ORIGINAL, name="all of it", num_characters=200_000, patience=5, more_validation=True, final_norm=True
    ),
)
OVERFITTED = replace(ORIGINAL, name="200 epochs without a stop", epochs=200, patience=200)
METHODS: dict[str, UniversalConfig] = {
    "discriminative": UniversalConfig(ASYMMETRIC, layer_lr_scales={1: 1.0, 2: 0.5, 3: 0.1}),
    "reverse discriminative": UniversalConfig(ASYMMETRIC, layer_lr_scales={1: 0.1, 2: 0.5, 3: 1.0}),
    "asymmetric 0.7": PRESETS["asymmetric"],
    "auxiliary loss": PRESETS["auxiliary_loss"],
    "asymmetric 0.3": PRESETS["deep_focus"],
    "deep supervision, routed": PRESETS["deep_supervision_routing"],
    "deep supervision": PRESETS["deep_supervision"],
    "asymmetric with layer 2": PRESETS["asymmetric_with_l2"],
    "standard": PRESETS["standard_llm"],
}
EXTREMES = ("standard", "discriminative")  # the original's worst and best: under every protocol
FEW_SEEDS = SEEDS[:3]  # of EXTREMES under OVERFITTED; the other methods have the first of them


def text_of(split: str) -> str:
    return "".join(load_documents("wikitext-2", split))


def batches(ids: torch.Tensor, keep_rest: bool = False) -> list[Batch]:
    """Consecutive windows, each with the next characters as targets. Shape: (N) -> pairs of (32, 64)."""
    count = (len(ids) - 1) // WINDOW
    x, y = (ids[first : first + count * WINDOW].view(count, WINDOW) for first in (0, 1))
    pairs = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    return [pair for pair in pairs if keep_rest or len(pair[0]) == BATCH]


@dataclass(frozen=True)
class Data:
    """Batches to train on, to stop by, and of more of the validation split; and the number of characters
    known.
    """

    train: list[Batch]
    validation: list[Batch]
    more: list[Batch]
    vocab_size: int


def load_data(num_characters: int, train: str, validation: str) -> Data:
    """Encode by the characters of both parts; one that only the rest of the validation split has is the first
    character.
    """
    train = train[:num_characters]
    first = validation[:10_000]
    more = validation[:200_000]
    known = {character: number for number, character in enumerate(sorted(set(train + first)))}
    ids = [torch.tensor([known.get(character, 0) for character in text]) for text in (train, first, more)]
    return Data(batches(ids[0]), batches(ids[1]), batches(ids[2], keep_rest=True), len(known))


def token_weighted_perplexity(
    trainer: UniversalTrainer, model: LayeredDecoder, validation: Sequence[Batch]
) -> float:
    """exp of the mean over all tokens, under the method's own routing."""
    total = 0.0
    tokens = 0
    for x, y in validation:
        total += math.log(trainer.evaluate(model, [(x, y)])["ppl"]) * y.numel()
        tokens += y.numel()
    return math.exp(total / tokens)


def run(method: str, protocol: Protocol, seed: int, data: Data, compiled: bool) -> dict[str, Any]:
    """Train once, compiled layers or not.

    The figures of the last epoch are those at the stop, as the original reports them.

    The other figures are the model's at the stop, with patience those of the best model.
    """
    config = METHODS[method]
    began = time.perf_counter()
    torch.compiler.reset()  # after eight models it would stop compiling
    torch.manual_seed(seed)
    model = LayeredDecoder(original_config(data.vocab_size, 64, 3, 4, final_norm=protocol.final_norm))
    for layer in model.layers if compiled else ():
        layer.compile()
    trainer = UniversalTrainer(config, data.vocab_size)
    optimizer = trainer.create_optimizer(model, protocol.learning_rate)
    epochs: list[dict[str, float]] = []
    best = math.inf
    since = 0
    best_weights = model.state_dict()
    for epoch in range(protocol.epochs):
        loss, _ = trainer.train_epoch(model, data.train, optimizer, epoch=epoch, max_epochs=protocol.epochs)
        stats = trainer.evaluate(model, data.validation)
        judged = (
            token_weighted_perplexity(trainer, model, data.more) if protocol.more_validation else stats["ppl"]
        )
        epochs.append({"loss": loss, "judged": judged, **stats})
        since = 0 if judged < best else since + 1
        if judged < best:
            best = judged
            best_weights = copy.deepcopy(model.state_dict())
        if since > protocol.patience:
            break
    if protocol.patience:
        model.load_state_dict(best_weights)
    full_depth = UniversalTrainer(replace(config, routing_threshold=0), data.vocab_size)
    return {
        "method": method,
        "protocol": asdict(protocol),
        "seed": seed,
        "epochs": epochs,
        "token_weighted": token_weighted_perplexity(trainer, model, data.validation),
        "more_validation": token_weighted_perplexity(trainer, model, data.more),
        "more_validation_full_depth": token_weighted_perplexity(full_depth, model, data.more),
        "seconds": time.perf_counter() - began,
        "compiled": compiled,
        "torch": torch.__version__,
    }


def wanted() -> Iterator[tuple[str, Protocol, int]]:
    """Every run, the original's protocol first."""
    for protocol in PROTOCOLS:
        for seed in SEEDS:
            for method in METHODS if protocol in (ORIGINAL, *RATES) else EXTREMES:
                yield method, protocol, seed
    for seed in FEW_SEEDS:
        for method in METHODS if seed == FEW_SEEDS[0] else EXTREMES:
            yield method, OVERFITTED, seed


def save(runs: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(run) for run in runs)
    write_whole(RESULTS, f'{{"runs": [\n{lines}\n]}}\n')


@click.command()
@click.option("--only", multiple=True, help="A protocol by its name, may be repeated; all by default.")
@click.option(
    "--method", "methods", multiple=True, help="A method by its name, may be repeated; all by default."
)
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option(
    "--compiled", is_flag=True, help="Compile the layers: two thirds of the time, needs a C++ compiler."
)
def main(only: tuple[str, ...], methods: tuple[str, ...], threads: int, compiled: bool) -> None:
    """Do the runs that are not in the results yet, and add each as it ends."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
    done = {(run["method"], run["protocol"]["name"], run["seed"]) for run in runs}
    train = text_of("train")
    validation = text_of("validation")
    loaded = dict[int, Data]()
    for method, protocol, seed in wanted():
        left_out = (only and protocol.name not in only) or (methods and method not in methods)
        if left_out or (method, protocol.name, seed) in done:
            continue
        size = protocol.num_characters
        data = loaded[size] = loaded.get(size) or load_data(size, train, validation)
        runs.append(run(method, protocol, seed, data, compiled))
        save(runs)
        last = runs[-1]["epochs"][-1]
        figures = (
            f"{len(runs[-1]['epochs'])} epochs, perplexity {last['ppl']:.3f}, {runs[-1]['seconds']:.0f} s"
        )
        Console().print(f"{protocol.name} · {method} · seed {seed}: {figures}")


if __name__ == "__main__":
    main()
