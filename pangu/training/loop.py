"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from configs.schema import Config
from pangu import backends
from pangu.data.datasets import Datasets, batches, build_datasets
from pangu.moe.load import read_load
from pangu.training import schedule
from pangu.training.expert_load import LoadWindow
from pangu.training.metrics import MetricsFile, step_row
from pangu.training.optimizer import set_learning_rate
from pangu.training.progress import Progress
from pangu.training.state import RunState
from pangu.training.step import Batch, StepShape, evaluate, train_step

LOAD_INTERVAL = 100  # steps over which an expert that nobody chose counts as dead


@dataclass
class Trainer:
    """Everything a run holds on this rank."""

    config: Config
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    phase: schedule.PhaseAt
    datasets: Datasets
    state: RunState
    metrics: MetricsFile
    load: LoadWindow

    def train(self) -> None:
        """Run from the current state to the last step."""
        self.metrics.continue_after(self.state.step)
        rank, devices = dist.get_rank(), dist.get_world_size()
        with Progress(self.config, self.state.step, active=rank == 0, devices=devices) as progress:
            train_batches = self.train_batches()
            while self.state.step < self.config.train.steps:
                if self.enter_phase():
                    train_batches = self.train_batches()
                row = self.one_step(train_batches)
                self.metrics.write(row)
                progress.show(row)
                if self.due(LOAD_INTERVAL) and (dead := self.load.end_interval()):
                    progress.warn(dead)
                if self.datasets.validation and self.due(self.config.train.validate_every):
                    loss = self.validate()
                    self.metrics.write({"step": self.state.step, "validation_loss": loss})
                    progress.show_validation(self.state.step, loss)
        self.metrics.close()

    def enter_phase(self) -> bool:
        """Change data when the next step belongs to another phase; whether it does."""
        phase = schedule.phase_at(self.config, self.state.step)
        if phase == self.phase:
            return False
        self.phase, self.datasets = phase, phase_datasets(self.config, phase)
        self.state.consumed_sequences = 0
        return True

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        step = self.state.step
        return bool(every) and (step % every == 0 or step == self.config.train.steps)

    def one_step(self, train_batches: list[Iterator[Batch]]) -> dict[str, Any]:
        """Take one step and describe it."""
        started = time.perf_counter()
        lr = schedule.learning_rate(self.config, self.state.step)
        set_learning_rate(self.optimizer, lr)
        shape = self.shape()
        sequences = schedule.global_batch_size(self.config, self.phase.phase)
        result = train_step(self.chunks, self.optimizer, train_batches, shape)
        load = read_load(self.chunks)
        backends.current().synchronize()
        seconds = time.perf_counter() - started
        self.state.step += 1
        self.state.consumed_sequences += sequences
        if load:
            self.load.add(self.state.step, load.counts)
        return step_row(
            self.config,
            result,
            load,
            step=self.state.step,
            learning_rate=lr,
            seconds=seconds,
            sequences=sequences,
            seq_length=shape.seq_length,
        )

    def shape(self) -> StepShape:
        """What this replica computes per step."""
        phase, micro = self.phase.phase, self.config.train.micro_batch_size
        replicas = parallel_state.get_data_parallel_world_size()
        batch = schedule.global_batch_size(self.config, phase)
        return StepShape(batch // replicas // micro, micro, schedule.seq_length(self.config, phase))

    def train_batches(self) -> list[Iterator[Batch]]:
        """The training data from here on, one iterator per model chunk."""
        return self._iterators(self.datasets.train, self.state.consumed_sequences)

    def validate(self) -> float:
        """Held-out loss over `train.validation_batches` global batches, always the same ones."""
        iterators = self._iterators(self.datasets.validation, 0)
        rounds = self.config.train.validation_batches
        return sum(evaluate(self.chunks, iterators, self.shape()) for _ in range(rounds)) / rounds

    def _iterators(self, dataset: Any, consumed: int) -> list[Iterator[Batch]]:
        return [
            batches(
                dataset,
                self.config,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                consumed_sequences=consumed,
                micro_batch_size=self.config.train.micro_batch_size,
            )
            for _ in self.chunks
        ]


def phase_datasets(config: Config, at: schedule.PhaseAt) -> Datasets:
    """The data of one phase. Each phase has an order of its own, from the seed and its first
    step, so that the same corpus is not read twice in the same order."""
    sequences = schedule.global_batch_size(config, at.phase)
    return build_datasets(
        replace(config, seed=config.seed + at.first_step),
        train_samples=at.phase.steps * sequences,
        validation_samples=config.train.validation_batches * sequences,
        seq_length=schedule.seq_length(config, at.phase),
    )


def run_folder(config: Config) -> Path:
    """Where the run keeps its files."""
    return Path(config.run_dir)
