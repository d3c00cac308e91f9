"""Which ranks hold up the others: their own work per step, without the time that they wait."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from pangu import backends

INTERVAL = 20  # steps
# Times what the others take, and seconds more, from which on a rank is slow.
SLOW, NOTICED = 1.5, 0.01


class Pace:
    """Seconds of this rank's own work, of steps since the last comparison."""

    def __init__(self, replicas: dist.ProcessGroup) -> None:
        # Compared are ranks with the same weights: stages of a pipeline differ in what they do.
        self._replica = dist.get_process_group_ranks(replicas)[0]
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        """Take note of a step."""
        self._seconds.append(seconds)

    def compare(self) -> str:
        """A sentence on ranks that were slow, on every rank; "" for none. Collective."""
        own = [statistics.median(self._seconds), float(self._replica)]
        self._seconds.clear()
        device = backends.current().device
        row = torch.tensor(own, dtype=torch.float32, device=device)
        rows = torch.empty(2 * dist.get_world_size(), device=device)  # flat, as gloo wants it
        dist.all_gather_into_tensor(rows, row)
        seconds, replicas = rows.view(-1, 2).T.tolist()
        return slow_ranks(seconds, replicas)


def slow_ranks(seconds: Sequence[float], replicas: Sequence[float]) -> str:
    """A sentence on the ranks that took much longer than the median of the others of their group of
    replicas; "" for none."""
    found = []
    for rank, (own, group) in enumerate(zip(seconds, replicas, strict=True)):
        others = [
            other
            for number, (other, its) in enumerate(zip(seconds, replicas, strict=True))
            if number != rank and its == group
        ]
        usual = statistics.median(others) if others else own
        if own > SLOW * usual and own > usual + NOTICED:
            found.append(f"rank {rank} {own:.2f} s (others {usual:.2f} s)")
    if not found:
        return ""
    return f"slow in the last {INTERVAL} steps, in work of their own per step: {', '.join(found)}"
