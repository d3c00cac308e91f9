"""What was measured: plain records that travel between processes, and the clock behind them.

No torch here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ROUNDS = 7
LEAST_SECONDS = 0.004  # of a round


@dataclass(frozen=True)
class Sample:
    """Median seconds of one operator or collective. `shape` holds the keyword arguments of the
    simulator's timing function, `kind` its name (`simulator.operators`, `.collectives`)."""

    kind: str
    shape: dict[str, Any]
    seconds: float


@dataclass
class Device:
    """What a process knows about the device that it measured."""

    backend: str
    asynchronous: bool  # whether it works behind the host
    description: str
    precision: str  # the backend's default
    memory_bytes: int
    matrix_units: int
    peak_tflops: float | None  # the vendor's, where known
    threads: int
    versions: str
    samples: list[Sample] = field(default_factory=list)


def median_seconds(
    call: Callable[[], object],
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over `ROUNDS` rounds of the seconds of one call; a round repeats it for some
    milliseconds."""
    call()
    once = _seconds(call, 1, synchronize, clock)
    repeats = max(1, round(LEAST_SECONDS / max(once, 1e-7)))
    return statistics.median(_seconds(call, repeats, synchronize, clock) for _ in range(ROUNDS))


def _seconds(
    call: Callable[[], object],
    repeats: int,
    synchronize: Callable[[], None],
    clock: Callable[[], float],
) -> float:
    synchronize()
    started = clock()
    for _ in range(repeats):
        call()
    synchronize()
    return (clock() - started) / repeats
