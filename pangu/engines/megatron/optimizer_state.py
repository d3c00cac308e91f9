"""Where megatron-core keeps AdamW's state: in one of three optimizers (plain float32, float16 with
float32 main copies, distributed), chained when experts have groups of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from pangu.engines.state_parts import Part


def weights_of(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """The 16-bit weights of each main copy, or of this rank's piece of one, in one optimizer."""
    if isinstance(optimizer, DistributedOptimizer):
        return dict(_pieces(optimizer))
    if not isinstance(optimizer, Float16OptimizerWithFloat16Params):
        return {}
    groups = zip(optimizer.fp32_from_float16_groups, optimizer.float16_groups, strict=True)
    return {
        main: weights.detach()
        for mains, models in groups
        for main, weights in zip(mains, models, strict=True)
    }


def _pieces(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    groups = (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups)
    for mains, models in zip(*groups, strict=True):
        for main, model in zip(mains, models, strict=True):
            place = optimizer._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            number, _, bucket = optimizer.model_param_gbuf_map[model]
            weights = optimizer.buffers[number].buckets[bucket].param_data.view(-1)
            yield main, weights[place.start : place.end]


def parts(optimizer: ChainedOptimizer) -> list[Part]:
    """One part per parameter, in the same order on all ranks that share the parameters."""
    chained: list[Any] = optimizer.chained_optimizers
    return [part for one in chained if one.optimizer is not None for part in _parts(one)]


def _parts(optimizer: Any) -> Iterator[Part]:
    adam = optimizer.optimizer
    if isinstance(optimizer, DistributedOptimizer):
        group = optimizer.data_parallel_group
        for buffer in optimizer.buffers:
            for parameter in buffer.param_index_map:
                if parameter not in optimizer.model_param_gbuf_map:
                    yield Part(parameter, adam, None, 0, 0, group)
                    continue
                piece = optimizer._get_model_param_range_map(parameter)["param"]
                index, order = optimizer.model_param_group_index_map[parameter]
                main = adam.param_groups[index]["params"][order]
                yield Part(parameter, adam, main, piece.start, piece.end, group)
        return
    main_of: dict[torch.Tensor, torch.Tensor] = {}
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for model, main in zip(
            optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True
        ):
            main_of |= dict(zip(main, model, strict=True))
    for group in adam.param_groups:
        for main in group["params"]:
            parameter = main_of.get(main, main)
            yield Part(parameter, adam, main, 0, main.numel(), None)
