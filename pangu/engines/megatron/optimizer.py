"""megatron-core's gradient buffers and AdamW around the model chunks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

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
    settings.finalize_model_grads_func = finalize
    return wrapped


def finalize(
    chunks: list[DistributedDataParallel], tokens: torch.Tensor | None, **others: Any
) -> None:
    """Gradients of a global batch, summed over all ranks and divided by its tokens: `tokens`, int
    of one element, of this rank, which only last stages have; None leaves them sums.

    The engine asks on the host whether there are any tokens, and waits for the device; without any
    there is no gradient either.
    """
    finalize_model_grads(chunks, None, **others)
    if tokens is None:
        return
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(tokens, last, parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(
        tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    for chunk in chunks:
        chunk.scale_gradients(1.0 / tokens.clamp(min=1))


def shards_optimizer(config: Config) -> bool:
    """Whether the optimizer's state is spread over data-parallel ranks. With one rank there is
    nothing to spread, and the sharded step would only copy every buffer twice."""
    ranks = config.data_parallel_size * config.parallel.context_parallel_size
    return config.parallel.zero_stage > 0 and ranks > 1


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """AdamW over all chunks; sharded over data-parallel ranks unless `zero_stage` is 0.

    Only matrices decay: embeddings, projections, experts, routers. The gains of norms, biases and
    the router's scale, all of one dimension, do not.
    """
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
            params_dtype=dtype,
            use_distributed_optimizer=shards_optimizer(config),
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        # The engine leaves this product to its own scheduler, which is not used here.
        group["weight_decay"] = o.weight_decay * group["wd_mult"]
    if backends.current().fused_adamw:
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def torch_optimizers(optimizer: ChainedOptimizer) -> list[torch.optim.Optimizer]:
    """Those that hold the moments."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]


@torch.no_grad()
def apply_gradients(optimizer: ChainedOptimizer, loss: torch.Tensor) -> float | None:
    """Clip the gradients and step; their norm before clipping, over all ranks.

    None, and nothing has changed, where the loss or a gradient of any rank is not finite: neither
    an infinity nor a NaN can hide in the norm, which is needed anyway.
    """
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    bad = (~torch.isfinite(loss)).any().float().reshape(1)
    bad += not math.isfinite(norm)
    dist.all_reduce(bad)
    if bad.item():
        return None
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm
