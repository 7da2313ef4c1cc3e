"""What the event loop knows of requests: tickets, how many there may be, and what has become of them.

The engine runs in a thread of its own (engine_thread.py), which sees a request as a Job. Between the two go
commands one way and calls of `Messages` the other, each carried out on the side that it is about.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ease_runtime.llm import TextEngine
from ease_runtime.server.api_error import ApiError
from ease_runtime.server.engine_thread import EngineThread, Job
from ease_runtime.server.metrics import Metrics
from ease_runtime.server.shadow import Shadow
from ease_runtime.server.updates import Tally, Update

log = logging.getLogger(__name__)
LONGEST_RETRY = 60  # seconds that a refused client is told to wait at most


@dataclass(eq=False)
class Ticket:
    """A request on its way. `inbox` gets lists of updates; None when the client has gone."""

    job: Job  # the engine's thread's: the event loop only hands it on
    size: int  # completions that it asks for
    inbox: asyncio.Queue[list[Update] | None] = field(default_factory=asyncio.Queue)
    begun: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)
    tally: Tally = field(default_factory=Tally)
    closed: bool = False  # whether it has left the server
    on_close: list[Callable[[], object]] = field(default_factory=list)

    def take(self, updates: list[Update]) -> None:
        """Count what has ended, and pass the updates on."""
        for update in updates:
            self.tally.add(update)
        self.inbox.put_nowait(updates)


class Dispatcher:
    """Takes requests for the engine's thread.

    At most `num_slots` completions run and `max_queued` wait; more are refused.
    """

    def __init__(
        self, llm: TextEngine, metrics: Metrics, *, max_queued: int = 64, shadow: Shadow | None = None
    ) -> None:
        self.engine = EngineThread(llm, metrics, Messages(self), shadow)
        self.num_slots = llm.engine.num_slots
        self.capacity = self.num_slots + max_queued
        self.num_taken = 0  # completions of tickets that are not closed
        self.mean_seconds = 1.0  # a request takes, lately
        self.draining = False  # whether the server is about to end
        self.tickets: dict[Job, Ticket] = {}

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self.engine.thread.is_alive() and not self.draining

    def start(self) -> None:
        """Begin to work, for the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.engine.thread.start()

    def stop(self) -> None:
        """End the engine's thread: what still runs is cut. Returns when it has ended."""
        self.draining = True
        self.engine.stop()

    def drain(self, grace_seconds: float) -> None:
        """Take no more requests, and cut in `grace_seconds` those that still run.

        May be called from a signal's handler.
        """
        self.draining = True
        self.engine.cut_at(time.monotonic() + grace_seconds)

    async def submit(self, job: Job) -> Ticket:
        """Queue a request. Raises ApiError when there is no room or the engine cannot run it."""
        ticket = Ticket(job, len(job.prompts) * job.options.n)
        self.check_room(ticket.size)
        self.num_taken += ticket.size
        self.tickets[ticket.job] = ticket
        self.engine.begin(ticket.job)
        try:
            await ticket.begun
        except BaseException:
            self.close(ticket)
            raise
        return ticket

    def check_room(self, size: int) -> None:
        """Raises ApiError unless so many completions more may be queued now."""
        if not self.alive:
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
        del self.tickets[ticket.job]
        self.num_taken -= ticket.size
        self.mean_seconds += 0.1 * (time.monotonic() - ticket.since - self.mean_seconds)
        self.engine.give_up(ticket.job)
        for call in ticket.on_close:
            call()

    def settle(self, job: Job, error: ApiError | None) -> None:
        """A request has begun, or cannot."""
        ticket = self.tickets.get(job)
        if ticket is None or ticket.begun.done():
            return
        if error is None:
            ticket.begun.set_result(None)
        else:
            ticket.begun.set_exception(error)

    def deliver(self, news: list[tuple[Job, list[Update]]]) -> None:
        """Hand updates out; a ticket whose last completion has ended is closed."""
        for job, updates in news:
            if (ticket := self.tickets.get(job)) is not None:
                ticket.take(updates)
                if ticket.tally.num_ended == ticket.size:
                    self.close(ticket)


class Messages:
    """A worker's ear in the engine's thread: whatever it hears, the event loop carries out."""

    def __init__(self, worker: Dispatcher) -> None:
        self.worker = worker

    def accept(self, job: Job) -> None:
        """It has begun."""
        self._call(self.worker.settle, job, None)

    def refuse(self, job: Job, error: ApiError) -> None:
        """It cannot begin."""
        self._call(self.worker.settle, job, error)

    def deliver(self, news: list[tuple[Job, list[Update]]]) -> None:
        """What has become of some jobs."""
        self._call(self.worker.deliver, news)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Once the event loop has ended there is nobody to tell."""
        try:
            self.worker.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("the event loop has ended")
