"""The engine against what its own graph calls cost: forced depth, verify, batches, memory.

    python bench/engine.py BUNDLE [--only depth,verify,adapt,batch,scaling,memory] [--json FILE]
    python bench/engine.py BUNDLE --only verify --draft-exit 4 --acceptance 0.8

Exits are scripted, so random weights will do. Settings take turns within a round; figures are medians over
rounds, speed-ups are ratios within a round. "ideal" is the sum of the calls, each timed by itself.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from ease_eval.measure.latency import Setting, Text, ideal_seconds, measure
from ease_runtime.engine.costs import Costs, RequestCost
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.probe import measure_costs
from ease_runtime.engine.sampling import Greedy
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.ort.device import DEVICES
from ease_runtime.ort.stack import OrtStack, open_stack
from ease_runtime.policies import FULL_DEPTH, ThresholdPolicy, make_policy
from ease_runtime.policies.thresholds import Thresholds

PROMPT = 32
NEW = 48
LONG = 256
ROUNDS = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Coin(ThresholdPolicy):
    """Leaves at each exit that is asked with a probability, whatever the exit says."""

    probability: float = 0.5
    dice: random.Random = field(default_factory=random.Random)

    def leaves(self, exit_index: int, confidence: Any, progress: float, state: Any) -> Any:
        return confidence >= (0.0 if self.dice.random() < self.probability else 2.0)


class Agreeing:
    """A sampler whose second choice for a position, full depth's, is its first one with a probability."""

    def __init__(self, acceptance: float, vocab_size: int, seed: int) -> None:
        self.acceptance = acceptance
        self.vocab_size = vocab_size
        self.dice = random.Random(seed)
        self.drafts: dict[int, int] = {}

    def pick(self, logits: Any, top_id: int, tokens: Any, position: int) -> int:
        if position not in self.drafts:
            self.drafts[position] = self.dice.randrange(self.vocab_size)
            return self.drafts[position]
        if self.dice.random() < self.acceptance:
            return self.drafts[position]
        draft = self.drafts[position]
        self.drafts = {place: token for place, token in self.drafts.items() if place < position}
        return (draft + 1) % self.vocab_size


def prompt_ids(stack: OrtStack, seed: int, length: int = PROMPT) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(stack.vocab_size) for _ in range(length)]


def half_exit(stack: OrtStack) -> int:
    """The early exit (from 0) nearest to half the layers."""
    return min(
        range(len(stack.exit_layers) - 1), key=lambda k: abs(stack.exit_layers[k] - stack.exit_layers[-1] / 2)
    )


def only(stack: OrtStack, exit_index: int) -> Thresholds:
    """Thresholds that ask one exit."""
    return Thresholds(tuple(0.5 if k == exit_index else None for k in range(len(stack.exit_layers) - 1)))


def depth(stack: OrtStack) -> list[Row]:
    """Every token leaves at one exit: measured against ideal, which counts heads and catch-up."""
    layers = stack.exit_layers
    settings = [Setting(FULL_DEPTH, "recompute")]
    settings += [
        Setting(make_policy("fixed", None, layers, exit_layer=layer), catch_up)
        for layer in layers[:-1]
        for catch_up in ("recompute", "propagate")
    ]
    texts = [Text(tuple(prompt_ids(stack, seed, PROMPT + NEW)), PROMPT) for seed in range(2)]
    timings, seconds = measure(Engine(stack), settings, texts, ROUNDS)
    off = timings[0]
    rows = []
    for setting, timing in zip(settings, timings, strict=True):
        speedup = statistics.median(a / b for a, b in zip(off.rounds, timing.rounds, strict=True))
        ideal = ideal_seconds(off.calls, seconds) / ideal_seconds(timing.calls, seconds)
        rows.append(
            {
                "depth": statistics.mean(timing.depths),
                "catch_up": setting.catch_up if setting.policy.thresholds else "off",
                "tokens_per_second": len(timing.depths) / statistics.median(timing.rounds),
                "speedup": speedup,
                "ideal_speedup": ideal,
                "measured_over_ideal": speedup / ideal,
                "ideal_seconds_over_measured": ideal_seconds(timing.calls, seconds)
                / statistics.median(timing.rounds),
            }
        )
    return rows


def run_to_end(engine: Engine, sequences: list[TokenSequence]) -> float:
    """Seconds from the first pass after every prompt has run; the tokens before are not counted."""
    while any(s.prefilling or s.slot is None for s in sequences[: engine.num_slots]):
        engine.step()
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - began


