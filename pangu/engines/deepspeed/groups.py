"""megatron-core's process groups, under the names by which DeepSpeed asks for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

EXPERTS = "experts"  # DeepSpeed knows expert groups by a name


class DataParallelGroups:
    """DeepSpeed's `mpu`: the data-parallel ranks, and each rank alone with its whole model."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


def mark_experts(model: torch.nn.Module) -> None:
    """Tell DeepSpeed which parameters are experts', whose copies are on the ranks of the
    expert-data group alone.

    With one expert-parallel rank that group is the data-parallel one, and they are as all others.
    Else DeepSpeed looks for a layer of its own class before it asks for expert groups: a module
    without parameters stands for one. It divides their gradients by the data-parallel size, as it
    does all others', and sums them over the expert-data group: each token has come to one copy.
    """
    spread = parallel_state.get_expert_model_parallel_world_size() > 1
    experts = [p for p in model.parameters() if not getattr(p, "allreduce", True)]
    for parameter in experts:
        parameter.allreduce = not spread  # type: ignore[attr-defined]
        parameter.group_name = EXPERTS  # type: ignore[attr-defined]
    if not (spread and experts):
        return

    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Experts(MoE):
        """Gives DeepSpeed the expert groups that there are, where its own would make others."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            ranks = parallel_state.get_expert_model_parallel_group()
            copies = parallel_state.get_expert_data_parallel_group()
            groups._EXPERT_PARALLEL_GROUP[EXPERTS] = ranks
            groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = copies

    model.add_module("expert_groups", Experts())


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether the expert-parallel ranks hold others in its place."""
    return not getattr(parameter, "allreduce", True)
