"""A pipeline schedule event by event: every pass of every micro-batch on every rank.

Orders are megatron-core's (1F1B, interleaved 1F1B with groups of p micro-batches); a pass starts
when its rank is free and its input has arrived, so bubbles, uneven stages and exposed sends come
out instead of being put in.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from simulator.layout import SCHEDULES, Layout

MAX_EVENTS = 20_000  # beyond that the steady state is continued, not repeated


class Event(NamedTuple):
    """One pass: `kind` is F, B (input and weight gradient), I (input gradient), W (weight
    gradient) or FB (a forward beside a backward pass; `micro_batch` is the forward's)."""

    rank: int
    kind: str
    micro_batch: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class UnitSeconds:
    """Seconds of one chunk of one rank for one micro-batch."""

    forward: float
    input_gradient: float
    weight_gradient: float
    hideable: float = 0.0

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient


Pass = tuple[int, str, int, int, float, float]  # the fields of `Event`


@dataclass(frozen=True)
class Timeline:
    """Passes of a step and when each rank has finished; `seconds` covers all micro-batches even
    where `passes` stops after the steady state. Plain tuples: hundreds of thousands of them."""

    passes: list[Pass]
    finished: list[float]
    seconds: float

    @cached_property
    def events(self) -> list[Event]:
        return [Event(*each) for each in self.passes]


Unit = tuple[str, int, int]  # kind, micro-batch, chunk


def build(layout: Layout, units: list[list[UnitSeconds]], send: float) -> Timeline:
    """Run the schedule of a single layout.

    `units[rank][chunk]` are the passes' seconds, `send` the time of one hop.
    """
    p, v, m = int(layout.pp), int(layout.vpp), int(layout.num_microbatches)
    simulated = m
    if v > 1 and m > 2 * p:  # micro-batches go through chunks in groups of p
        simulated = m // p * p
    if p * v * m * 2 > MAX_EVENTS:
        simulated = max(4 * p, MAX_EVENTS // (2 * p * v) // p * p)
        simulated = min(simulated, m)
    timeline = _run(layout, units, send, p, v, simulated)
    if simulated == m:
        return timeline
    shorter = _run(layout, units, send, p, v, simulated - p)
    per_micro_batch = (timeline.seconds - shorter.seconds) / p
    extra = per_micro_batch * (m - simulated)
    finished = [end + extra for end in timeline.finished]
    return Timeline(timeline.passes, finished, timeline.seconds + extra)


def _run(
    layout: Layout, units: list[list[UnitSeconds]], send: float, p: int, v: int, m: int
) -> Timeline:
    schedule = SCHEDULES[int(layout.schedule)]
    if schedule == "zero_bubble" and v == 1:
        return _zero_bubble(units, send, p, m)
    if schedule == "gpipe":
        orders = [_gpipe(v, m) for _ in range(p)]
    else:
        early = 1 if layout.overlap_expert_parallel else 0
        orders = [interleaved_order(p, v, m, rank, early) for rank in range(p)]
        if early:
            orders = [_paired(order, p, v, m, rank) for rank, order in enumerate(orders)]
    waited = v == 1 or not layout.overlap_sends
    return _follow(orders, units, send, p, v, waited=waited)


def forward_units(p: int, v: int, m: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of the forward passes of a rank: groups of p micro-batches go through
    one chunk, then through the next."""
    order = []
    group = p if v > 1 else m
    for first in range(0, m, group):
        for chunk in range(v):
            order += [(batch, chunk) for batch in range(first, min(first + group, m))]
    return order


@lru_cache(maxsize=1)
def _passes(p: int, v: int, m: int) -> tuple[list[Unit], list[Unit]]:
    """Forward and backward passes, each in every rank's order."""
    units = forward_units(p, v, m)
    ahead: list[Unit] = [("F", batch, chunk) for batch, chunk in units]
    back: list[Unit] = [("B", batch, v - 1 - chunk) for batch, chunk in units]
    return ahead, back


def interleaved_order(p: int, v: int, m: int, rank: int, early: int = 0) -> list[Unit]:
    """1F1B, interleaved where v > 1."""
    ahead, back = _passes(p, v, m)
    after = p - rank - 1
    warmup = min((2 * after + (v - 1) * p if v > 1 else after) + early, len(ahead))
    steady = len(ahead) - warmup
    pairs = zip(ahead[warmup:], back[:steady], strict=True)
    return [*ahead[:warmup], *(unit for pair in pairs for unit in pair), *back[steady:]]


def _gpipe(v: int, m: int) -> list[Unit]:
    order: list[Unit] = [("F", batch, chunk) for chunk in range(v) for batch in range(m)]
    return order + [("B", batch, chunk) for _, batch, chunk in reversed(order)]


def _paired(order: list[Unit], p: int, v: int, m: int, rank: int) -> list[Unit]:
    """Join the steady state's forward and backward passes into one that overlaps both."""
    after = p - rank - 1
    warmup = min((2 * after + (v - 1) * p if v > 1 else after) + 1, m * v)
    pairs = m * v - warmup
    steady = order[warmup : warmup + 2 * pairs]
    joined: list[Unit] = []
    for index in range(0, len(steady), 2):
        _, batch, chunk = steady[index]
        joined.append(("FB", batch, chunk))
        joined.append(steady[index + 1])  # the backward half, which FB runs along
    return order[:warmup] + joined + order[warmup + 2 * pairs :]


def _follow(
    orders: list[list[Unit]],
    units: list[list[UnitSeconds]],
    send: float,
    p: int,
    v: int,
    *,
    waited: bool,
) -> Timeline:
    """Run fixed orders. Without interleaving a rank waits for its sends; with it they mostly only
    delay the receiver."""
    run = _Following(units, p, p * v - 1)
    run.waits = send if waited else 0.0
    run.delay = send if not waited and p > 1 else 0.0
    run.ahead[0] = {batch: 0.0 for _, batch, _ in orders[0]}
    position = [0] * p
    waiting = list(range(p))
    while waiting:
        before = len(run.passes)
        for rank in waiting:
            order = orders[rank]
            while position[rank] < len(order):
                # A pair, FB, is one pass over two units.
                units_of_pass = order[position[rank] : position[rank] + 2]
                if not run.take(rank, units_of_pass):
                    break
                position[rank] += 2 if units_of_pass[0][0] == "FB" else 1
        waiting = [rank for rank in waiting if position[rank] < len(orders[rank])]
        if len(run.passes) == before:
            raise RuntimeError("the schedule waits for itself")
    return Timeline(run.passes, run.free, max(run.free))


class _Following:
    """A pipeline that runs given orders: when each rank is free, and when each input is there."""

    def __init__(self, units: list[list[UnitSeconds]], p: int, last: int) -> None:
        self.units, self.p, self.last = units, p, last
        self.waits = self.delay = 0.0
        # When the input of each micro-batch is there, by stage; back[-1] takes what leaves stage 0.
        self.ahead: list[dict[int, float]] = [{} for _ in range(last + 1)]
        self.back: list[dict[int, float]] = [{} for _ in range(last + 2)]
        self.free = [0.0] * p
        self.passes: list[Pass] = []

    def take(self, rank: int, order: list[Unit]) -> bool:
        """Run the first unit of `order` on a rank (FB: with the second); False while its input is
        not there."""
        kind, batch, chunk = order[0]
        stage, unit = chunk * self.p + rank, self.units[rank][chunk]
        ready = (self.back if kind == "B" else self.ahead)[stage].get(batch)
        if ready is None:
            return False
        start = max(self.free[rank], ready)
        there = self.waits if stage < self.last else 0.0
        behind = self.waits if stage > 0 else 0.0
        if kind == "F":
            end = start + unit.forward + there
            self._passed_on(stage, batch, end)
        elif kind == "B":
            end = start + unit.backward + behind
            self.back[stage - 1][batch] = end + self.delay
        else:
            _, other, other_chunk = order[1]
            other_stage = other_chunk * self.p + rank
            second = self.back[other_stage].get(other)
            if second is None:
                return False
            paired = self.units[rank][other_chunk]
            hidden = (unit.hideable + paired.hideable) / 2
            start = max(start, second)
            end = start + unit.forward + paired.backward - hidden + there + behind
            self._passed_on(stage, batch, end)
            self.back[other_stage - 1][other] = end + self.delay
        self.passes.append((rank, kind, batch, chunk, start, end))
        self.free[rank] = end
        return True

    def _passed_on(self, stage: int, batch: int, end: float) -> None:
        if stage < self.last:
            self.ahead[stage + 1][batch] = end + self.delay
        else:  # the loss turns round
            self.back[stage][batch] = end


def _zero_bubble(units: list[list[UnitSeconds]], send: float, p: int, m: int) -> Timeline:
    """ZB-H1: backward passes split; an idle rank fills up with weight gradients. At most p - rank
    micro-batches are in flight, as in 1F1B."""
    time_of: Callable[[int], UnitSeconds] = lambda rank: units[rank][0]  # noqa: E731
    forward_at: list[list[float]] = [[0.0] * m if rank == 0 else [] for rank in range(p)]
    backward_at: list[list[float]] = [[] for _ in range(p)]
    forwards, backwards, weights = [0] * p, [0] * p, [0] * p
    passes: list[Pass] = []
    free = [0.0] * p
    queue = [(0.0, rank) for rank in range(p)]
    while queue:
        now, rank = heapq.heappop(queue)
        if now < free[rank] or weights[rank] == m:
            continue
        unit = time_of(rank)
        f, b, w = forwards[rank], backwards[rank], weights[rank]
        can_back = b < len(backward_at[rank]) and backward_at[rank][b] <= now
        room = f - b < p - rank
        can_ahead = f < m and room and f < len(forward_at[rank]) and forward_at[rank][f] <= now
        if can_back:
            end = now + unit.input_gradient
            kind, index = "I", b
            backwards[rank] += 1
            if rank:
                backward_at[rank - 1].append(end + send)
                heapq.heappush(queue, (end + send, rank - 1))
        elif can_ahead:
            end = now + unit.forward
            kind, index = "F", f
            forwards[rank] += 1
            if rank < p - 1:
                forward_at[rank + 1].append(end + send)
                heapq.heappush(queue, (end + send, rank + 1))
            else:
                backward_at[rank].append(end)
        elif w < b:
            end = now + unit.weight_gradient
            kind, index = "W", w
            weights[rank] += 1
        else:
            continue  # woken by the next arrival
        passes.append((rank, kind, index, 0, now, end))
        free[rank] = end
        heapq.heappush(queue, (end, rank))
    return Timeline(passes, free, max(free))
