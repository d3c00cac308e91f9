"""Pipeline schedules as closed forms, over one layout or arrays of them.

Time is that of the slowest rank: its own work on every micro-batch, plus the passage of one
micro-batch through the other ranks (1F1B, arXiv 2104.04473: bubble (p-1)(f+b); interleaved:
divided by v; zero bubble ZB-H1, arXiv 2401.10241: (p-1)(f+b-w)).
`simulator.timeline` builds the same schedules event by event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.layout import SCHEDULES, Layout

Array = Any


@dataclass(frozen=True)
class RankSeconds:
    """One pipeline rank's seconds for one micro-batch, summed over its chunks.

    `hideable` is what the overlapped schedule saves when a forward pass of one micro-batch runs
    beside a backward pass of another.
    """

    forward: Array
    input_gradient: Array
    weight_gradient: Array
    hideable: Array

    @property
    def backward(self) -> Array:
        return self.input_gradient + self.weight_gradient

    @property
    def both(self) -> Array:
        return self.forward + self.backward


def warmup_units(layout: Layout, rank: int) -> Array:
    """Chunk passes forward before the first backward pass (megatron-core's order)."""
    p, v, m = layout.pp, layout.vpp, layout.num_microbatches
    after = np.maximum(p - rank - 1, 0)
    units = np.where(v > 1, 2 * after + (v - 1) * p, after)
    units = units + np.where(layout.schedule == SCHEDULES.index("1f1b_overlap"), 1, 0)
    return np.minimum(units, m * v)


def pipeline_seconds(layout: Layout, ranks: list[RankSeconds], send: Array) -> Array:
    """Seconds from the first forward to the last backward pass of a step.

    `send` is one hop between neighbouring ranks. 1F1B waits for it; interleaving hides it beside
    other chunks' work except where the pipeline fills and drains.
    """
    p, v, m = layout.pp, layout.vpp, layout.num_microbatches
    count = len(ranks)
    inside = [np.where(rank < p, 1.0, 0.0) for rank in range(count)]
    waits = np.where(v > 1, 0.0, 1.0) * send
    forward, backward, first_pass = [], [], []
    schedule = layout.schedule
    zero_bubble = (schedule == SCHEDULES.index("zero_bubble")) & (v == 1)
    overlapped = schedule == SCHEDULES.index("1f1b_overlap")
    for rank, seconds in enumerate(ranks):
        there = np.where(rank < p - 1, waits, 0.0)
        back = np.where(rank > 0, waits, 0.0)
        forward.append((seconds.forward + there) * inside[rank])
        backward.append((seconds.backward + back) * inside[rank])
        passing = forward[-1] + backward[-1]
        saved = np.where(zero_bubble, 2 * seconds.weight_gradient * inside[rank], 0.0)
        first_pass.append(np.maximum(passing - saved, 0.0) / v)
    through = _sum(first_pass)
    slowest: Array = 0.0
    for rank, seconds in enumerate(ranks):
        own = m * (forward[rank] + backward[rank])
        pairs = m * v - warmup_units(layout, rank)
        own = own - np.where(overlapped, pairs / v * seconds.hideable * inside[rank], 0.0)
        slowest = np.maximum(slowest, own + through - first_pass[rank])
    slowest = slowest + np.where(v > 1, 2.0 * (p - 1 + (v - 1) * p) * send, 0.0)
    gpipe = (m - 1) * (_maximum(forward) + _maximum(backward)) + _sum(forward) + _sum(backward)
    return np.where(schedule == SCHEDULES.index("gpipe"), gpipe, slowest)


def _sum(values: list[Array]) -> Array:
    result: Array = 0.0
    for value in values:
        result = result + value
    return result


def _maximum(values: list[Array]) -> Array:
    result: Array = 0.0
    for value in values:
        result = np.maximum(result, value)
    return result
