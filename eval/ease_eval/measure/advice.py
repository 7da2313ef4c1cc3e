"""Where should exits be? What graph calls cost here, what leaving early would save at those prices, and which
exits are worth it.

    advice = advise(llm, documents, texts, settings, tolerance=0.05, num_rounds=5)

The cost model (ease_runtime/engine/costs.py) knows single calls, timed by themselves, and one figure of the
engine's own work a pass, taken from full depth. It predicts the time of a token from how deep tokens go, as
if each left independently of the others; the prediction stands beside the measurement of the same run. Which
tokens would leave where, for every set of the bundle's early exits, is read off one pass over the text in
which every exit speaks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError
from ease_eval.measure.latency import Setting, Text, Timings, measure
from ease_eval.measure.perplexity import record_exits
from ease_runtime.engine.costs import Costs, Key, timed_sizes
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.layout import Call
from ease_runtime.engine.probe import CallProbe
from ease_runtime.engine.sampling import Given
from ease_runtime.llm import LLM
from ease_runtime.ort.stack import Cache, Stack
from ease_runtime.policies import FULL_DEPTH, ExitPolicy, make_policy
from ease_runtime.policies.thresholds import Thresholds

Floats = NDArray[np.float64]

POLICIES = ("max-prob", "margin", "entropy", "similarity", "gate")
OWN_TOKENS = 16  # that the engine's own time is taken from, a round
CYCLES = 8  # that calls are timed in, a round
MOST_EXITS = 3  # early exits of a set, once all sets would be more than MOST_SETS
MOST_SETS = 256
GRID = (*np.linspace(0.0, 0.98, 50).tolist(), 0.99, 0.995, 0.999, 1.0)  # thresholds that are tried


class CostProbe:
    """Times calls as tokens make them, a round at a time. Raises RequestError for routed layers."""

    def __init__(self, engine: Engine, policy: ExitPolicy, text: Text) -> None:
        cache_length = (text.num_prompt + len(text.tokens)) // 2
        stack = engine.stack
        last = len(engine.stack.exit_layers) - 1
        if any(shape.routed for shape in stack.layout):
            raise RequestError(
                "the cost model does not know routed layers: their cost depends on which tokens go in"
            )
        asked = {
            k: asks(stack, shape.exit_index, policy)
            for k, shape in enumerate(stack.layout)
            if shape.exit_index not in (None, last)
        }
        numbers = range(len(stack.layout))
        sizes = self.sizes = timed_sizes(stack.kernel_steps)
        self.engine = engine
        self.text = text
        self.full = [
            Cycle([*(Call("segment", k, size, cache_length) for k in numbers), Call("exit", last, 1)])
            for size in sizes
        ]
        self.behind = [
            Cycle([call for k in numbers for call in behind(k, size, cache_length, asked)]) for size in sizes
        ]
        first = [("segment", 0), *asked.get(0, [])]
        self.first = Cycle([Call(graph, number, 1, cache_length) for graph, number in first])
        self.cache = stack.open_cache(1)
        self.rows = np.zeros(max(sizes), np.int64)
        self.own_seconds: list[float] = []  # the engine's, a token at full depth

    def run(self) -> None:
        """One round."""
        out_row = self.engine.stack.reserve_rows(2 * max(self.sizes), [])
        for cycle in (*self.full, *self.behind, self.first):
            cycle.run(self.engine.stack, self.cache, self.rows, out_row)
        self.own_seconds += own_seconds(self.engine.stack, self.text)

    def costs(self) -> Costs:
        """What the calls and the engine took."""
        tables: dict[Key, list[float]] = {}
        for size, full, part in zip(self.sizes, self.full, self.behind, strict=True):
            for key, seconds in [
                *full.medians(size),
                *(pair for pair in part.medians(size) if pair[0][0] != "segment"),
            ]:
                tables.setdefault(key, []).append(seconds)
        increasing = {
            key: np.maximum.accumulate(values) for key, values in tables.items()
        }  # more tokens take no less time
        own = float(np.median(self.own_seconds)) / len(self.engine.stack.layout)
        return Costs(
            self.engine.stack.layout,
            increasing,
            again=dict(self.first.medians(1)),
            pass_seconds=own,
            sizes=self.sizes,
        )


class TimedStack:
    """A stack that counts the seconds inside of the calls that full depth makes."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.seconds = 0.0
        self.run_segment = self._timed(stack.run_segment)
        self.exits = [replace(leave, head=self._timed(leave.head)) for leave in stack.exits]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stack, name)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = run(*arguments)
            self.seconds += time.perf_counter() - began
            return result

        return call


