"""megatron-core's gradient buffers and AdamW around the model chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from configs.schema import Config
from pangu import backends
from pangu.model.transformer_config import PanguTransformerConfig


def wrap_model(
    config: Config, settings: PanguTransformerConfig, chunks: list[GPTModel]
) -> list[DistributedDataParallel]:
    """Give every chunk its gradient buffers (float32, summed over data-parallel ranks)."""
    p = config.parallel
    double = settings.params_dtype is torch.float64
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not double,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        use_distributed_optimizer=shards_optimizer(config),
    )
    wrapped = [
        DistributedDataParallel(settings, buffers, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    settings.no_sync_func = [chunk.no_sync for chunk in wrapped]
    if len(wrapped) == 1:
        settings.no_sync_func = settings.no_sync_func[0]
    if p.overlap_grad_reduce:
        settings.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
        if len(wrapped) == 1:
            settings.grad_sync_func = settings.grad_sync_func[0]
    settings.finalize_model_grads_func = finalize_model_grads
    return wrapped


def shards_optimizer(config: Config) -> bool:
    """Whether the optimizer's state is spread over data-parallel ranks. With one rank there is
    nothing to spread, and the sharded step would only copy every buffer twice."""
    ranks = config.data_parallel_size * config.parallel.context_parallel_size
    return config.parallel.zero_stage > 0 and ranks > 1


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over all chunks; sharded over data-parallel ranks unless `zero_stage` is 0."""
    o, dtype = config.optimizer, backends.torch_dtype(config.backend.precision)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.adam_beta1,
            adam_beta2=o.adam_beta2,
            adam_eps=o.adam_eps,
            clip_grad=o.clip_grad,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            params_dtype=dtype,
            use_distributed_optimizer=shards_optimizer(config),
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    if backends.current().fused_adamw:
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def gradients_are_finite(chunks: list[DistributedDataParallel], loss: torch.Tensor) -> bool:
    """Whether the loss and every gradient of every rank is a number. One pass over the buffers."""
    bad = (~torch.isfinite(loss)).any().float().reshape(1)
    for chunk in chunks:
        buffers: list[Any] = [*chunk.buffers, *chunk.expert_parallel_buffers]
        for buffer in buffers:
            # A sum is one pass, and neither an infinity nor a NaN can hide in it.
            bad += ~torch.isfinite(buffer.grad_data.sum())
    dist.all_reduce(bad)
    return bad.item() == 0
