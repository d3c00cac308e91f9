"""Which expert-parallel rank holds which expert, by how much each was chosen lately (Pangu Ultra
MoE, arXiv 2505.04519: planner of dynamic expert placement).

An order is int64 `[E]`: the expert in each slot. Slots lie rank by rank, as many on each. The
router and all that is saved or reported know experts by their numbers; slots are where they are.
"""

from __future__ import annotations

import heapq
import math
from typing import Any, TypeAlias

import numpy as np

Order: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Loads: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

DECAY = 0.9  # θ of the moving average


def average(before: Loads | None, counts_E: Loads) -> Loads:
    """The moving average of an expert's choices per step; it starts with the first step's."""
    return counts_E if before is None else DECAY * before + (1 - DECAY) * counts_E


def device_load_cv(loads_E: Loads, order: Order, ranks: int) -> float:
    """Coefficient of variation (standard deviation over mean) of the ranks' loads; 0 if there is
    none."""
    loads_R = loads_E[order].reshape(ranks, -1).sum(axis=1)
    mean = loads_R.mean()
    return float(loads_R.std() / mean) if mean else 0.0


def plan(loads_E: Loads, order: Order, ranks: int, groups: int) -> Order:
    """The heaviest expert to the least loaded rank with a free slot, and so on; the same wherever
    it is computed. An expert that stays on its rank keeps its slot.

    Of MoGE's `groups`, ranks that held whole ones do so afterwards: experts move inside the
    smallest blocks that are whole groups and whole ranks. Where each rank is such a block, its load
    is every other's, and none moves.
    """
    blocks = math.gcd(groups, ranks)
    slots_BRX = order.reshape(blocks, ranks // blocks, -1)
    return np.concatenate([_greedy(loads_E, slots_RX) for slots_RX in slots_BRX])


def _greedy(loads_E: Loads, slots_RX: Order) -> Order:
    ranks, room = slots_RX.shape
    free = [(0.0, rank) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(slots_RX.flatten().tolist(), key=lambda e: (-loads_E[e], e)):
        load, rank = heapq.heappop(free)
        held[rank].append(expert)
        if len(held[rank]) < room:
            heapq.heappush(free, (load + float(loads_E[expert]), rank))
    planned: list[int] = []
    for before, now in zip(slots_RX.tolist(), held, strict=True):
        come = iter([expert for expert in now if expert not in before])
        planned += [expert if expert in now else next(come) for expert in before]
    return np.array(planned, dtype=np.int64)
