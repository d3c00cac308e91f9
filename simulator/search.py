"""Every layout × micro-batch × recomputation policy of a cluster, counted and priced.

Candidates (see `simulator.candidates`) go through `simulator.evaluate`; the best are forecast again
event by event.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.candidates import (
    KEYS,
    candidates,
    configure,
    enumerate_layouts,
    recompute_policies,
)
from simulator.evaluate import evaluate
from simulator.hardware import load_hardware
from simulator.layout import Layout
from simulator.memory import fits
from simulator.predict import Forecast, predict

# What a recommended peak may turn out higher by: forecasts of this trainer's peaks were up to 5 %
# low (docs/simulator.md).
MARGIN = 0.05
CHUNK = 16_384  # layouts evaluated at once: arrays that stay in a core's cache
MOST = 20_000_000  # evaluations whose results fit into memory and an evening's patience
PARALLEL_ABOVE = 100_000  # evaluations that are worth a second process


@dataclass(frozen=True)
class Choice:
    """One layout of the ranking and its forecast."""

    config: Config
    prediction: Forecast

    @property
    def headroom_gib(self) -> float:
        return self.prediction.memory_gib - self.prediction.peak_memory_gib


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search. `rejected` counts candidates by the first reason against them,
    `evaluated` those that were counted and priced in full, `least_gib` is the smallest of their
    peaks (infinite where there is none)."""

    choices: list[Choice]
    pareto: list[Choice]
    rejected: dict[str, int]
    candidates: int
    evaluated: int
    fitting: int
    seconds: float
    throughput: np.ndarray = field(repr=False)  # of every fitting candidate
    peak_gib: np.ndarray = field(repr=False)
    least_gib: float = np.inf
    memory_gib: float = 0.0  # of a device

    @property
    def why_none(self) -> str:
        """Why no layout is left: memory, if any got as far as that."""
        if self.evaluated:
            return (
                f"none of {self.evaluated:,} layouts fits: the smallest peak is"
                f" {self.least_gib:.1f} of {self.memory_gib:.1f} GiB"
            )
        most = max(self.rejected, key=lambda reason: self.rejected[reason])
        number = self.rejected[most]
        return f"no layout works: {number:,} of {self.candidates:,} rejected because {most}"


def _refuse_layout(config: Config, pinned: frozenset[str]) -> None:
    if config.parallel.pipeline_layout is not None and KEYS["deal"] in pinned:
        reason = "a search deals the layers to the stages itself"
        layout = config.parallel.pipeline_layout
        raise ConfigError([Violation(KEYS["deal"], layout, reason, "leave it out")])


def _refuse_too_many(count: int, most: int) -> None:
    if count > most:
        reason = f"more than {most:,} evaluations"
        hint = "pin some sizes, e.g. parallel.tensor_model_parallel_size=8"
        raise ConfigError([Violation("search", f"{count:,}", reason, hint)])


def search(
    config: Config,
    *,
    pinned: frozenset[str] = frozenset(),
    everything: bool = False,
    top: int = 10,
    most: int | None = None,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Rank the layouts of `config.devices` devices for its model and global batch.

    A layout is offered if it fits with `MARGIN` to spare.

    Args:
        pinned: configuration keys that keep their value.
        everything: also what only the simulator plans (every schedule, ZeRO stage and way of
            context parallelism, swapping) and experts cut over part of the tensor-parallel ranks.
        top: how many layouts to return; of those that only recompute differently, the fastest.
        most, processes: evaluations allowed, and who share them (1: a caller with threads).
        progress: called with evaluations done and in all.

    Raises:
        ConfigError: there are too many candidates.
    """
    start = time.perf_counter()
    _refuse_layout(config, pinned)
    structures, rejected = enumerate_layouts(config, pinned, everything)
    policies = recompute_policies(config, pinned, everything)
    for reason in rejected:
        rejected[reason] *= len(policies)
    count = np.size(structures.tp) * len(policies)
    _refuse_too_many(count, most or MOST)
    considered = count + sum(rejected.values())
    step, peak, outside = _evaluate_all(config, structures, policies, processes, progress)
    hardware = load_hardware(config.hardware)
    fitting = np.asarray(fits(hardware, peak, outside, MARGIN))
    too_large = f"needs more memory than the device has, {MARGIN:.0%} kept as margin"
    rejected[too_large] = int(count - fitting.sum())
    order = np.flatnonzero(fitting)
    order = order[np.argsort(step[order], kind="stable")]
    fastest = itertools.islice(_first_of_each(order, len(policies)), 2 * top)
    choice = cache(partial(_choice, config, structures, policies))  # the front shares the fastest
    choices = sorted(map(choice, fastest), key=lambda c: c.prediction.step_seconds)[:top]
    return SearchResult(
        choices,
        [choice(int(index)) for index in _pareto(order, peak)],
        {reason: number for reason, number in rejected.items() if number},
        considered,
        count,
        int(fitting.sum()),
        time.perf_counter() - start,
        config.train.global_batch_size
        * config.train.seq_length
        / step[fitting]
        / config.world_size,
        peak[fitting] / 2**30,
        float(peak.min(initial=np.inf)) / 2**30,
        hardware.memory_gib,
    )


def _choice(
    config: Config, structures: Layout, policies: list[dict[str, Any]], index: int
) -> Choice:
    layout = candidates(structures, policies, np.array([index])).take(0)
    one = configure(config, layout)
    return Choice(one, predict(one))


def _evaluate_chunk(
    config: Config, structures: Layout, policies: list[dict[str, Any]], first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    layouts = candidates(structures, policies, np.arange(first, last))
    result = evaluate(config, layouts)
    whole = (last - first,)
    return (
        np.broadcast_to(result.step_seconds, whole),
        np.broadcast_to(result.peak_memory_bytes, whole),
        np.broadcast_to(result.buffer_bytes, whole),
    )


def _evaluate_all(
    config: Config,
    structures: Layout,
    policies: list[dict[str, Any]],
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step seconds, peak and buffer bytes of every candidate."""
    count = np.size(structures.tp) * len(policies)
    starts = range(0, count, CHUNK)
    ends = [min(first + CHUNK, count) for first in starts]
    work = partial(_evaluate_chunk, config, structures, policies)
    results = []
    if count > PARALLEL_ABOVE and processes > 1:
        with ProcessPoolExecutor(max_workers=processes) as pool:
            for done, result in zip(ends, pool.map(work, starts, ends), strict=True):
                results.append(result)
                if progress:
                    progress(done, count)
    else:
        for first, last in zip(starts, ends, strict=True):
            results.append(work(first, last))
            if progress:
                progress(last, count)
    if not results:
        return (np.empty(0),) * 3
    step, peak, outside = (np.concatenate(part) for part in zip(*results, strict=True))
    return step, peak, outside


def _first_of_each(order: np.ndarray, policies: int) -> Iterator[int]:
    """The fastest candidate of every structure, in order."""
    seen: set[int] = set()
    for index in order:
        structure = int(index) // policies
        if structure not in seen:
            seen.add(structure)
            yield int(index)


def _pareto(order: np.ndarray, peak: np.ndarray, limit: int = 12) -> list[int]:
    """Candidates, fastest first, each of which needs at least 2 % less memory than all that are
    faster; of more than `limit` some that are spread from the fastest to that of least memory."""
    front: list[int] = []
    least = np.inf
    for index in order:
        if peak[index] < 0.98 * least:
            least = peak[index]
            front.append(int(index))
    if len(front) <= limit:
        return front
    return [front[place] for place in np.linspace(0, len(front) - 1, limit).round().astype(int)]
