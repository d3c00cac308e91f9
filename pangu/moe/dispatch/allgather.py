"""Every token to every rank, once: all-gather, experts, reduce-scatter of per-token sums.

Shapes: T tokens of this rank, R = EP·ETP ranks, H hidden, X experts per rank, N rows.

An all-to-all of rows moves a token K·(EP-1)/EP times (and gathers the rows over the ETP ranks);
this moves it R-1 times, never more where EP ≤ K, and the splits are equal and known beforehand.
Each rank also gets the weights of its own experts, by an all-to-all of `[T, X]` each.

Received per rank and layer, forward: (R-1)·T·(H + X) values, and (R-1)·T·H on the way back.
Megatron-core's dispatcher of that name gathers weights and choices of all experts, and sorts by
masks over tokens × experts.
"""

from __future__ import annotations

import torch

from pangu.moe.dispatch.choices import pack, unpack
from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.moe.dispatch.messages import begin, exchange, reduce_scatter, travelled
from pangu.moe.dispatch.rows import gather_rows
from pangu.ops.permute import Permutation, permute, plan_map, unpermute


class AllGatherDispatcher(Dispatcher[DispatchRecord]):
    """For every router: a token may choose any number of experts of a rank."""

    def choices_by_rank(self, probs: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
        """What each expert-parallel rank must know of this rank's choices, `[EP, T, X]`: the
        weights of its experts."""
        weights_TE = pack(probs, routing_map, None)
        return weights_TE.unflatten(-1, (self.ep_size, -1)).transpose(0, 1)

    def plan_rows(self, choices: torch.Tensor) -> tuple[Permutation, torch.Tensor]:
        """The rows for this rank's experts and their weights `[N]`, from all ranks' choices."""
        with torch.no_grad():
            _, chosen = unpack(choices, None, 0, self.num_local_experts)
            permutation = plan_map(chosen)
        return permutation, choices.flatten().index_select(0, permutation.order_N)

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[DispatchRecord, torch.Tensor, torch.Tensor]:
        """Tokens `[T, H]` and the choices for each rank, one after the other."""
        parts = self.choices_by_rank(probs, routing_map)
        # Ranks of an expert tensor parallel group hold slices of the same experts.
        parts = parts[:, None].expand(-1, self.tp_size, -1, -1)
        return DispatchRecord(tokens.shape), tokens.flatten(0, -2), parts.flatten(0, 2)

    def token_dispatch(
        self, record: DispatchRecord, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of all ranks `[R·T, H]`, and all choices of experts on this rank."""
        dtype = self.config.moe.dispatch_dtype
        arrived = begin(
            (hidden_states, gather_rows(self.tp_ep_group, dtype)),
            (probs, exchange(self.tp_ep_group)),
        )
        record.meanwhile()
        tokens, choices = arrived()
        return tokens, choices

    def dispatch_postprocess(
        self, record: DispatchRecord, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows `[N, H]` sorted by expert, tokens per expert `[X]`, weights `[N]`."""
        permutation, weights_N = self.plan_rows(probs)
        record.permutation = permutation
        return permute(hidden_states, permutation), permutation.counts_E, weights_N

    def combine_preprocess(
        self, record: DispatchRecord, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """This rank's part of every token's output, `[R·T, H]`."""
        assert record.permutation is not None
        return unpermute(hidden_states, record.permutation)

    def token_combine(self, record: DispatchRecord, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, of this rank's tokens: `[T, H]`."""
        way = reduce_scatter(self.tp_ep_group)
        return travelled(hidden_states, way, record.meanwhile_back)

    def combine_postprocess(
        self, record: DispatchRecord, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states.view(record.hidden_shape)
