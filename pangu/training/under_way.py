"""Steps that are queued on the device: what they did is read when the next one is queued as well,
so that the device never waits for its host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from pangu import backends
from pangu.backends.copies import read_later, scalar
from pangu.backends.whereabouts import here
from pangu.engines.contract import Batch, Engine, StepResult, StepShape
from pangu.engines.placement import ExpertPlacement
from pangu.moe.load import RoutingLoad, launch_load
from pangu.training.metrics import step_row
from pangu.training.profile import Profile
from pangu.training.resilience import StopSignal


@dataclass(frozen=True)
class Planned:
    """A step as the host knows it before it is taken; `sequences` are the global batch's."""

    step: int
    learning_rate: float
    sequences: int
    shape: StepShape
    beside: dict[str, str]


@dataclass(frozen=True)
class Over:
    """A step that has been read, with its row of the metrics and what it took."""

    result: StepResult
    load: RoutingLoad | None
    row: dict[str, Any]
    own_seconds: float  # without waiting for other ranks


@dataclass(frozen=True)
class _Queued:
    planned: Planned
    started: float
    waited: float
    placed: dict[str, float]
    result: Callable[[], StepResult]
    load: Callable[[], RoutingLoad | None]
    fullest: Callable[[], torch.Tensor]  # GiB of the fullest rank
    told: Callable[[], torch.Tensor]  # how many ranks have been told to stop


class StepsUnderWay:
    """`ahead`: how many steps may be queued and not read. None where the device is the host, where
    the host must see a step's loads to move experts, or steps are traced."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        *,
        placement: ExpertPlacement,
        profile: Profile,
        stop: StopSignal,
    ) -> None:
        self.config, self.engine, self.placement = config, engine, placement
        self.profile, self.stop = profile, stop
        free = backends.current().asynchronous and not config.profile.steps
        self.ahead = 1 if free and not placement.active else 0
        self._queue: deque[_Queued] = deque()
        self._read_at = (0.0, 0.0)  # when, and how long had been waited by then

    def launch(self, batches: Iterator[Batch], planned: Planned) -> None:
        """Queue a step. Collective."""
        started, waited = time.perf_counter(), here.waited
        here.step = planned.step
        self.engine.set_learning_rate(planned.learning_rate)
        with self.profile.of(planned.step):
            result = self.engine.train_step(batches, planned.shape)
            load = launch_load(self.engine.chunks)
            placed: dict[str, float] = {}
            if self.placement.active:
                placed = self.placement.after_step(planned.step, load())
            fullest = scalar(backends.current().memory_bytes() / 2**30)
            dist.all_reduce(fullest, dist.ReduceOp.MAX)
            told = self.stop.asked() if self.ahead else scalar(0.0)
            if not self.ahead:
                backends.current().synchronize()
        later = read_later(fullest), read_later(told)
        self._queue.append(_Queued(planned, started, waited, placed, result, load, *later))

    def read(self, leave: int) -> Iterator[Over]:
        """The steps that are over, waited for, oldest first, but for the last `leave`. Collective
        in what follows from it: all ranks read the same steps."""
        while len(self._queue) > leave:
            yield self._read(self._queue.popleft())

    def _read(self, queued: _Queued) -> Over:
        result, load = queued.result(), queued.load()
        self.stop.hear(queued.told().item())
        # A step begins when it is queued, or when the one before it is over.
        started, waited = max((queued.started, queued.waited), self._read_at)
        now = self._read_at = time.perf_counter(), here.waited
        planned = queued.planned
        row = step_row(
            self.config,
            result,
            load,
            step=planned.step,
            learning_rate=planned.learning_rate,
            seconds=now[0] - started,
            memory_gib=queued.fullest().item(),
            sequences=planned.sequences,
            seq_length=planned.shape.seq_length,
        )
        own = now[0] - started - (now[1] - waited)
        return Over(result, load, row | queued.placed | planned.beside, own)