def own_seconds(stack: Stack, text: Text) -> list[float]:
    """What the engine itself takes of each decoded token's time at full depth: all that passes outside of the
    stack's calls.
    """
    timed: Any = TimedStack(stack)
    engine = Engine(timed)
    own = list[float]()
    began = None
    length = min(len(text.tokens) - text.num_prompt, OWN_TOKENS)
    for _ in engine.generate(
        engine.start(text.tokens[: text.num_prompt], max_new_tokens=length, sampler=Given(text.tokens))
    ):
        if began is not None:  # the first token is prefill
            own.append(time.perf_counter() - began - timed.seconds)
        began = time.perf_counter()
        timed.seconds = 0.0
    return own


class Cycle:
    """Calls that run one after the other, again and again."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.seconds = calls, list[list[float]]()  # a list a cycle, a figure a call

    def run(self, stack: Stack, cache: Cache, rows: NDArray[np.int64], out_row: int) -> None:
        """A few cycles, after one to warm up."""
        probes = [CallProbe(stack, call) for call in self.calls]
        for number in range(CYCLES + 1):
            clock = [time.perf_counter()]
            for probe in probes:
                probe.once(cache, rows[: probe.call.num_tokens], out_row)
                stack.wait()
                clock.append(time.perf_counter())
            if number:
                self.seconds.append(np.diff(clock).tolist())

    def medians(self, size: int) -> list[tuple[Key, float]]:
        """What each call over `size` tokens took."""
        best = np.median(np.array(self.seconds), axis=0).tolist()
        return [
            ((call.graph, call.number), found)
            for call, found in zip(self.calls, best, strict=True)
            if call.num_tokens == size
        ]


def asks(stack: Stack, exit_index: int | None, policy: ExitPolicy) -> list[Key]:
    """What an early exit may be asked, in order: its own layer, then a gate or a similarity, then
    its head.
    """
    assert exit_index is not None, "only an exit is asked"
    before: list[Key] = [("block", exit_index)] if stack.exits[exit_index].block is not None else []
    if policy.asks != "head":
        before.append((policy.asks, exit_index if policy.asks == "gate" else 0))
    return [*before, ("exit", exit_index)]


def behind(k: int, size: int, cache_length: int, asked: dict[int, list[Key]]) -> list[Call]:
    """What a token makes of a segment under `propagate`: K/V of `size` pending ones, itself, and what the
    exit is asked.
    """
    kv = [Call("kv", k, size, cache_length)] if k else []
    exits = [
        Call(graph, number, size if graph == "block" else 1, cache_length)
        for graph, number in asked.get(k, [])
    ]
    return [*kv, Call("segment", k, 1, cache_length), *exits]


def reach_of(depths: NDArray[np.int64], stack: Stack) -> list[float]:
    """The share of the tokens that go into each segment before they leave. Shape: depths (tokens)."""
    before = np.cumsum([0, *(shape.num_layers for shape in stack.layout)])[:-1]
    return [float((depths > layers).mean()) for layers in before]


@dataclass(frozen=True)
class Prediction:
    """A setting's speed-up over full depth, predicted from the depths of its tokens, and measured."""

    threshold: Thresholds
    catch_up: str
    mean_depth: float
    predicted_speedup: float
    measured_speedup: float
    error: float  # predicted / measured - 1


@dataclass(frozen=True)
class ExitSuitability:
    """What one exit of the model is good for as it stands."""

    layer: int
    agreement: float  # share of the tokens that full depth would say the same
    mean_confidence: float | None  # None: full depth
    confidence_when_right: float | None  # mean, over the tokens that full depth would say the same
    confidence_when_wrong: float | None
    separation: float | None  # chance that a right token has more confidence than a wrong one (AUROC)
    perplexity: float


