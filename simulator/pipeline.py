"""Pipeline schedules as closed forms, over one layout or arrays of them.

Time is that of the slowest rank: its own work on every micro-batch, plus the passage of one
micro-batch through the other ranks (1F1B, arXiv 2104.04473: bubble (p-1)(f+b); interleaved:
divided by v; zero bubble ZB-H1, arXiv 2401.10241: (p-1)(f+b-w)).
`simulator.timeline` builds the same schedules event by event.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.schema import ModelConfig
from simulator.array import Array
from simulator.layout import DEALS, SCHEDULES, Layout


@dataclass(frozen=True)
class RankSeconds:
    """One pipeline rank's seconds for one micro-batch, summed over its chunks.

    `hideable` is what the overlapped schedule saves when a forward pass of one micro-batch runs
    beside a backward pass of another. `waiting` is the part of forward and input gradient in which
    the device waits for its host.
    """

    forward: Array
    input_gradient: Array
    weight_gradient: Array
    hideable: Array
    waiting: Array = 0.0

    @property
    def backward(self) -> Array:
        return self.input_gradient + self.weight_gradient

    @property
    def both(self) -> Array:
        return self.forward + self.backward


@dataclass(frozen=True)
class Ranks:
    """`count` pipeline ranks with the same content, the first of which is `first` (`count` is 0
    where a layout has none). The first keeps the most micro-batches in flight."""

    first: Array
    count: Array


def distinct_ranks(model: ModelConfig, layout: Layout) -> list[Ranks]:
    """Pipeline ranks grouped by content: those near the ends one by one (embedding, dense layers,
    no-op layers, head), those between them together."""
    most = int(np.max(layout.pp))
    slots = np.maximum(np.ceil((model.num_layers + layout.noop_layers) / layout.virtual_stages), 1)
    dense = model.num_dense_layers if model.num_experts else 0
    fewer = np.where(layout.deal == 0, np.ceil(layout.noop_layers / 2), layout.noop_layers)
    near = int(np.max(np.ceil((dense + fewer) / slots))) + 1
    near = max(near, dense + 1, 2) if np.any(layout.deal == DEALS.index("apart")) else near
    alike = layout.stage_layers is None and not model.patched_layers
    if not alike or 2 * near + 1 >= most:
        return [Ranks(rank, np.where(rank < layout.pp, 1, 0)) for rank in range(most)]
    front = [Ranks(rank, np.where(rank < layout.pp, 1, 0)) for rank in range(near)]
    middle = Ranks(near, np.maximum(layout.pp - 2 * near, 0))
    back = [
        Ranks(layout.pp - 1 - end, np.where(layout.pp - 1 - end >= near, 1, 0))
        for end in range(near)
    ]
    return [*front, middle, *back]


def warmup_units(layout: Layout, rank: Array) -> Array:
    """Chunk passes forward before the first backward pass (megatron-core's order)."""
    p, v, m = layout.pp, layout.vpp, layout.num_microbatches
    after = np.maximum(p - rank - 1, 0)
    units = np.where(v > 1, 2 * after + (v - 1) * p, after)
    units = units + np.where(layout.overlap_expert_parallel, 1, 0)
    return np.minimum(units, m * v)


def hidden_seconds(layout: Layout, rank: Array, seconds: RankSeconds) -> Array:
    """What the overlapped schedule hides in a step: forward passes beside backward passes."""
    pairs = layout.num_microbatches - warmup_units(layout, rank) / layout.vpp
    return np.where(layout.overlap_expert_parallel, pairs * seconds.hideable, 0.0)


def pipeline_seconds(layout: Layout, ranks: list[tuple[Ranks, RankSeconds]], send: Array) -> Array:
    """Seconds from the first forward to the last backward pass of a step.

    `send` is one hop between neighbouring ranks. 1F1B waits for it; interleaving hides it beside
    other chunks' work except where the pipeline fills and drains.
    """
    p, v, m = layout.pp, layout.vpp, layout.num_microbatches
    schedule = layout.schedule
    zero_bubble = (schedule == SCHEDULES.index("zero_bubble")) & (v == 1)
    hidden = (v > 1) & layout.overlap_sends
    waits = np.where(hidden, 0.0, v) * send
    through: Array = 0.0
    forward_through: Array = 0.0
    slowest_forward: Array = 0.0
    slowest_backward: Array = 0.0
    passes = []
    for group, seconds in ranks:
        there = np.where(group.first < p - 1, waits, 0.0)
        back = np.where(group.first > 0, waits, 0.0)
        forward, backward = seconds.forward + there, seconds.backward + back
        saved = np.where(zero_bubble, 2 * seconds.weight_gradient, 0.0)
        once = np.maximum(forward + backward - saved, 0.0) / v
        through = through + group.count * once
        forward_through = forward_through + group.count * (forward + backward)
        held = group.count > 0
        slowest_forward = np.maximum(slowest_forward, np.where(held, forward, 0.0))
        slowest_backward = np.maximum(slowest_backward, np.where(held, backward, 0.0))
        passes.append((forward + backward, once))
    slowest: Array = 0.0
    for (group, seconds), (both, once) in zip(ranks, passes, strict=True):
        own = m * both - hidden_seconds(layout, group.first, seconds)
        own = np.where(group.count > 0, own + through - once, 0.0)
        slowest = np.maximum(slowest, own)
    slowest = slowest + np.where(hidden, 2.0 * (p - 1 + (v - 1) * p) * send, 0.0)
    gpipe = (m - 1) * (slowest_forward + slowest_backward) + forward_through
    return np.where(schedule == SCHEDULES.index("gpipe"), gpipe, slowest)
