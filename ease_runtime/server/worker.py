"""The engine in a thread of its own: requests go in by a queue, tokens come out to asyncio.

Nobody else touches the engine. What the event loop sees of a request is its Ticket.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ease_runtime.errors import EaseError
from ease_runtime.generation import Choice, Generation, TokenEvent
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from ease_runtime.server.errors import ApiError
from ease_runtime.server.metrics import Metrics
from ease_runtime.server.shadow import Shadow

log = logging.getLogger(__name__)
LONGEST_RETRY = 60  # seconds that a refused client is told to wait at most
CUT = "the server is shutting down: the answer was cut here"


@dataclass(frozen=True)
class Update:
    """News of one completion: its new tokens, and how it ended once it has."""

    index: int
    events: list[TokenEvent]
    finish_reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Ticket:
    """A request on its way. `inbox` gets lists of updates; None when the client has gone."""

    prompts: list[list[int]]
    options: Options
    inbox: asyncio.Queue[list[Update] | None] = field(default_factory=asyncio.Queue)
    begun: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)
    generations: list[Generation] = field(default_factory=list)  # the engine's thread's
    num_open: int = 0  # completions that have not ended: the engine's thread's
    drafted: int = 0  # of the completions that have ended
    accepted: int = 0
    notes: list[str] = field(default_factory=list)
    closed: bool = False  # whether it has left the server: the event loop's
    on_close: list[Callable[[], object]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many completions it asks for."""
        return len(self.prompts) * self.options.n