def verify(
    stack: OrtStack, exit_layer: int | None = None, acceptances: Sequence[float] = (0.6, 0.8, 0.9)
) -> list[Row]:
    """Every token drafted at one exit, by default at half depth, and accepted with a probability: measured
    against the cost model.
    """
    costs = measure_costs(stack)
    exit_index = half_exit(stack) if exit_layer is None else stack.exit_layers.index(exit_layer)
    rows = []
    policy = Coin(thresholds=only(stack, exit_index), probability=1.0)
    for acceptance in acceptances:
        request_cost = RequestCost(costs, policy, "verify")
        request_cost.entered = [
            1.0 if k <= exit_segment(stack, exit_index) else 0.0 for k in range(len(stack.layout))
        ]
        request_cost.drafted = [1.0] * len(stack.layout)
        request_cost.accepted = [acceptance] * len(stack.layout)
        length = max(1, request_cost.draft_length(1))
        tokens = (1.0 - acceptance ** (length + 1)) / (1.0 - acceptance)
        predicted = tokens / request_cost.cycle(length, 1) * request_cost.full_depth(1)
        rounds = []
        for seed in range(ROUNDS):
            off = Engine(stack)
            drafted = Engine(stack, draft_length=length)
            plain = off.start(prompt_ids(stack, seed), max_new_tokens=NEW)
            seconds = run_to_end(off, [plain]) / (len(plain.produced) - 1)
            sampler = Agreeing(acceptance, stack.vocab_size, seed)
            sequence = drafted.start(
                prompt_ids(stack, seed), max_new_tokens=NEW, policy=policy, catch_up="verify", sampler=sampler
            )
            rounds.append(seconds / (run_to_end(drafted, [sequence]) / (len(sequence.produced) - 1)))
        speedup = statistics.median(rounds)
        rows.append(
            {
                "acceptance": acceptance,
                "accepted": sequence.drafts.accepted / sequence.drafts.judged,
                "draft_length": length,
                "layer": stack.exit_layers[exit_index],
                "draft_ms": 1000 * request_cost.draft(1),
                "head_ms": 1000 * costs.seconds("exit", exit_index, 1),
                "full_depth_ms": 1000 * request_cost.full_depth(1),
                "speedup": speedup,
                "range": [min(rounds), max(rounds)],
                "model_speedup": predicted,
                "measured_over_model": speedup / predicted,
                "break_even_acceptance": break_even(request_cost),
            }
        )
    return rows


def exit_segment(stack: OrtStack, exit_index: int) -> int:
    return next(k for k, shape in enumerate(stack.layout) if shape.exit_index == exit_index)


def break_even(request_cost: RequestCost) -> float | None:
    """The smallest acceptance at which some draft length is as fast as full depth, to 0.01; None when none
    is.
    """
    count = len(request_cost.entered)
    request_cost.drafted = [1.0] * count
    for percent in range(1, 100):
        request_cost.accepted = [percent / 100] * count
        if request_cost.draft_length(1):
            return percent / 100
    return None


def token_seconds(engine: Engine, sequence: TokenSequence) -> float:
    """Seconds until a sequence has more tokens."""
    had = len(sequence.produced)
    began = time.perf_counter()
    while sequence.finish_reason is None and len(sequence.produced) == had:
        engine.step()
    return time.perf_counter() - began


def adapt(stack: OrtStack) -> list[Row]:
    """Early exits that do not pay, and some that do, with the engine free to give them up: 256 tokens against
    as many at full depth.

    Until it gives up a request runs by itself, then the same tokens at full depth do; after that the two take
    turns token by token.
    """
    costs = measure_costs(stack)
    exit_index = half_exit(stack)
    rows = []
    cases = [("verify", 1.0, acceptance) for acceptance in (0.2, 0.5, 0.9)] + [
        ("recompute", leaving, 1.0) for leaving in (0.05, 0.2, 0.8)
    ]
    for catch_up, leaving, acceptance in cases:
        speedups = []
        before = []
        after = []
        for seed in range(ROUNDS):
            plain_engine = Engine(stack)
            engine = Engine(stack, adapt=True)
            engine.costs = costs
            policy = Coin(thresholds=only(stack, exit_index), probability=leaving, dice=random.Random(seed))
            sampler = Agreeing(acceptance, stack.vocab_size, seed) if catch_up == "verify" else Greedy()
            sequence = engine.start(
                prompt_ids(stack, seed),
                max_new_tokens=LONG,
                policy=policy,
                catch_up=catch_up,
                sampler=sampler,
            )
            token_seconds(engine, sequence)  # the prompt
            mine, theirs = [0.0, 0.0], [0.0, 0.0]  # before it gives up, after
            while sequence.finish_reason is None and not sequence.notes:
                mine[0] += token_seconds(engine, sequence)
            plain = plain_engine.start(prompt_ids(stack, seed), max_new_tokens=LONG)
            token_seconds(plain_engine, plain)
            while len(plain.produced) < len(sequence.produced):
                theirs[0] += token_seconds(plain_engine, plain)
            while sequence.finish_reason is None:
                mine[1] += token_seconds(engine, sequence)
                theirs[1] += token_seconds(plain_engine, plain)
            speedups.append(sum(theirs) / sum(mine))
            before.append(theirs[0] / mine[0])
            after += [theirs[1] / mine[1]] if mine[1] else []
        early = sum(token.depth < stack.exit_layers[-1] for token in sequence.produced)
        rows.append(
            {
                "catch_up": catch_up,
                "leaving": leaving,
                "acceptance": acceptance,
                "speedup": statistics.median(speedups),
                "slowest": min(speedups),
                "before_giving_up": statistics.median(before),
                "after_giving_up": statistics.median(after) if after else None,
                "share_early": early / len(sequence.produced),
            }
        )
    return rows


