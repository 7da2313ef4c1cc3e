"""The engine in a thread of its own, and all that only this thread touches. Knows nothing of asyncio.

Others give it commands, which it carries out between passes; what it has to say it tells its listener, a call
at a time.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ease_common.errors import EaseError, without_panics
from ease_runtime.engine.sequence import TokenSequence
from ease_runtime.generation import Choice, Generation
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from ease_runtime.server.api_error import ApiError
from ease_runtime.server.metrics import Metrics
from ease_runtime.server.shadow import Shadow
from ease_runtime.server.updates import Update
from ease_runtime.text.streaming import StopPattern

log = logging.getLogger(__name__)
EVERYBODY = "everybody"  # who has this server's key may share what others' texts begin with
CUT = "the server is shutting down: the answer was cut here"


@dataclass(eq=False)
class Job:
    """A request on its way through the engine."""

    prompts: list[list[int]]
    options: Options
    score_prompt: bool = False
    patterns: Sequence[StopPattern] = ()  # of the options' stop strings
    generations: list[Generation] = field(default_factory=list)


class Listener(Protocol):
    """Who is told of jobs. The engine's thread calls these: whoever lives elsewhere passes them on."""

    def accept(self, job: Job) -> None:
        """It has begun."""

    def refuse(self, job: Job, error: ApiError) -> None:
        """It cannot begin."""

    def deliver(self, news: list[tuple[Job, list[Update]]]) -> None:
        """What has become of some jobs in a pass."""


class EngineThread:
    """Runs the engine while there is work, from `start` to `stop`."""

    def __init__(
        self, llm: TextEngine, metrics: Metrics, listener: Listener, shadow: Shadow | None = None
    ) -> None:
        self.llm = llm
        self.metrics = metrics
        self.listener = listener
        self.shadow = shadow
        self.deadline = math.inf  # when what still runs is cut
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.jobs: dict[Choice, tuple[Job, int]] = {}
        self.thread = threading.Thread(target=self._run, name="ease-engine", daemon=True)

    # Commands, which any thread may give.

    def begin(self, job: Job) -> None:
        """Queue a job's completions."""
        self.commands.put(lambda: self._begin(job))

    def give_up(self, job: Job) -> None:
        """Forget a job, and what still runs of it."""
        self.commands.put(lambda: self._give_up(job))

    def cut_at(self, deadline: float) -> None:
        """Cut what still runs at a moment of time.monotonic()."""
        self.commands.put(lambda: setattr(self, "deadline", min(self.deadline, deadline)))

    def stop(self) -> None:
        """Cut what still runs, and return when the thread has ended."""
        self.commands.put(None)
        self.thread.join()

    # What the thread does.

    def _run(self) -> None:
        going = True
        while going:
            try:
                with without_panics():
                    going = self._obey()
                    if going and self.llm.busy and time.monotonic() >= self.deadline:
                        self._cut(CUT)
                    elif going and self.llm.busy:
                        self._step()
            except Exception as error:
                log.exception("the engine failed")
                self._cut(f"the engine failed: {error}")
        self._cut(CUT)

    def _obey(self) -> bool:
        """Carry out the commands that are there; wait for one when there is nothing else to do.

        False at the end.
        """
        while not (self.llm.busy and self.commands.empty()):
            command = self.commands.get()
            if command is None:
                return False
            command()
        return True

    def _begin(self, job: Job) -> None:
        try:
            for prompt in job.prompts:
                generation = self.llm.submit(
                    prompt,
                    job.options,
                    score_prompt=job.score_prompt,
                    patterns=job.patterns,
                    sharing=EVERYBODY,
                )
                job.generations.append(generation)
        except EaseError as error:
            self._withdraw(job)
            self.listener.refuse(job, ApiError(400, str(error)))
            return
        except Exception as error:
            log.exception("a request could not be started")
            self._withdraw(job)
            self.listener.refuse(job, ApiError(500, f"the request could not be started: {error}"))
            return
        choices = [choice for generation in job.generations for choice in generation.choices]
        self.jobs |= {choice: (job, index) for index, choice in enumerate(choices)}
        self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt in job.prompts))
        self.listener.accept(job)

    def _give_up(self, job: Job) -> None:
        self._withdraw(job)
        self.metrics.running.set(len(self.llm.engine.running))
        self.metrics.queue.set(len(self.llm.engine.waiting))

    def _withdraw(self, job: Job) -> None:
        for generation in job.generations:
            self.llm.cancel(generation)
            for choice in generation.choices:
                self.jobs.pop(choice, None)
        job.generations = []

    def _step(self) -> None:
        read = self.llm.step()
        engine = self.llm.engine
        depths = (event.depth for _, events in read for event in events)
        self.metrics.note_pass(engine.num_rows, len(engine.running), len(engine.waiting), depths)
        news: dict[Job, list[Update]] = {}
        for choice, events in read:
            if not events and choice.finish_reason is None:
                continue
            job, index = self.jobs[choice]
            news.setdefault(job, []).append(Update.of(index, choice, events))
            if choice.finish_reason is not None:
                self._note_end(choice.sequence)
                del self.jobs[choice]
        if news:
            self.listener.deliver(list(news.items()))
        if self.shadow and self.shadow.look():
            self.metrics.note_shadow(self.shadow.risk or 0.0, bool(self.shadow.drift))

    def _note_end(self, sequence: TokenSequence) -> None:
        self.metrics.shared_tokens.inc(sequence.num_shared)
        for drafter, count in sequence.drafts.counts.items():
            self.metrics.drafted.labels(drafter).inc(count.judged)
            self.metrics.accepted.labels(drafter).inc(count.accepted)
        if self.shadow:
            self.shadow.consider(sequence)

    def _cut(self, message: str) -> None:
        """End everything that runs, with an error."""
        news: dict[Job, list[Update]] = {}
        for job, index in self.jobs.values():
            news.setdefault(job, []).append(Update(index, [], "error", message))
        for job in news:
            self._withdraw(job)
        for sequence in [*self.llm.engine.waiting, *self.llm.engine.sequences]:
            self.llm.engine.release(sequence)
        self.llm.engine.cache.scrub()  # a pass that broke off may have left anything
        if news:
            self.listener.deliver(list(news.items()))
