"""All experts on this rank: tokens are sorted and do not travel.

Shapes: T tokens, H hidden, E experts, N = T·K rows.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from pangu.model.transformer_config import PanguTransformerConfig
from pangu.moe.dispatch.choices import choices
from pangu.ops.permute import Permutation, permute, plan, unpermute


class LocalDispatcher(MoETokenDispatcher):
    """For expert and expert tensor parallelism of 1, and K choices for every token."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: PanguTransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection)
        self.num_experts = num_local_experts
        self.num_choices = config.moe.top_k
        self.hidden_shape: torch.Size | None = None
        self.permutation: Permutation | None = None

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort the choices by expert: rows `[N, H]` and their weights `[N]`."""
        self.hidden_shape = tokens.shape
        experts_TK, weights_TK = choices(probs, routing_map, self.num_choices)
        self.permutation = plan(experts_TK, self.num_experts)
        rows_NH = permute(tokens.flatten(0, -2), self.permutation)
        return rows_NH, weights_TK.flatten().index_select(0, self.permutation.order_N)

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.permutation is not None
        return hidden_states, self.permutation.counts_E, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum each token's rows and restore its place."""
        assert self.permutation is not None
        assert self.hidden_shape is not None
        output = unpermute(hidden_states, self.permutation).view(self.hidden_shape)
        self.permutation = None
        return output
