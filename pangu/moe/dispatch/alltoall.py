"""Every row to the rank of its expert, alone: all-to-all, experts, all-to-all.

Shapes: T tokens of this rank, H hidden, E experts, X of them on this rank, N rows.

Over the expert-parallel ranks rows travel with splits that depend on the routing; the ranks of an
expert tensor parallel group, which hold slices of the same experts, then gather each other's rows,
and their addends are summed on the way back. The counts behind the splits are gathered first, and
the host waits for them.

Megatron-core's dispatcher of that name keeps splits and maps on itself, for one micro-batch at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pangu.moe.dispatch.choices import sort_by_expert
from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.moe.dispatch.messages import begin, exchange, travelled
from pangu.moe.dispatch.rows import exchange_rows
from pangu.moe.dispatch.uneven import gather_counts, gather_uneven, reduce_scatter_uneven
from pangu.ops.permute import Permutation, permute, plan, unpermute


class Splits(NamedTuple):
    """In rows: to and from each expert-parallel rank, of each expert tensor parallel rank, and
    `counts_RX` received from each rank for each expert here."""

    sent: list[int]
    received: list[int]
    gathered: list[int]
    counts_RX: torch.Tensor


@dataclass
class Exchange(DispatchRecord):
    """`sending` sorts this rank's choices by expert, `permutation` what it received."""

    sending: Permutation = field(kw_only=True)
    agreed: Splits | None = field(default=None, kw_only=True)


class AllToAllDispatcher(Dispatcher[Exchange]):
    """For every router and every size; the cheapest where a token has few choices."""

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Exchange, torch.Tensor, torch.Tensor]:
        """Sort the choices by expert, hence by rank: rows `[N, H]` and their weights `[N]`."""
        sending, weights_N = sort_by_expert(probs, routing_map, self.choices)
        rows_NH = permute(tokens.flatten(0, -2), sending)
        return Exchange(tokens.shape, sending=sending), rows_NH, weights_N

    def token_dispatch(
        self, record: Exchange, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows for this rank's experts and their weights, by rank (expert tensor parallel
        first, then expert parallel), then by expert."""
        splits = self.splits(record)
        dtype, rows_of = self.config.moe.dispatch_dtype, (splits.received, splits.sent)
        arrived = begin(
            (hidden_states, exchange_rows(self.ep_group, dtype, *rows_of)),
            (probs, exchange(self.ep_group, *rows_of)),
        )
        record.meanwhile()
        rows, weights = arrived()
        if self.tp_size > 1:
            rows = gather_uneven(rows, splits.gathered, self.tp_group)
            weights = gather_uneven(weights, splits.gathered, self.tp_group)
        return rows, weights

    def agree(self, maps: Sequence[torch.Tensor]) -> list[Splits]:
        return self._agree(torch.stack([chosen_TE.sum(dim=0) for chosen_TE in maps]))

    def splits(self, record: Exchange) -> Splits:
        """What `agree` said before, or says now of this one alone."""
        if record.agreed is None:
            (record.agreed,) = self._agree(record.sending.counts_E[None])
        return record.agreed

    def _agree(self, own_CE: torch.Tensor) -> list[Splits]:
        """From this rank's choices of each expert, chunk by chunk."""
        all_RCE = gather_counts(own_CE, self.tp_ep_group)
        # The group counts expert tensor parallel ranks fastest; rows come by them first.
        sizes = (self.ep_size, self.tp_size, -1, self.ep_size, self.num_local_experts)
        here = all_RCE.view(sizes)[:, :, :, self.ep_group.rank()].permute(2, 1, 0, 3)
        sent = own_CE.unflatten(1, (self.ep_size, -1)).sum(dim=2).tolist()  # [C][EP]
        received = here.sum(dim=3).tolist()  # [C][ETP][EP]
        return [
            Splits(sent, rows[self.tp_group.rank()], [sum(each) for each in rows], counts_RX)
            for sent, rows, counts_RX in zip(sent, received, here.flatten(1, 2), strict=True)
        ]

    def dispatch_postprocess(
        self, record: Exchange, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort by expert."""
        counts_RX = self.splits(record).counts_RX
        if self.num_local_experts == 1:
            return hidden_states, counts_RX.sum(dim=0), probs
        experts = torch.arange(self.num_local_experts, device=counts_RX.device)
        expert_of_row = experts.repeat(counts_RX.size(0)).repeat_interleave(
            counts_RX.flatten(), output_size=hidden_states.size(0)
        )
        permutation = plan(expert_of_row[:, None], self.num_local_experts)
        record.permutation = permutation
        weights_N = probs.index_select(0, permutation.order_N)
        return permute(hidden_states, permutation), permutation.counts_E, weights_N

    def combine_preprocess(self, record: Exchange, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo the sort."""
        if record.permutation is None:
            return hidden_states
        return unpermute(hidden_states, record.permutation)

    def token_combine(self, record: Exchange, hidden_states: torch.Tensor) -> torch.Tensor:
        """The experts' output of this rank's choices, in the order in which they were sent."""
        splits = self.splits(record)
        if self.tp_size > 1:
            hidden_states = reduce_scatter_uneven(hidden_states, splits.gathered, self.tp_group)
        way = exchange(self.ep_group, splits.sent, splits.received)
        return travelled(hidden_states, way, record.meanwhile_back)

    def combine_postprocess(self, record: Exchange, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum each token's rows and restore its place."""
        return unpermute(hidden_states, record.sending).view(record.hidden_shape)
