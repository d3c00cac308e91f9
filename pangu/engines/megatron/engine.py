"""megatron-core behind the engine's contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.utils import get_model_config

from configs.schema import Config
from pangu.backends.copies import read_later
from pangu.engines.contract import Batch, StepResult, StepShape, step_result
from pangu.engines.megatron import optimizer_state
from pangu.engines.megatron.optimizer import (
    apply_gradients,
    build_optimizer,
    set_learning_rate,
    torch_optimizers,
    wrap_model,
)
from pangu.engines.megatron.step import count_tokens, mtp_loss, run_schedule
from pangu.engines.state_parts import Part
from pangu.model.build import build_model
from pangu.moe.balancing_bias import balance
from pangu.offload.attach import swap_activations
from pangu.offload.optimizer_state import StateFile


class MegatronEngine:
    """The model chunks in their gradient buffers, and AdamW over them."""

    def __init__(self, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer) -> None:
        self.chunks = chunks
        self.optimizer = optimizer
        self.state_file: StateFile | None = None

    @classmethod
    def build(cls, config: Config) -> MegatronEngine:
        """The initialised model of a configuration, and its optimizer."""
        chunks, settings = build_model(config)
        wrapped = wrap_model(config, settings, chunks)
        folder = Path(config.run_dir)
        if config.memory.swap:
            swap_activations(wrapped, config.memory, folder)
        engine = cls(wrapped, build_optimizer(config, wrapped))
        if config.memory.swap_optimizer:
            engine.state_file = StateFile(folder)
        return engine

    @property
    def data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)

    def train_step(self, batches: Iterator[Batch], shape: StepShape) -> Callable[[], StepResult]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        settings = get_model_config(self.chunks[0])
        micro_batches = list(islice(batches, shape.num_microbatches))
        settings.step = count_tokens(micro_batches, settings)
        total = run_schedule(self.chunks, micro_batches, shape)
        loss = total[0] / total[1]
        ahead = mtp_loss(self.chunks, settings.step)
        norm, bad = apply_gradients(self.optimizer, loss, settings.step.trained)
        if self.state_file:
            self.state_file.put_away(torch_optimizers(self.optimizer))
        balance(self.chunks, settings.moe.expert_bias_update_rate, skipped=bad)
        told = [total.double(), norm.double(), bad.double()]
        told += [] if ahead is None else [ahead.double().reshape(1)]
        values = read_later(torch.cat(told))
        return lambda: step_result(values().tolist())

    def evaluate(self, batches: Iterator[Batch], shape: StepShape) -> float:
        for chunk in self.chunks:
            chunk.eval()
        micro_batches = list(islice(batches, shape.num_microbatches))
        with torch.no_grad():
            total = run_schedule(self.chunks, micro_batches, shape, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return (total[0] / total[1]).item()

    def state_parts(self) -> list[Part]:
        return optimizer_state.parts(self.optimizer)

    def replicas(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def whole_weights(self, *, changing: bool = False) -> AbstractContextManager[None]:
        return nullcontext()
