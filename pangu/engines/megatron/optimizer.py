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
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer

from configs.schema import Config
from pangu import backends
from pangu.engines.megatron import optimizer_state
from pangu.engines.megatron.adamw import AdamW
from pangu.model.transformer_config import PanguTransformerConfig
from pangu.ops.total_norm import total_norm


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


def finalize(chunks: list[DistributedDataParallel], tokens: Any, **others: Any) -> None:
    """Gradients of a global batch, summed over all ranks. The engine would divide them by its
    tokens in a pass of their own, and ask on the host whether there are any: AdamW does as it
    reads."""
    finalize_model_grads(chunks, None, **others)


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
    moments = torch.bfloat16 if o.moments_dtype == "bf16" else None
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            groups, weights = part.optimizer.param_groups, optimizer_state.weights_of(part)
            part.optimizer = AdamW(groups, moments, weights)
            part._copy_main_params_to_model_params = _already_copied
    return optimizer


def _already_copied() -> None:
    """Weights in 16 bits are written where their main copies are."""


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def torch_optimizers(optimizer: ChainedOptimizer) -> list[AdamW]:
    """Those that hold the moments."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]


def gradient_norm(optimizer: ChainedOptimizer) -> torch.Tensor:
    """Of all gradients, as they lie, over all ranks, `[1]` on the device, at least float32.
    Collective."""
    squares = torch.zeros(1, device=backends.current().device)
    for part in optimizer.chained_optimizers:
        square = total_norm(part.get_main_grads_for_grad_norm()).square().reshape(1)
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        squares = squares + square
    return squares.sqrt()


@torch.no_grad()
def apply_gradients(
    optimizer: ChainedOptimizer, loss: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the gradients by the `tokens` of the global batch, clip them and step. (Their norm
    before clipping, over all ranks; 1 where nothing has changed, else 0), each `[1]` on the device.
    Collective.

    Nothing changes where the loss or a gradient of any rank is not finite: neither an infinity nor
    a NaN can hide in the norm, which is needed anyway.
    """
    optimizer.prepare_grads()
    part = 1 / tokens.clamp(min=1).float()
    norm = gradient_norm(optimizer) * part
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    unlike = (~finite).float()
    dist.all_reduce(unlike)
    bad = (unlike > 0).float()
    limit = optimizer.config.clip_grad
    clip = (limit / (norm + 1e-6)).clamp(max=1).float() if limit > 0 else torch.ones_like(bad)
    for adam in torch_optimizers(optimizer):
        adam.clip, adam.bad = clip * part, bad
    optimizer.step_with_ready_grads()
    return norm, bad
