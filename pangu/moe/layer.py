"""The MoE layer: router → dispatcher → experts → combine, plus the shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from configs.dispatch import dispatcher
from pangu.moe.chunks import ChunkedPass
from pangu.moe.config import MoETransformerConfig
from pangu.moe.dispatch import DISPATCHERS, Dispatcher
from pangu.moe.dispatch.choices import choices_per_token
from pangu.moe.dispatch.dispatcher import DispatchRecord
from pangu.moe.dispatch.messages import nothing
from pangu.moe.experts import GroupedExperts
from pangu.moe.placement import Order
from pangu.moe.router import ExpertRouter
from pangu.ops import packed_weights
from pangu.ops.dense_mlp import dense_mlp, is_plain
from pangu.ops.grouped_matmul import Postponed
from pangu.ops.lora_linear import column, row


class ExpertLayer(MoELayer):
    """Megatron-core's MoE layer with the dispatcher of `config.moe`, whose stages are handed a
    record of the call: micro-batches may be under way in it side by side."""

    token_dispatcher: Dispatcher[Any]

    def __init__(
        self,
        config: MoETransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, groups)
        kind = dispatcher(config.moe, groups.ep.size(), groups.expt_tp.size())
        self.token_dispatcher = DISPATCHERS[kind](
            self.num_local_experts, config, groups, choices_per_token(config.moe)
        )
        self.expert_of_slot: torch.Tensor | None = None

    def place(self, order: Order | None) -> None:
        """From now on slot i, counted over all ranks, holds expert `order[i]`; None: expert i."""
        device = self.router.weight.device
        self.expert_of_slot = None if order is None else torch.from_numpy(order).to(device)

    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and map `[T, E]` by slot, which is all that dispatchers know of; the router and
        its counts know experts."""
        weights_TE, chosen_TE = super().route(hidden_states, padding_mask)
        if self.expert_of_slot is None:
            return weights_TE, chosen_TE
        slots = self.expert_of_slot
        return weights_TE.index_select(1, slots), chosen_TE.index_select(1, slots)

    @property
    def combine_dtype(self) -> torch.dtype:
        """In which experts' outputs are summed and travel."""
        kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
        return kinds.get(self.config.moe.combine_dtype, self.config.params_dtype)

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> tuple[torch.Tensor, None]:
        """Hidden states `[S, B, H]` to the same shape; the second is the engine's bias, of which
        there is none.

        Raises:
            ValueError: a padding mask or a part of a captured graph is given; or tensor
                parallelism without sequence parallelism, where ranks would route the same tokens.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"the MoE layer takes hidden states alone, not {', '.join(given)}")
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("experts with tensor parallelism need parallel.sequence_parallel=true")
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self.compute, False, hidden_states), None
        return self.compute(hidden_states), None

    def compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All stages; the shared expert while tokens are on their way, and, where micro-batches
        overlap, the experts' weight gradients while those of tokens are. In training tokens may be
        cut into chunks, and go beside each other's experts."""
        if self.config.moe.dispatch_chunks > 1 and self.training:
            return ChunkedPass(self, hidden_states).output()
        shared: list[torch.Tensor | None] = []
        postponed: list[Postponed] = []
        made: list[tuple[DispatchRecord, torch.Tensor]] = []
        again = "moe_permute" in self.config.recomputed and torch.is_grad_enabled()
        delays = self.config.overlap_moe_expert_parallel_comm and not again

        def meanwhile() -> None:
            if delays:
                postponed.append(self.experts.postponed())
            shared.append(self.shared_experts_compute(hidden_states))

        def to_experts(
            hidden_states: torch.Tensor, meanwhile: Callable[[], None] = nothing
        ) -> tuple[torch.Tensor, torch.Tensor]:
            record, rows_NH, counts_X, weights_N = self._to_experts(hidden_states, meanwhile)
            made.append((record, counts_X))
            return rows_NH, weights_N

        checkpoint = CheckpointWithoutOutput(fp8=None)  # None, not False, turns FP8 off
        if again:
            meanwhile()  # not a part of what is computed once more
            rows_NH, weights_N = checkpoint.checkpoint(to_experts, hidden_states)
        else:
            rows_NH, weights_N = to_experts(hidden_states, meanwhile)
        record, counts_X = made[0]  # a recomputation makes the same once more
        later = postponed[0] if postponed else None
        output_NH, _ = self.experts(rows_NH, counts_X, weights_N, postponed=later)
        stages = self.token_dispatcher
        output = stages.combine_preprocess(record, output_NH.to(self.combine_dtype))
        output = stages.combine_postprocess(record, stages.token_combine(record, output))
        output = output.to(hidden_states.dtype)
        if again:  # before all that the experts recompute out of these rows
            checkpoint.discard_output_and_register_recompute(output)
        return output if shared[0] is None else output + shared[0]

    def _to_experts(
        self, hidden_states: torch.Tensor, meanwhile: Callable[[], None]
    ) -> tuple[DispatchRecord, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router and dispatch: the call's record, rows `[N, H]` by expert, rows per expert `[X]`
        and weights `[N]`. `meanwhile` is called on the way."""
        weights_TE, chosen_TE = self.route(hidden_states)
        stages = self.token_dispatcher
        record, sent, weights = stages.dispatch_preprocess(hidden_states, chosen_TE, weights_TE)
        record.meanwhile = meanwhile
        received, weights = stages.token_dispatch(record, sent, weights)
        return record, *stages.dispatch_postprocess(record, received, weights)


class SharedExpert(SharedExpertMLP):
    """megatron-core's; in a pass of the decoding engine, in few operations."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[S, B, H]` to the same."""
        decodes = packed_weights.current() is not None and not torch.is_grad_enabled()
        if not decodes or self.use_shared_expert_gate or not is_plain(self):
            return super().forward(hidden_states)
        return dense_mlp(self, hidden_states)[0]


def moe_layer_spec(config: MoETransformerConfig) -> ModuleSpec:
    """What takes the place of the MLP in an MoE layer of `config`."""
    shared = ModuleSpec(
        module=SharedExpert,
        submodules=MLPSubmodules(
            linear_fc1=column(config, "linear_fc1"), linear_fc2=row(config, "linear_fc2")
        ),
    )
    return ModuleSpec(
        module=ExpertLayer,
        submodules=MoESubmodules(
            experts=GroupedExperts,
            shared_experts=shared if config.moe_shared_expert_intermediate_size else None,
            router=ExpertRouter,
        ),
    )
