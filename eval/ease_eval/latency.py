"""Wall-clock time of the engine's own loop, settings side by side.

Every setting decodes the same texts: the prompt is a document's beginning and the tokens are the document's own
(`Given`), so the depths are those of real text and each setting does the same number of tokens. Settings take turns
within every text, in an order that rotates, and speed-ups are ratios within a round. Warm-up rounds are not counted.

The ideal is what the same graph calls cost when each is timed by itself: Python, binding and sampling count against the
engine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ease_runtime.engine import Engine
from ease_runtime.policy import ExitPolicy
from ease_runtime.sampling import Given
from ease_runtime.sequence import Sequence as SequenceState
from ease_runtime.stack import Cache, Call, Stack


@dataclass(frozen=True)
class Setting:
    """One row of a table: a policy (off when it has no thresholds) and a catch-up."""

    policy: ExitPolicy
    catch_up: str


@dataclass(frozen=True)
class Text:
    """A text to decode: the first `num_prompt` tokens are the prompt, the others are decoded one by one."""

    tokens: tuple[int, ...]
    num_prompt: int


@dataclass
class Timings:
    """What a setting took: seconds by round and text. The first token of a text is prefill."""

    rounds: list[float] = field(default_factory=list)  # decoding, all texts together
    prefills: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)  # of one round's decoded tokens
    calls: list[Call] = field(default_factory=list)  # of one round's decoding


def measure(engine: Engine, settings: Sequence[Setting], texts: Sequence[Text], num_rounds: int) -> tuple[list[Timings], dict[Call, float]]:
    """Time every setting on every text, `num_rounds` times after one warm-up; and each graph call by itself, in between.

    Returns the timings a setting, and the median seconds of every distinct call.
    """
    timings = [Timings() for _ in settings]
    for setting, timing in zip(settings, timings, strict=True):  # the warm-up round also records depths and calls
        for text in texts:
            timing.depths += _trace(engine, setting, text, timing.calls)
    probes = [CallProbe(engine.stack, call) for call in sorted({call for t in timings for call in t.calls}, key=str)]
    for number in range(num_rounds):
        for timing in timings:
            timing.rounds.append(0.0)
        for place, text in enumerate(texts):
            for i in range(len(settings)):
                turn = (i + place + number) % len(settings)
                _decode(engine, settings[turn], text, timings[turn])
        for probe in probes:
            probe.run()
    return timings, {probe.call: float(np.median(probe.seconds)) for probe in probes}


def _begin(engine: Engine, setting: Setting, text: Text) -> SequenceState:
    return engine.start(
        text.tokens[: text.num_prompt],
        max_new_tokens=len(text.tokens) - text.num_prompt,
        policy=setting.policy,
        catch_up=setting.catch_up,
        sampler=Given(text.tokens),
    )


def _decode(engine: Engine, setting: Setting, text: Text, timing: Timings) -> None:
    sequence = _begin(engine, setting, text)
    clock = [time.perf_counter()]
    for _ in engine.generate(sequence):
        clock.append(time.perf_counter())
    seconds = np.diff(clock).tolist()
    timing.prefills.append(seconds[0])
    timing.token_seconds += seconds[1:]
    timing.rounds[-1] += sum(seconds[1:])


def _trace(engine: Engine, setting: Setting, text: Text, calls: list[Call]) -> list[int]:
    """Decode once for the record: the depths of the tokens after the first, and the calls that made them."""
    sequence, depths = _begin(engine, setting, text), []
    for token in engine.generate(sequence):
        depths.append(token.depth)
        if engine.stack.trace is None:  # the prefill is over
            engine.stack.trace = calls
    engine.stack.trace = None
    return depths[1:]


class CallProbe:
    """Times one graph call by itself, on whatever is in the buffers."""

    RUNS = 3  # a round

    def __init__(self, stack: Stack, call: Call) -> None:
        self.stack, self.call, self.seconds = stack, call, list[float]()

    def run(self) -> None:
        """Run the call a few times (once more to warm up) and note the seconds of each."""
        call, stack = self.call, self.stack
        rows = np.zeros(call.num_tokens, np.int64)
        out_row = stack.reserve_rows(call.num_tokens, [])
        start = max(0, call.cache_length - call.num_tokens)
        cache = stack.open_cache()
        for i in range(self.RUNS + 1):
            began = time.perf_counter()
            self._once(cache, start, rows, out_row)
            if i:
                self.seconds.append(time.perf_counter() - began)

    def _once(self, cache: Cache, start: int, rows: NDArray[np.int64], out_row: int) -> None:
        stack, number = self.stack, self.call.number
        match self.call.graph:
            case "segment" if stack.layout[number].routed:
                stack.run_routed(number, cache, start, np.arange(start, start + len(rows)), rows, out_row)
            case "segment":
                stack.run_segment(number, cache, start, rows, out_row)
            case "kv":
                stack.run_kv(number, cache, start, rows)
            case "route":
                stack.run_route(number, rows)
            case "gate":
                stack.run_gate(number, rows)
            case _:
                stack.run_exit(number, rows)


def ideal_seconds(calls: Sequence[Call], seconds: dict[Call, float]) -> float:
    """The time of a list of calls, each as long as it takes by itself."""
    return sum(seconds[call] for call in calls)
