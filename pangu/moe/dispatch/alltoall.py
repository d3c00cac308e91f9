"""Megatron-core's all-to-all dispatcher on every backend.

Off CUDA it hands tensors to collectives that need lists, and gathers uneven parts over the expert
tensor parallel ranks in a way that gloo and hccl do not have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """The engine's dispatcher; the stages that gather over expert tensor ranks are ours."""

    input_splits: Any
    output_splits: Any
    tokens_per_expert: Any

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> Any:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == self.cuda_sync_point:
            self.input_splits = _as_list(self.input_splits)
            self.output_splits = _as_list(self.output_splits)
        return tokens_per_expert

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gather over the expert tensor ranks, then sort by expert."""
        if self.tp_size > 1:
            sizes = _as_list(self.output_splits_tp)
            global_input_tokens = _gather_uneven(global_input_tokens, sizes, self.tp_group)
            global_probs = _gather_uneven(global_probs, sizes, self.tp_group)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_2", self.tokens_per_expert
        )
        if self.num_local_experts > 1:
            global_input_tokens, global_probs = sort_chunks_by_idxs(
                global_input_tokens,
                self.num_global_tokens_per_local_expert.ravel(),
                self.sort_input_by_local_experts,
                probs=global_probs,
                fused=self.config.moe_permute_fusion,
            )
        counts = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo the sort, then sum over the expert tensor ranks."""
        if self.num_local_experts > 1:
            hidden_states, _ = sort_chunks_by_idxs(
                hidden_states,
                self.num_global_tokens_per_local_expert.T.ravel(),
                self.restore_output_by_local_experts,
                fused=self.config.moe_permute_fusion,
            )
        if self.tp_size > 1:
            sizes = _as_list(self.output_splits_tp)
            hidden_states = _reduce_scatter_uneven(hidden_states, sizes, self.tp_group)
        return hidden_states


def _as_list(splits: Any) -> Any:
    """A list of numbers from a tensor or array of them; lists and None as they are."""
    return splits.tolist() if hasattr(splits, "tolist") else splits


def _gather_uneven(x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' rows, `sizes` of them, one after the other: each rank sends all its rows to all.
    Its gradient sums what the ranks return."""
    copies = x.expand(group.size(), *x.shape).flatten(0, 1)
    return all_to_all(group, copies, sizes, [x.size(0)] * group.size())


def _reduce_scatter_uneven(
    x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's rows, summed over the ranks; rank r owns `sizes[r]` rows."""
    own = sizes[group.rank()]
    parts = all_to_all(group, x, [own] * group.size(), sizes)
    return parts.unflatten(0, (group.size(), own)).sum(dim=0)