@dataclass(frozen=True)
class Placement:
    """One set of early exits: the best threshold within the tolerance, what it would give, and the bound of a
    perfect rule.
    """

    exits: list[int]  # layers
    threshold: float | None  # None: none holds the tolerance
    disagreement: float
    mean_depth: float
    predicted_speedup: float
    oracle_mean_depth: float
    oracle_speedup: float  # had each token left at the first exit of the set that says what full depth says


@dataclass(frozen=True)
class Advice:
    """All that is said, placements from the fastest to the slowest."""

    policy: str
    catch_up: str
    tolerance: float
    num_tokens: int
    suitability: float  # share of the layers that an oracle over all exits would save
    exits: list[ExitSuitability]
    placements: list[Placement]
    predictions: list[Prediction]
    call_ms: dict[
        str, list[float]
    ]  # by graph and number, in turn with others, at 1, 2, 4, 8, 16 tokens (or at 1)
    again_ms: dict[str, float]  # of one token up to the first exit, straight after another
    pass_ms: float


def advise(
    llm: LLM,
    documents: Sequence[Sequence[int]],
    texts: Sequence[Text],
    settings: Sequence[Setting],
    tolerance: float,
    num_rounds: int,
) -> Advice:
    """Measure costs and exits of a bundle; the first setting is off.

    Raises RequestError where there is nothing to advise on.
    """
    layers = llm.stack.exit_layers
    if len(layers) == 1:
        raise RequestError(
            "this bundle has no early exit; put some in first: ease-train import --exits, or ease-train tune"
        )
    if len(settings) < 2:
        raise RequestError(
            "advice needs a setting beside full depth to compare with; give a threshold: --thresholds 0.5"
        )
    if not 0.0 <= tolerance <= 1.0:
        raise RequestError(f"tolerance {tolerance} is outside [0, 1]")
    policy = settings[1].policy
    catch_up = settings[1].catch_up
    if policy.name not in POLICIES:
        raise RequestError(
            f"policy '{policy.name}' has no confidence of an exit by itself; use one of: "
            f"{', '.join(POLICIES)}"
        )
    for setting in settings:
        llm.engine.check(setting.policy, setting.catch_up)
        if setting.catch_up == "verify":
            raise RequestError(
                "the cost model knows propagate and recompute; verify adapts its drafts by itself"
            )
    probe = CostProbe(llm.engine, policy, texts[0])
    timings, _ = measure(llm.engine, settings, texts, num_rounds, between=probe.run)
    costs = probe.costs()
    everything = make_policy(policy.name, 1.0, layers)
    confidences, early, full = record_exits(llm.engine, documents, everything)
    agrees = np.array([scores.says == full.says for scores in early])
    figures = [
        suitability(layers[k], confidences[k], agrees[k], early[k].perplexity) for k in range(len(early))
    ]
    figures.append(ExitSuitability(layers[-1], 1.0, None, None, None, None, full.perplexity))
    oracle = depths_of(agrees, layers, range(len(early)))
    return Advice(
        policy=policy.name,
        catch_up=catch_up,
        tolerance=tolerance,
        num_tokens=len(full.says),
        suitability=1.0 - float(oracle.mean()) / layers[-1],
        exits=figures,
        placements=placements(llm.engine, costs, policy.name, catch_up, confidences, agrees, tolerance),
        predictions=[
            predict(llm.engine, costs, s, t, timings[0])
            for s, t in zip(settings[1:], timings[1:], strict=True)
        ],
        call_ms={
            f"{graph} {number + 1}": (1000 * table).tolist()
            for (graph, number), table in costs.tables.items()
        },
        again_ms={f"{graph} {number + 1}": 1000 * value for (graph, number), value in costs.again.items()},
        pass_ms=1000 * costs.pass_seconds,
    )


def predict(engine: Engine, costs: Costs, setting: Setting, timing: Timings, off: Timings) -> Prediction:
    """The model's speed-up at the depths of a run's tokens, beside the run's."""
    depths = np.array(timing.depths)
    full = costs.token_seconds([1.0] * len(costs.layout), FULL_DEPTH, "recompute")
    predicted = full / costs.token_seconds(
        reach_of(depths, engine.stack), setting.policy, setting.catch_up, cap=engine.cap
    )
    measured = float(np.median([a / b for a, b in zip(off.rounds, timing.rounds, strict=True)]))
    return Prediction(
        setting.policy.thresholds,
        setting.catch_up,
        float(depths.mean()),
        predicted,
        measured,
        predicted / measured - 1.0,
    )


def suitability(
    layer: int, confidence: Floats, agrees: NDArray[np.bool_], perplexity: float
) -> ExitSuitability:
    """An early exit's figures. Shapes: (tokens)."""
    right = confidence[agrees]
    wrong = confidence[~agrees]
    return ExitSuitability(
        layer=layer,
        agreement=float(agrees.mean()),
        mean_confidence=float(confidence.mean()),
        confidence_when_right=float(right.mean()) if len(right) else None,
        confidence_when_wrong=float(wrong.mean()) if len(wrong) else None,
        separation=auroc(right, wrong),
        perplexity=perplexity,
    )


def auroc(right: Floats, wrong: Floats) -> float | None:
    """Chance that one of `right` is larger than one of `wrong`, equals counting half; None where one is
    empty.
    """
    if not len(right) or not len(wrong):
        return None
    wrong = np.sort(wrong)
    below = np.searchsorted(wrong, right, "left")
    up_to = np.searchsorted(wrong, right, "right")
    return float((below + up_to).mean() / (2 * len(wrong)))


def exit_sets(num_early: int) -> list[tuple[int, ...]]:
    """Every set of early exits, the small ones first; of at most MOST_EXITS where all would be more than
    MOST_SETS.
    """
    most = num_early if 2**num_early <= MOST_SETS else MOST_EXITS
    return [chosen for size in range(1, most + 1) for chosen in combinations(range(num_early), size)]


def depths_of(leaves: NDArray[np.bool_], layers: Sequence[int], chosen: Sequence[int]) -> NDArray[np.int64]:
    """Each token's depth, were it to leave at the first of the chosen exits where it may.

    Shape: (early exits, tokens) -> (tokens).
    """
    depths = np.full(leaves.shape[1], layers[-1], np.int64)
    for k in reversed(chosen):
        depths[leaves[k]] = layers[k]
    return depths


def placements(
    engine: Engine,
    costs: Costs,
    name: str,
    catch_up: str,
    confidences: Floats,
    agrees: NDArray[np.bool_],
    tolerance: float,
) -> list[Placement]:
    """Every set of exits, the fastest first. Shapes: (early exits, tokens)."""
    layers = engine.stack.exit_layers
    full = costs.token_seconds([1.0] * len(costs.layout), FULL_DEPTH, catch_up)
    found = []
    for chosen in exit_sets(len(agrees)):
        policy = make_policy(name, [1.0 if k in chosen else None for k in range(len(agrees))], layers)

        def speedup(depths: NDArray[np.int64], policy: ExitPolicy = policy) -> float:
            return full / costs.token_seconds(
                reach_of(depths, engine.stack), policy, catch_up, cap=engine.cap
            )

        oracle = depths_of(agrees, layers, chosen)
        threshold, depths, wrong = best_threshold(confidences, agrees, layers, chosen, tolerance)
        found.append(
            Placement(
                exits=[layers[k] for k in chosen],
                threshold=threshold,
                disagreement=wrong,
                mean_depth=float(depths.mean()),
                predicted_speedup=speedup(depths) if threshold is not None else 1.0,
                oracle_mean_depth=float(oracle.mean()),
                oracle_speedup=speedup(oracle),
            )
        )
    return sorted(found, key=lambda one: -one.predicted_speedup)


def best_threshold(
    confidences: Floats,
    agrees: NDArray[np.bool_],
    layers: Sequence[int],
    chosen: Sequence[int],
    tolerance: float,
) -> tuple[float | None, NDArray[np.int64], float]:
    """The lowest threshold of GRID whose disagreement with full depth is within the tolerance, its depths and
    its disagreement.
    """
    for threshold in GRID:
        leaves = confidences >= np.float32(threshold)
        depths = depths_of(leaves, layers, chosen)
        wrong = 0.0
        for k in chosen:
            wrong += float((~agrees[k] & (depths == layers[k])).mean())
        if wrong <= tolerance and (depths < layers[-1]).any():
            return float(threshold), depths, wrong
    return None, np.full(agrees.shape[1], layers[-1], np.int64), 0.0
