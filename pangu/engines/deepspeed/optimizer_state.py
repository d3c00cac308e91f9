"""Where DeepSpeed keeps AdamW's state: by parameter (stage 0), or in flat tensors of which each
rank has an equal piece (stages 1 to 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pangu.engines.state_parts import Part


def parts(replica: Any, adam: torch.optim.Optimizer) -> list[Part]:
    """One part per trained parameter, in the same order on all ranks that share them."""
    stage = replica.zero_optimization_stage()
    if stage == 3:
        return list(_cut_weights(replica.optimizer, adam))
    if stage > 0:
        return list(_cut_groups(replica.optimizer, adam))
    groups = [group["params"] for group in adam.param_groups]
    return [Part(p, adam, p, 0, p.numel(), None) for group in groups for p in group]


def _cut_groups(optimizer: Any, adam: torch.optim.Optimizer) -> Iterator[Part]:
    """Stages 1 and 2: all parameters of a group in one flat tensor, cut into equal pieces."""
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        ranks = optimizer.real_dp_process_group[group]
        for parameter in optimizer.bit16_groups[group]:
            held = parameter._hp_mapping
            if held is None:
                yield Part(parameter, adam, None, 0, 0, ranks)
                continue
            start = held.lp_fragment_address.start
            end = start + held.lp_fragment_address.numel
            offset = held.hp_fragment_address.start
            main = flat.detach()[offset : offset + end - start]
            yield Part(parameter, adam, main, start, end, ranks, flat, offset)


def _cut_weights(optimizer: Any, adam: torch.optim.Optimizer) -> Iterator[Part]:
    """Stage 3: every parameter cut into equal pieces, this rank's of a group in one flat tensor."""
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[group]
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = min(parameter.ds_process_group.rank() * size, parameter.ds_numel)
            end = min(start + size, parameter.ds_numel)
            main = flat.detach()[offset : offset + end - start]
            ranks = parameter.ds_process_group
            yield Part(parameter, adam, main, start, end, ranks, flat, offset)
            offset += size
