"""Low-rank products beside the weights of routed experts, which alone are trained: LoRA
(arXiv 2106.09685), an A and a B for each expert.

Shapes: N rows sorted by expert, E local experts, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)

from pangu import backends
from pangu.ops.grouped_matmul import grouped_matmul


def expert_parameter(
    config: Any,
    shape: tuple[int, ...],
    partition_dim: int,
    ep_group: dist.ProcessGroup,
) -> torch.nn.Parameter:
    """An empty weight `[E, …]` of this rank's experts, cut over the expert-tensor-parallel ranks
    along `partition_dim`; `GroupedExperts` says what its attributes mean."""
    values = torch.empty(shape, dtype=config.params_dtype, device=backends.current().device)
    parameter: Any = torch.nn.Parameter(values)
    parameter.allreduce = False
    parameter.tensor_model_parallel = True
    parameter.partition_dim, parameter.partition_stride = partition_dim, 1
    first = ep_group.rank() * shape[0]
    parameter.global_expert_indices = list(range(first, first + shape[0]))
    return parameter


class ExpertAdapter(torch.nn.Module):
    """Beside a weight `[E, I, …O]` of `experts`: `lora_a` `[E, I, r]` and `lora_b` `[E, r, …O]`.

    Of both, every expert-tensor-parallel rank keeps a part, as of the weight. The matrix along
    whose inputs or outputs the weight is not cut is gathered for each call: so no gradient has
    copies that would have to be summed or counted apart.
    """

    def __init__(self, experts: Any, weight: Any) -> None:
        super().__init__()
        self.config, self.tp_group = experts.config, experts.tp_group
        count, inputs, *outputs = weight.shape
        self.cut_by_outputs = weight.partition_dim > 1
        ranks, rank = self.tp_group.size(), self.config.lora_rank
        if self.cut_by_outputs:
            inputs //= ranks
        else:
            outputs[-1] //= ranks
        into, out = (count, inputs, rank), (count, rank, *outputs)
        self.lora_a = expert_parameter(self.config, into, 1, experts.ep_group)
        self.lora_b = expert_parameter(self.config, out, len(out) - 1, experts.ep_group)

    def forward(self, rows_NI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """α/r · x·A·B of each row's expert, `[N, O]`; where inputs are cut it is this rank's
        addend."""
        a_EIr: torch.Tensor = self.lora_a
        b_ErO = self.lora_b.flatten(2)
        if self.cut_by_outputs:
            a_EIr = self._whole(a_EIr, 1)
        else:
            b_ErO = self._whole(b_ErO, 2)
        low_Nr = grouped_matmul(self._dropped(rows_NI), a_EIr, counts_E)
        return grouped_matmul(low_Nr, b_ErO, counts_E) * (
            self.config.lora_alpha / self.config.lora_rank
        )

    def _whole(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """Gathered along `dim`; the gradients of all ranks are summed, and each takes its part."""
        if self.tp_group.size() == 1:
            return part
        first = part.transpose(0, dim).contiguous()
        gathered = gather_from_sequence_parallel_region(first, group=self.tp_group)
        return gathered.transpose(0, dim).contiguous()

    def _dropped(self, rows_NI: torch.Tensor) -> torch.Tensor:
        """Ranks hold different rows, or different inputs of them, and draw different masks."""
        part = self.config.lora_dropout
        if not part or not self.training:
            return rows_NI
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return F.dropout(rows_NI, part)
