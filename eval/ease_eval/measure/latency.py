"""Wall-clock time of the engine's own loop, settings side by side.

Every setting decodes the same texts: the prompt is a document's beginning and the tokens are the document's
own (`Given`), so the depths are those of real text and each setting does the same number of tokens. Only
`verify` goes on with the model's own greedy text: drafts that are given would all be accepted. Settings take
turns within every text, in an order that rotates, and speed-ups are ratios within a round. Warm-up rounds are
not counted.

The ideal is what the same graph calls cost when each is timed by itself: Python, binding and sampling count
against the engine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from ease_common.progress import Each, silently
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.layout import Call
from ease_runtime.engine.probe import CallProbe
from ease_runtime.engine.sampling import Given, Greedy
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.ort.stack import Stack
from ease_runtime.policies import ExitPolicy


@dataclass(frozen=True)
class Setting:
    """One row of a table: a policy (off when it has no thresholds) and a catch-up; of another bundle's engine
    where one is given.
    """

    policy: ExitPolicy
    catch_up: str
    engine: Engine | None = None


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
    drafted: int = 0  # of one round, under verify
    accepted: int = 0
    calls: list[Call] = field(default_factory=list)  # of one round's decoding


def measure(
    engine: Engine,
    settings: Sequence[Setting],
    texts: Sequence[Text],
    num_rounds: int,
    between: Callable[[], None] = lambda: None,
    each: Each = silently,
) -> tuple[list[Timings], dict[Call, float]]:
    """Time every setting on every text, `num_rounds` times after one warm-up; and each graph call by itself,
    in between.

    Whoever times something else does it `between` rounds, too.

    Returns the timings a setting, and the median seconds of every distinct call of this engine's.
    """
    timings = [Timings() for _ in settings]
    for setting, timing in zip(
        settings, timings, strict=True
    ):  # the warm-up round also records depths and calls
        for text in texts:
            _trace(engine, setting, text, timing)
    own = [timing for setting, timing in zip(settings, timings, strict=True) if setting.engine is None]
    probes = [
        CallProbe(engine.stack, call) for call in sorted({call for t in own for call in t.calls}, key=str)
    ]
    for number, place in each("texts timed", list(product(range(num_rounds), range(len(texts))))):
        if place == 0:
            for timing in timings:
                timing.rounds.append(0.0)
        for i in range(len(settings)):
            turn = (i + place + number) % len(settings)
            _decode(engine, settings[turn], texts[place], timings[turn])
        if place == len(texts) - 1:
            for probe in probes:
                probe.run()
            between()
    return timings, {probe.call: float(np.median(probe.seconds)) for probe in probes}


def _begin(engine: Engine, setting: Setting, text: Text) -> TokenSequence:
    return engine.start(
        text.tokens[: text.num_prompt],
        max_new_tokens=len(text.tokens) - text.num_prompt,
        policy=setting.policy,
        catch_up=setting.catch_up,
        sampler=Greedy() if setting.catch_up == "verify" else Given(text.tokens),
    )


def _decode(engine: Engine, setting: Setting, text: Text, timing: Timings) -> None:
    engine = setting.engine or engine
    sequence = _begin(engine, setting, text)
    clock = [time.perf_counter()]
    for _ in engine.generate(sequence):
        clock.append(time.perf_counter())
    seconds = np.diff(clock).tolist()
    timing.prefills.append(seconds[0])
    timing.token_seconds += seconds[1:]
    timing.rounds[-1] += sum(seconds[1:])


def _trace(engine: Engine, setting: Setting, text: Text, timing: Timings) -> None:
    """Decode once for the record: the depths of the tokens after the first, the calls that made them, and
    what became of drafts.
    """
    engine = setting.engine or engine
    sequence = _begin(engine, setting, text)
    depths = []
    for token in engine.generate(sequence):
        depths.append(token.depth)
        if engine.stack.trace is None:  # the prefill is over
            engine.stack.trace = timing.calls
    engine.stack.trace = None
    timing.depths += depths[1:]
    timing.drafted += sequence.drafts.judged
    timing.accepted += sequence.drafts.accepted


def time_batches(
    stack: Stack,
    settings: Sequence[Setting],
    texts: Sequence[Text],
    num_rounds: int,
    each: Each = silently,
) -> list[list[float]]:
    """Decode all texts at once in an engine with a slot for each, settings taking turns after one warm-up
    round.

    Returns tokens a second of all texts together, a list a setting: from the moment that every text has its
    first token.
    """
    engine = Engine(stack, num_slots=len(texts))
    speeds: list[list[float]] = [[] for _ in settings]
    for number in each(f"rounds of {len(texts)} texts at once", range(num_rounds + 1)):
        for i in range(len(settings)):
            turn = (i + number) % len(settings)
            speed = _decode_together(engine, settings[turn], texts)
            if number:
                speeds[turn].append(speed)
    return speeds


def _decode_together(engine: Engine, setting: Setting, texts: Sequence[Text]) -> float:
    sequences = [_begin(engine, setting, text) for text in texts]
    while not all(sequence.produced for sequence in sequences):
        engine.step()
    before = sum(len(sequence.produced) for sequence in sequences)
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - began
    return (sum(len(sequence.produced) for sequence in sequences) - before) / seconds


def ideal_seconds(calls: Sequence[Call], seconds: dict[Call, float]) -> float:
    """The time of a list of calls, each as long as it takes by itself."""
    return sum(seconds[call] for call in calls)
