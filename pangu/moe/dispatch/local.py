"""All experts on this rank: tokens are sorted and do not travel.

Shapes: H hidden, N rows, T·K of them where every token has K choices.
"""

from __future__ import annotations

import torch

from pangu.moe.dispatch.choices import sort_by_expert
from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.ops.permute import permute, unpermute


class LocalDispatcher(Dispatcher[DispatchRecord]):
    """For every router, with expert and expert tensor parallelism of 1."""

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[DispatchRecord, torch.Tensor, torch.Tensor]:
        """Sort the choices by expert: rows `[N, H]` and their weights `[N]`."""
        permutation, weights_N = sort_by_expert(probs, routing_map, self.choices)
        rows_NH = permute(tokens.flatten(0, -2), permutation)
        return DispatchRecord(tokens.shape, permutation), rows_NH, weights_N

    def token_dispatch(
        self, record: DispatchRecord, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        record.meanwhile()
        return hidden_states, probs

    def dispatch_postprocess(
        self, record: DispatchRecord, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert record.permutation is not None
        return hidden_states, record.permutation.counts_E, probs

    def combine_preprocess(
        self, record: DispatchRecord, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states

    def token_combine(self, record: DispatchRecord, hidden_states: torch.Tensor) -> torch.Tensor:
        record.meanwhile_back()
        return hidden_states

    def combine_postprocess(
        self, record: DispatchRecord, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Sum each token's rows and restore its place."""
        assert record.permutation is not None
        return unpermute(hidden_states, record.permutation).view(record.hidden_shape)
