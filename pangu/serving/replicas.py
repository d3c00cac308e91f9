"""The engines of several processes as one: rank 0 says who decodes what, the others follow it."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TypeAlias

import torch.distributed as dist

from pangu.inference.batching import Request
from pangu.inference.engine import Engine, Update


@dataclass
class State:
    """What an engine is about, or several together."""

    running: int = 0
    waiting: int = 0
    used: int = 0  # pages of the cache
    pages: int = 0
    passes: int = 0
    tokens: int = 0
    preemptions: int = 0
    guessed: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, engine: Engine) -> State:
        scheduler, counts = engine.scheduler, engine.counts
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used=scheduler.pool.used,
            pages=scheduler.pool.count,
            passes=counts.passes,
            tokens=counts.tokens,
            preemptions=scheduler.preemptions,
            guessed=Counter(counts.guessed),
            held=Counter(counts.held),
        )

    def __add__(self, other: State) -> State:
        return State(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Order:
    """A request for a replica, under its number among all; without one, its end."""

    replica: int
    number: int
    request: Request | None = None


_Told: TypeAlias = tuple[list[Update], State]


class _Part:
    """This rank's engine, and the numbers that its requests have among all."""

    def __init__(self, engine: Engine) -> None:
        assert engine.replica is not None
        self.engine, self.replica = engine, engine.replica
        self._own: dict[int, int] = {}  # numbers in the engine
        self._all: dict[int, int] = {}  # the way back

    def step(self, orders: list[Order]) -> _Told | None:
        """One step, and what it has brought, from the rank that tells it. Collective."""
        for order in orders:
            if order.replica == self.replica.number:
                self._obey(order)
        updates = self.engine.step()
        self.replica.rest()
        for update in updates:
            number = self._own[update.number]
            if update.finish:
                self._forget(number)
            update.number = number
        return (updates, State.of(self.engine)) if self.replica.speaks else None

    def _obey(self, order: Order) -> None:
        if order.request is not None:
            own = self.engine.add(order.request)
            self._own[own], self._all[order.number] = order.number, own
        elif order.number in self._all:
            self.engine.cancel(self._forget(order.number))

    def _forget(self, number: int) -> int:
        own = self._all.pop(number)
        del self._own[own]
        return own


class Replicas:
    """What rank 0's server asks in the place of an engine. One thread calls, but for `state`.

    A request goes where the fewest are under way; every step is one of all ranks. A rank that has
    gone is an error of the next step.
    """

    def __init__(self, engine: Engine) -> None:
        self._part, self.engine = _Part(engine), engine
        self._numbers = itertools.count()
        self._orders: list[Order] = []
        self._replica_of: dict[int, int] = {}
        replicas = range(self._part.replica.count)
        self._states = [State.of(engine) for _ in replicas]

    @property
    def busy(self) -> bool:
        """Whether any request is under way, or its end is not known everywhere."""
        return bool(self._replica_of or self._orders)

    @property
    def state(self) -> State:
        """Of all, at the last step."""
        return sum(self._states[1:], self._states[0])

    def add(self, request: Request) -> int:
        """Give a request to a replica with the next step; its number."""
        number = next(self._numbers)
        loads = Counter(self._replica_of.values())
        replica = min(range(self._part.replica.count), key=lambda one: loads[one])
        self._replica_of[number] = replica
        self._orders.append(Order(replica, number, request))
        return number

    def cancel(self, number: int) -> None:
        """Drop a request; an update of the step under way may still come."""
        replica = self._replica_of.pop(number, None)
        if replica is not None:
            self._orders.append(Order(replica, number))

    def step(self) -> list[Update]:
        """One step of all replicas. Collective; without requests it finds out who has gone."""
        orders, self._orders = self._orders, []
        told = self._send(orders)
        self._states = [state for _, state in told]
        updates = [update for updates, _ in told for update in updates]
        for update in updates:
            if update.finish:
                self._replica_of.pop(update.number, None)
        return updates

    def _send(self, orders: list[Order]) -> list[_Told]:
        control = self._part.replica.control
        dist.broadcast_object_list([orders], src=0, group=control)
        answers: list[_Told | None] = [None] * dist.get_world_size()
        dist.gather_object(self._part.step(orders), answers, dst=0, group=control)
        return [answer for answer in answers if answer is not None]

    def dismiss(self) -> None:
        """Let the other ranks leave. Collective."""
        dist.broadcast_object_list([None], src=0, group=self._part.replica.control)


def follow(engine: Engine) -> None:
    """Take part in the steps of rank 0's `Replicas` until it lets this rank go: only rank 0 is told
    to stop by a signal.

    Raises:
        RuntimeError: rank 0, or another, has gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    part = _Part(engine)
    while True:
        box: list[list[Order] | None] = [None]
        dist.broadcast_object_list(box, src=0, group=part.replica.control)
        if box[0] is None:
            return
        dist.gather_object(part.step(box[0]), None, dst=0, group=part.replica.control)
