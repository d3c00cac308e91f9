"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from tqdm import tqdm

from configs.schema import Config
from pangu import backends
from pangu.data.datasets import Datasets, batches
from pangu.training import schedule
from pangu.training.metrics import MetricsFile
from pangu.training.optimizer import set_learning_rate
from pangu.training.state import RunState
from pangu.training.step import Batch, StepShape, evaluate, train_step


@dataclass
class Trainer:
    """Everything a run holds on this rank."""

    config: Config
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    datasets: Datasets
    state: RunState
    metrics: MetricsFile

    def train(self) -> None:
        """Run from the current state to the last step."""
        last = self.config.train.steps
        with tqdm(
            total=last, initial=self.state.step, disable=dist.get_rank() != 0, unit="step"
        ) as bar:
            train_batches = self.train_batches()
            while self.state.step < last:
                row = self.one_step(train_batches)
                self.metrics.write(row)
                bar.set_postfix_str(
                    f"loss {row['loss']:.3f}, {row['tokens_per_second_per_device']:.0f} tokens/s"
                )
                bar.update()
                if self.due(self.config.train.validate_every):
                    self.metrics.write(
                        {"step": self.state.step, "validation_loss": self.validate()}
                    )

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        step = self.state.step
        return bool(every) and (step % every == 0 or step == self.config.train.steps)

    def one_step(self, train_batches: list[Iterator[Batch]]) -> dict[str, Any]:
        """Take one step and describe it."""
        started = time.perf_counter()
        lr = schedule.learning_rate(self.config, self.state.step)
        set_learning_rate(self.optimizer, lr)
        result = train_step(self.chunks, self.optimizer, train_batches, self.shape())
        backends.current().synchronize()
        seconds = time.perf_counter() - started
        self.state.step += 1
        self.state.consumed_sequences += self.config.train.global_batch_size
        return {
            "step": self.state.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "tokens": result.tokens,
            "step_seconds": seconds,
            "tokens_per_second_per_device": result.tokens / seconds / dist.get_world_size(),
        }

    def shape(self) -> StepShape:
        """What this replica computes per step."""
        t = self.config.train
        replicas = parallel_state.get_data_parallel_world_size()
        return StepShape(
            t.global_batch_size // replicas // t.micro_batch_size,
            t.micro_batch_size,
            t.seq_length,
        )

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


def run_folder(config: Config) -> Path:
    """Where the run keeps its files."""
    return Path(config.run_dir)