class Worker:
    """Owns the engine's thread. At most `num_slots` completions run and `max_queued` wait; more are refused."""

    def __init__(self, llm: TextEngine, metrics: Metrics, *, max_queued: int = 64, shadow: Shadow | None = None) -> None:
        self.llm, self.metrics, self.shadow = llm, metrics, shadow
        self.num_slots = llm.engine.cache.num_slots
        self.capacity = self.num_slots + max_queued
        self.num_taken = 0  # completions of tickets that are not closed
        self.mean_seconds = 1.0  # a request takes, lately
        self.deadline = math.inf  # when what still runs is cut
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[Choice, tuple[Ticket, int]] = {}
        self.thread = threading.Thread(target=self._run, name="ease-engine", daemon=True)

    def start(self) -> None:
        """Begin to work, for the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread: what still runs is cut. Returns when it has ended."""
        self.deadline = 0.0
        self.commands.put(None)
        self.thread.join()

    def drain(self, grace_seconds: float) -> None:
        """Take no more requests, and cut in `grace_seconds` those that still run. May be called from a signal's handler."""
        self.deadline = min(self.deadline, time.monotonic() + grace_seconds)

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self.deadline < math.inf

    # What the event loop calls.

    async def submit(self, prompts: list[list[int]], options: Options) -> Ticket:
        """Queue a request. Raises ApiError when there is no room or the engine cannot run it."""
        ticket = Ticket(prompts, options)
        self.check_room(ticket.size)
        self.num_taken += ticket.size
        self.commands.put(lambda: self._begin(ticket))
        try:
            await ticket.begun
        except BaseException:
            self.close(ticket)
            raise
        return ticket

    def check_room(self, size: int) -> None:
        """Raises ApiError unless so many completions more may be queued now."""
        if self.draining or not self.thread.is_alive():
            raise ApiError(503, "the server is shutting down", retry_after=LONGEST_RETRY)
        if size > self.capacity:
            raise ApiError(400, f"{size} completions in a request; this server takes up to {self.capacity}")
        if self.num_taken + size > self.capacity:
            message = f"{self.num_taken} completions run or wait, of at most {self.capacity}; try again later"
            raise ApiError(429, message, code="queue_full", retry_after=self.retry_after())

    def retry_after(self) -> int:
        """Seconds until there is room again, as far as one can tell."""
        waiting = max(1, self.num_taken - self.num_slots + 1)
        return min(LONGEST_RETRY, max(1, math.ceil(self.mean_seconds * waiting / self.num_slots)))

    def close(self, ticket: Ticket) -> None:
        """A request leaves: it has ended, or its client has gone, and what still runs of it is given up."""
        if ticket.closed:
            return
        ticket.closed = True
        self.num_taken -= ticket.size
        self.mean_seconds += 0.1 * (time.monotonic() - ticket.since - self.mean_seconds)
        self.commands.put(lambda: self._give_up(ticket))
        for call in ticket.on_close:
            call()

    # What the engine's thread does.

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._obey()
                if self.llm.busy and time.monotonic() >= self.deadline:
                    self._cut(CUT)
                elif self.llm.busy:
                    self._step()
            except Exception as error:
                log.exception("the engine failed")
                self._cut(f"the engine failed: {error}")
        self._cut(CUT)

    def _obey(self) -> bool:
        """Carry out the commands that are there; wait for one when there is nothing else to do. False at the end."""
        while not (self.llm.busy and self.commands.empty()):
            command = self.commands.get()
            if command is None:
                return False
            command()
        return True

    def _begin(self, ticket: Ticket) -> None:
        if ticket.closed:
            return
        try:
            for prompt in ticket.prompts:
                ticket.generations.append(self.llm.submit(prompt, ticket.options))
        except EaseError as error:
            self._withdraw(ticket)
            self._call(_refuse, ticket, ApiError(400, str(error)))
            return
        except Exception as error:
            log.exception("a request could not be started")
            self._withdraw(ticket)
            self._call(_refuse, ticket, ApiError(500, f"the request could not be started: {error}"))
            return
        choices = [choice for generation in ticket.generations for choice in generation.choices]
        self.tickets |= {choice: (ticket, index) for index, choice in enumerate(choices)}
        ticket.num_open = len(choices)
        self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt in ticket.prompts))
        self._call(_accept, ticket)

    def _give_up(self, ticket: Ticket) -> None:
        self._withdraw(ticket)
        self._note_load()

    def _withdraw(self, ticket: Ticket) -> None:
        for generation in ticket.generations:
            self.llm.cancel(generation)
            for choice in generation.choices:
                self.tickets.pop(choice, None)
        ticket.generations = []

    def _step(self) -> None:
        read = self.llm.step()
        self._note_pass(read)
        updates: dict[Ticket, list[Update]] = {}
        for choice, events in read:
            if not events and choice.finish_reason is None:
                continue
            ticket, index = self.tickets[choice]
            updates.setdefault(ticket, []).append(Update(index, events, choice.finish_reason, choice.error))
            if choice.finish_reason is not None:
                self._note_end(ticket, choice)
                del self.tickets[choice]
                ticket.num_open -= 1
        if updates:
            self._call(self._deliver, [(ticket, news, ticket.num_open == 0) for ticket, news in updates.items()])
        if self.shadow and self.shadow.look():
            self.metrics.note_shadow(self.shadow.risk or 0.0, bool(self.shadow.drift))

    def _note_pass(self, read: list[tuple[Choice, list[TokenEvent]]]) -> None:
        engine = self.llm.engine
        self.metrics.note_pass(
            engine.num_rows, len(engine.running), len(engine.waiting), (event.depth for _, events in read for event in events)
        )

    def _note_end(self, ticket: Ticket, choice: Choice) -> None:
        sequence = choice.sequence
        ticket.drafted, ticket.accepted = ticket.drafted + sequence.drafts.judged, ticket.accepted + sequence.drafts.accepted
        ticket.notes += sequence.notes
        self.metrics.drafted.inc(sequence.drafts.judged)
        self.metrics.accepted.inc(sequence.drafts.accepted)
        if self.shadow:
            self.shadow.consider(sequence)

    def _note_load(self) -> None:
        self.metrics.running.set(len(self.llm.engine.running))
        self.metrics.queue.set(len(self.llm.engine.waiting))

    def _cut(self, message: str) -> None:
        """End everything that runs, with an error."""
        updates: dict[Ticket, list[Update]] = {}
        for ticket, index in self.tickets.values():
            updates.setdefault(ticket, []).append(Update(index, [], "error", message))
        for ticket in updates:
            self._withdraw(ticket)
        for sequence in [*self.llm.engine.waiting, *self.llm.engine.sequences]:
            self.llm.engine.release(sequence)
        self.llm.engine.cache.scrub()  # a pass that broke off may have left anything
        if updates:
            self._call(self._deliver, [(ticket, news, True) for ticket, news in updates.items()])

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call something; once it has ended there is nobody to tell."""
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("the event loop has ended")

    def _deliver(self, news: list[tuple[Ticket, list[Update], bool]]) -> None:
        """In the event loop: hand updates out; a ticket whose last completion has ended is closed."""
        for ticket, updates, last in news:
            ticket.inbox.put_nowait(updates)
            if last:
                self.close(ticket)


def _accept(ticket: Ticket) -> None:
    if not ticket.begun.done():
        ticket.begun.set_result(None)


def _refuse(ticket: Ticket, error: ApiError) -> None:
    if not ticket.begun.done():
        ticket.begun.set_exception(error)