def batch(stack: OrtStack) -> list[Row]:
    """Eight rows that leave at half depth with probability 0.5: against eight at full depth, and against the
    best schedule.
    """
    costs = measure_costs(stack)
    thresholds = only(stack, half_exit(stack))
    rows = []
    for name, num_requests in (("8 rows", 8), ("32 requests over 8 slots", 32)):
        ratios: dict[str, list[float]] = {"propagate": [], "recompute": []}
        for seed in range(ROUNDS):
            full, _ = tokens_a_second(stack, num_requests, seed, None, "recompute")
            for catch_up in ratios:
                early, _ = tokens_a_second(stack, num_requests, seed, thresholds, catch_up)
                ratios[catch_up].append(early / full)
        for catch_up, found in ratios.items():
            changed = involuntary(stack, num_requests, thresholds, catch_up)
            best = best_schedule(stack, costs, catch_up)
            measured = statistics.median(found)
            rows.append(
                {
                    "requests": name,
                    "catch_up": catch_up,
                    "speedup": measured,
                    "best_schedule": best,
                    "of_best": measured / best,
                    "involuntary": changed,
                }
            )
    return rows


def involuntary(stack: OrtStack, num_requests: int, thresholds: Thresholds, catch_up: str) -> int:
    """Tokens that left or stayed because of their neighbours: depths in the batch that are not those of the
    same request alone.
    """
    count = min(num_requests, 8)
    _, together = tokens_a_second(stack, count, 0, thresholds, catch_up)
    changed = 0
    for i, sequence in enumerate(together):
        engine = Engine(stack)
        policy = Coin(thresholds=thresholds, dice=random.Random(i))
        alone = engine.start(prompt_ids(stack, i), max_new_tokens=NEW, policy=policy, catch_up=catch_up)
        run_to_end(engine, [alone])
        changed += sum(a.depth != b.depth for a, b in zip(sequence.produced, alone.produced, strict=True))
    return changed


