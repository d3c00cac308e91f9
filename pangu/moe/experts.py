"""The routed experts of one rank: SwiGLU MLPs whose weights are stacked.

Shapes: N rows sorted by expert, E local experts, H hidden, F width of this rank's slice.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from pangu.moe.adapters import ExpertAdapter, expert_parameter
from pangu.ops.grouped_matmul import Postponed, grouped_matmul, postpone
from pangu.ops.rounded_linear import input_rounding
from pangu.ops.swiglu import swiglu


class WeightedActivation(torch.nn.Module):
    """SwiGLU times the routing weight, before the second product, rounded where that is asked."""

    def __init__(self, rounding: torch.nn.Module) -> None:
        super().__init__()
        self.input_rounding = rounding

    def forward(self, hidden_N2F: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """`[N, 2F]` and `[N]` → `[N, F]`."""
        rounded_NF: torch.Tensor = self.input_rounding(swiglu(hidden_N2F, weights_N))
        return rounded_NF


class GroupedExperts(MegatronModule):
    """All experts of this rank in two grouped matrix products.

    `w1` is `[E, H, 2, F]` (gate, then up) and `w2` `[E, F, H]`. Dimension 0 is split over the
    expert-parallel ranks, F over the expert-tensor-parallel ranks; with gate and up in a dimension
    of their own every rank's part is one block of the whole, and no split needs to know of them.
    LoRA's matrices beside them are split like them.

    On each parameter: `partition_dim` is the dimension that is split, `partition_stride` is 1,
    `global_expert_indices` names the experts in dimension 0. `allreduce = False` in every layout
    (megatron-core: gradients belong to the *expert* data-parallel group), so that expert tensor
    parallelism may differ from tensor parallelism and optimizer states have the same names
    whatever the layout.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        slice_width = width // self.tp_group.size()
        into = (num_local_experts, hidden, 2, slice_width)
        out = (num_local_experts, slice_width, hidden)
        self.w1 = expert_parameter(config, into, 3, self.ep_group)
        self.w2 = expert_parameter(config, out, 1, self.ep_group)
        if config.perform_initialization:
            config.init_method(self.w1)
            config.output_layer_init_method(self.w2)
        adapted: frozenset[str] = getattr(config, "lora_modules", frozenset())
        self.w1_adapter = ExpertAdapter(self, self.w1) if "experts_fc1" in adapted else None
        self.w2_adapter = ExpertAdapter(self, self.w2) if "experts_fc2" in adapted else None
        self.input_rounding = input_rounding(config, hidden)  # one for all experts
        self.activate = WeightedActivation(input_rounding(config, width, self.tp_group))
        # Also of a plain configuration of megatron-core, which has no such field.
        self.recomputed: frozenset[str] = getattr(config, "recomputed", frozenset())

    def postponed(self, before: Postponed | None = None) -> Postponed:
        """`w1` and `w2` for one call of `forward`, whose gradients are made where the backward pass
        comes to this call; `before`, those of the call before in the same pass."""
        return postpone((self.w1, self.w2), before)

    def forward(
        self,
        rows_NH: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        weights_N: torch.Tensor,
        postponed: Postponed | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Each row through its expert, times its routing weight (applied after SwiGLU, before the
        second product): `[N, H]`. With expert tensor parallelism it is this rank's addend.

        `tokens_per_expert` holds E integers, on the host or the device.
        """
        counts_E = tokens_per_expert
        (w1, w2), (later1, later2) = postponed or ((self.w1, self.w2), (None, None))
        if postponed and "moe_fc1" in self.recomputed:
            w1 = w1.detach()  # its product is in the recomputation's own graph, which ends earlier

        def first(rows_NH: torch.Tensor) -> torch.Tensor:
            rows_NH = self.input_rounding(rows_NH)
            whole_EHG = w1.flatten(2)
            inner = grouped_matmul(rows_NH, whole_EHG, counts_E, parameter=self.w1, later=later1)
            return inner if self.w1_adapter is None else inner + self.w1_adapter(rows_NH, counts_E)

        def both(rows_NH: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
            return self.activate(first(rows_NH), weights_N)

        checkpoint = CheckpointWithoutOutput(fp8=None)  # None, not False, turns FP8 off
        if "moe_fc1" in self.recomputed:
            activated_NF = checkpoint.checkpoint(both, rows_NH, weights_N)
        elif "moe_act" in self.recomputed:
            activated_NF = checkpoint.checkpoint(self.activate, first(rows_NH), weights_N)
        else:
            activated_NF = both(rows_NH, weights_N)
        output_NH = grouped_matmul(activated_NF, w2, counts_E, parameter=self.w2, later=later2)
        if self.w2_adapter is not None:
            output_NH = output_NH + self.w2_adapter(activated_NF, counts_E)
        if {"moe_fc1", "moe_act"} & self.recomputed:
            checkpoint.discard_output_and_register_recompute(output_NH)
        return output_NH, None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """One global tensor per weight, numbered by global expert: any EP, ETP, TP, PP or DP can
        read what any other wrote. Transforms of inputs are the same on all ranks."""
        prepended = len(sharded_offsets)
        same = make_sharded_tensors_for_checkpoint(
            dict(self.named_buffers()), prefix, sharded_offsets=sharded_offsets
        )
        return same | {
            prefix + name: ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *sharded_offsets,
                (prepended, self.ep_group.rank(), self.ep_group.size()),
                (prepended + parameter.partition_dim, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=prepended,
            )
            for name, parameter in self.named_parameters()
        }
