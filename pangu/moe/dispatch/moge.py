"""MoGE's dispatcher: every rank receives the same, statically known number of rows.

Shapes: T tokens of this rank, R = EP·ETP ranks, H hidden, X experts per rank, K choices per token,
J = K/EP of them on each expert-parallel rank, N = R·T·J rows.

When expert-parallel ranks hold whole groups, each token chooses J experts on *every* rank. So every
token goes to every rank: an all-gather moves it once, where an all-to-all of rows would move it J
times, and the way back is a reduce-scatter of per-token sums. Which expert and which weight is
another all-to-all with equal splits of 2·J numbers per token. No counts are exchanged, no shape
depends on values, and the host never waits for the device.

Received per rank and layer, forward: (R-1)·T·(H + 2·J) values, and (R-1)·T·H on the way back.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from pangu.model.transformer_config import PanguTransformerConfig
from pangu.moe.dispatch.choices import choices
from pangu.ops.permute import Permutation, permute, plan, unpermute


class MogeDispatcher(MoETokenDispatcher):
    """All-gather, experts, reduce-scatter over the EP·ETP ranks."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: PanguTransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection)
        self.num_local_experts = num_local_experts
        self.choices_per_rank = config.moe.top_k // self.ep_size
        self.hidden_shape: torch.Size | None = None
        self.permutation: Permutation | None = None

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[T, H]` and the choices for each rank `[R·T, 2·J]`: J experts, counted from the
        rank's first, and their weights. Expert numbers ride as floats, which hold them exactly."""
        self.hidden_shape = tokens.shape
        shape = (self.ep_size, self.num_local_experts)
        experts_TEJ, weights_TEJ = choices(
            probs.unflatten(-1, shape), routing_map.unflatten(-1, shape), self.choices_per_rank
        )
        parts_ETJ = torch.cat([experts_TEJ.to(probs.dtype), weights_TEJ], dim=-1).transpose(0, 1)
        # Ranks of an expert tensor parallel group hold slices of the same experts.
        parts = parts_ETJ[:, None].expand(-1, self.tp_size, -1, -1)
        return tokens.flatten(0, -2), parts.flatten(0, 2)

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of all ranks `[R·T, H]`, and all choices of experts on this rank."""
        tokens = gather_from_sequence_parallel_region(hidden_states, group=self.tp_ep_group)
        return tokens, all_to_all(self.tp_ep_group, probs)

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows `[N, H]` sorted by expert, tokens per expert `[X]`, weights `[N]`."""
        experts, weights = probs.chunk(2, dim=-1)
        self.permutation = plan(experts.detach().long(), self.num_local_experts)
        rows_NH = permute(hidden_states, self.permutation)
        weights_N = weights.flatten().index_select(0, self.permutation.order_N)
        return rows_NH, self.permutation.counts_E, weights_N

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This rank's part of every token's output, `[R·T, H]`."""
        assert self.permutation is not None
        output = unpermute(hidden_states, self.permutation)
        self.permutation = None
        return output

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, of this rank's tokens: `[T, H]`."""
        return reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.tp_ep_group)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert self.hidden_shape is not None
        return hidden_states.view(self.hidden_shape)