def tokens_a_second(
    stack: OrtStack,
    num_requests: int,
    seed: int,
    thresholds: Thresholds | None,
    catch_up: str,
    num_slots: int = 8,
    probability: float = 0.5,
) -> tuple[float, list[TokenSequence]]:
    """Decoding speed of a batch, and its rows. More requests than slots have different lengths.

    Rows leave at an exit that is asked with `probability`.
    """
    engine = Engine(stack, num_slots=num_slots)
    dice = random.Random(seed)
    sequences = []
    for i in range(num_requests):
        policy = (
            FULL_DEPTH
            if thresholds is None
            else Coin(thresholds=thresholds, probability=probability, dice=random.Random(1000 * seed + i))
        )
        new = NEW if num_requests <= num_slots else dice.randint(NEW // 2, NEW)
        sequences.append(
            engine.start(prompt_ids(stack, i), max_new_tokens=new, policy=policy, catch_up=catch_up)
        )
    seconds = run_to_end(engine, sequences)
    return (sum(len(s.produced) for s in sequences) - num_slots) / seconds, sequences


def best_schedule(
    stack: OrtStack, costs: Costs, catch_up: str, num_rows: int = 8, num_passes: int = 20000
) -> float:
    """Speed-up over full depth of the best rule "go deep when m rows wait", simulated at the measured costs,
    for a closed set of rows.
    """
    return max(
        simulate(stack, costs, catch_up, num_rows, waiting, num_passes) for waiting in range(1, num_rows + 1)
    )


def simulate(
    stack: OrtStack, costs: Costs, catch_up: str, num_rows: int, waiting: int, num_passes: int
) -> float:
    exit_index = half_exit(stack)
    cut = exit_segment(stack, exit_index) + 1
    last = len(stack.exit_layers) - 1
    dice = random.Random(0)
    need = [False] * num_rows
    pending = [0] * num_rows
    seconds = 0.0
    tokens = 0
    for _ in range(num_passes):
        deep = [i for i in range(num_rows) if need[i]]
        shallow = [i for i in range(num_rows) if not need[i]]
        going = deep if len(deep) >= waiting or not shallow else shallow
        span = going[-1] - going[0] + 1
        if going is shallow:
            seconds += sum(costs.seconds("segment", k, len(going), span) for k in range(cut))
            seconds += costs.seconds("exit", exit_index, len(going))
            for i in going:
                need[i] = dice.random() >= 0.5
                pending[i] += not need[i]
                tokens += not need[i]
            continue
        owed = sum(pending[i] for i in going)
        for k in range(cut, len(stack.layout)):
            entering = len(going) + (owed if catch_up == "recompute" else 0)
            seconds += costs.seconds("segment", k, entering, span)
            if catch_up == "propagate" and owed:
                seconds += costs.seconds("kv", k, owed)
        seconds += costs.seconds("exit", last, len(going))
        tokens += len(going)
        for i in going:
            need[i] = False
            pending[i] = 0
    full = sum(
        costs.seconds("segment", k, num_rows, num_rows) for k in range(len(stack.layout))
    ) + costs.seconds("exit", last, num_rows)
    return full / num_rows / (seconds / tokens)


def scaling(stack: OrtStack) -> list[Row]:
    """More and more rows together, all of which leave at one exit, the last one being full depth."""
    rows = []
    for exit_index, layer in enumerate(stack.exit_layers):
        thresholds = only(stack, exit_index) if layer < stack.exit_layers[-1] else None
        found: dict[int, list[float]] = {1: [], 8: [], 32: []}
        for seed in range(ROUNDS):
            for num_rows, speeds in found.items():
                speed, _ = tokens_a_second(stack, num_rows, seed, thresholds, "propagate", num_rows, 1.0)
                speeds.append(speed)
        medians = {num_rows: statistics.median(speeds) for num_rows, speeds in found.items()}
        rows += [
            {"layer": layer, "rows": n, "tokens_per_second": speed, "over_one_row": speed / medians[1]}
            for n, speed in medians.items()
        ]
    return rows


def memory(stack: OrtStack) -> list[Row]:
    """Bytes of the process while eight rows fill their caches, and what growing them copied.

    `mapped` are pages of files that the system can take back: libraries, and the embedding's rows that
    prompts have touched.
    """
    process = psutil.Process()
    before = psutil.Process().memory_info().rss
    engine = Engine(stack, num_slots=8)
    room = min(stack.max_positions, 512)
    sequences = [engine.start(prompt_ids(stack, i, room // 2), max_new_tokens=room // 2) for i in range(8)]
    while len(engine.running) == 8 or engine.waiting:
        engine.step()
    length = max(len(s.tokens) for s in sequences)
    layers = stack.manifest.num_layers
    caches = layers * 2 * 8 * length * stack.manifest.kv_dim * 4
    weights = sum(info.num_bytes for name, info in stack.manifest.files.items() if name.endswith(".data"))
    after = process.memory_info()
    return [
        {
            "tokens_a_row": length,
            "weights_mb": weights / 1e6,
            "loaded_mb": before / 1e6,
            "caches_mb": caches / 1e6,
            "after_mb": after.rss / 1e6,
            "mapped_mb": after.shared / 1e6,
            "after_over_weights_and_caches": after.rss / (weights + caches),
            "unmapped_over_weights_and_caches": (after.rss - after.shared) / (weights + caches),
            "copied_over_caches": engine.cache.copied_bytes / caches,  # type: ignore[attr-defined]
        }
    ]


SECTIONS: dict[str, Callable[..., list[Row]]] = {
    "depth": depth,
    "verify": verify,
    "adapt": adapt,
    "batch": batch,
    "scaling": scaling,
    "memory": memory,
}


def show(name: str, rows: list[Row], console: Console) -> None:
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--only", "names", default=",".join(SECTIONS), help=f"Some of: {', '.join(SECTIONS)}.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--threads", default=0, help="CPU threads; 0 takes all.")
@click.option("--draft-exit", type=int, help="Layer of the exit that drafts, for verify; that of half depth.")
@click.option("--acceptance", type=float, multiple=True, help="For verify; may be repeated.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
def main(
    bundle: Path,
    names: str,
    device: str,
    threads: int,
    draft_exit: int | None,
    acceptance: tuple[float, ...],
    json_file: Path | None,
) -> None:
    """Measure the engine on a bundle with scripted exits."""
    stack = open_stack(bundle, device=device, num_threads=threads)
    results = {}
    for name in names.split(","):
        asked = {"exit_layer": draft_exit} | ({"acceptances": acceptance} if acceptance else {})
        results[name] = SECTIONS[name](stack, **(asked if name == "verify" else {}))
        show(name, results[name], Console())
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps(
                {
                    "bundle": str(bundle),
                    "device": stack.device.name,
                    "threads": threads,
                    "captured": stack.captured()._asdict(),
                    **results,
                },
                indent=2,
            )
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
