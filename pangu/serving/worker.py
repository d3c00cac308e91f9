"""The thread that decodes; the event loop hands it requests and gets updates."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from pangu.inference.batching import Request
from pangu.inference.engine import Engine, Update
from pangu.serving.replicas import Replicas


class Busy(Exception):
    """The queue is full."""


class WorkerDead(Exception):
    """Decoding has failed; nothing comes any more."""


Updates = asyncio.Queue[tuple[int, Update | None]]


class Experts(Protocol):
    """What gives a model the experts of a task (`pangu.task_experts`)."""

    task: str

    @property
    def bytes_read(self) -> int:
        """From the checkpoint so far."""

    def task_of(self, prompt: Sequence[int]) -> str:
        """The task that a prompt's tokens belong to."""

    def hold(self, task: str) -> None:
        """Let the model have the experts of a task."""


class Ticket:
    """A request that was handed over, and where to tell what becomes of it."""

    def __init__(self, request: Request, place: int, updates: Updates) -> None:
        self.request, self._place, self._updates = request, place, updates
        self.task: str | None = None  # once it is known, where there are tasks
        self.number: int | None = None  # once the engine has it

    def tell(self, update: Update | None) -> None:
        """None: there will be no more, though it has not ended."""
        self._updates.put_nowait((self._place, update))


class Worker:
    """Runs an engine in a thread of its own. All methods are for the event loop's thread.

    `most_open`: requests that may be under way, waiting ones included. With `experts` the requests
    of one task are decoded together; one of another waits until they have ended, and those that
    come after it wait behind it. With nothing to decode, replicas are asked every `patience`
    seconds whether all are there.
    """

    def __init__(
        self,
        engine: Engine | Replicas,
        most_open: int,
        experts: Experts | None = None,
        patience: float | None = None,
    ) -> None:
        self.engine, self.most_open, self.experts = engine, most_open, experts
        self._patience = patience
        self._waiting: deque[Ticket] = deque()  # of the worker's thread, as they came
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by number, of the worker's thread
        self._open: set[Ticket] = set()
        self._stopping = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after the step under way."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.failed

    @property
    def open(self) -> int:
        """Requests under way."""
        return len(self._open)

    async def updates(self, requests: list[Request]) -> AsyncGenerator[tuple[int, Update], None]:
        """What becomes of the requests, as (place among them, update), until all have ended. When
        the iterator is closed before, they are cancelled.

        Raises:
            Busy: there is no room for so many; none was started.
            WorkerDead
        """
        if not self.alive:
            raise WorkerDead
        if len(self._open) + len(requests) > self.most_open:
            raise Busy
        merged: Updates = asyncio.Queue()
        tickets = [Ticket(request, place, merged) for place, request in enumerate(requests)]
        for ticket in tickets:
            self._open.add(ticket)
            self._commands.put(lambda ticket=ticket: self._waiting.append(ticket))  # type: ignore[misc]
        left = len(tickets)
        try:
            while left:
                place, update = await merged.get()
                if update is None:
                    raise WorkerDead
                left -= bool(update.finish)
                yield place, update
        finally:
            for ticket in tickets:
                self._open.discard(ticket)
                self._commands.put(lambda ticket=ticket: self._drop(ticket))  # type: ignore[misc]

    # In the worker's thread.

    def _begin(self) -> None:
        """Hand the engine what it can decode with the experts that the model has, or may have
        now."""
        while self._waiting and self._has_experts_for(self._waiting[0]):
            ticket = self._waiting.popleft()
            ticket.number = self.engine.add(ticket.request)
            self._tickets[ticket.number] = ticket

    def _has_experts_for(self, ticket: Ticket) -> bool:
        if self.experts is None:
            return True
        if ticket.task is None:
            ticket.task = self.experts.task_of(ticket.request.prompt)
        if ticket.task != self.experts.task:
            if self.engine.busy:
                return False
            self.experts.hold(ticket.task)
            assert isinstance(self.engine, Engine), "tasks are for one process"
            self.engine.forget()
        return True

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket.number in self._tickets:
            del self._tickets[ticket.number]
            self.engine.cancel(ticket.number)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                self._begin()
                self._tell(self.engine.step())
            if isinstance(self.engine, Replicas):
                self.engine.dismiss()
        except Exception:
            traceback.print_exc()
            self.failed = True
            self._call(self._give_up)

    def _obey(self) -> None:
        """Commands that are there; with nothing to decode, wait for one."""
        if not self.engine.busy:
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=self._patience)()
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    def _tell(self, updates: list[Update]) -> None:
        told = []
        for update in updates:
            if ticket := self._tickets.get(update.number):
                told.append((ticket, update))
                if update.finish:
                    del self._tickets[update.number]
        if told:
            self._call(lambda: _pass_on(told))

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None, "start() has been called"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def _give_up(self) -> None:
        for ticket in self._open:
            ticket.tell(None)


def _pass_on(told: list[tuple[Ticket, Update]]) -> None:
    for ticket, update in told:
        ticket.tell(update)
