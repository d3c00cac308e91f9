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

from dataclasses import dataclass, field

import torch

from pangu.moe.dispatch.choices import sort_by_expert
from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.moe.dispatch.messages import begin, exchange, travelled
from pangu.moe.dispatch.rows import exchange_rows
from pangu.moe.dispatch.uneven import gather_counts, gather_uneven, reduce_scatter_uneven
from pangu.ops.permute import Permutation, permute, plan, unpermute


@dataclass
class Exchange(DispatchRecord):
    """`sending` sorts this rank's choices by expert, `permutation` what it received. Splits are in
    rows: to and from each expert-parallel rank, and of each expert tensor parallel rank."""

    sending: Permutation = field(kw_only=True)
    counts_RX: torch.Tensor | None = None  # received from each rank for each expert here
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    gathered: list[int] = field(default_factory=list)


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
        self._agree_on_splits(record)
        dtype, splits = self.config.moe.dispatch_dtype, (record.received, record.sent)
        arrived = begin(
            (hidden_states, exchange_rows(self.ep_group, dtype, *splits)),
            (probs, exchange(self.ep_group, *splits)),
        )
        record.meanwhile()
        rows, weights = arrived()
        if self.tp_size > 1:
            rows = gather_uneven(rows, record.gathered, self.tp_group)
            weights = gather_uneven(weights, record.gathered, self.tp_group)
        return rows, weights

    def _agree_on_splits(self, record: Exchange) -> None:
        own_E = record.sending.counts_E
        all_RE = gather_counts(own_E, self.tp_ep_group)
        # The group counts expert tensor parallel ranks fastest; rows come by them first.
        counts = all_RE.view(self.ep_size, self.tp_size, self.ep_size, self.num_local_experts)
        here = counts[:, :, self.ep_group.rank()].transpose(0, 1)  # [ETP, EP, X]
        record.counts_RX = here.flatten(0, 1)
        record.sent = own_E.view(self.ep_size, -1).sum(dim=1).tolist()
        received = here.sum(dim=2).tolist()  # [ETP][EP]
        record.received = received[self.tp_group.rank()]
        record.gathered = [sum(rows) for rows in received]

    def dispatch_postprocess(
        self, record: Exchange, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort by expert."""
        counts_RX = record.counts_RX
        assert counts_RX is not None
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
        if self.tp_size > 1:
            hidden_states = reduce_scatter_uneven(hidden_states, record.gathered, self.tp_group)
        return travelled(hidden_states, exchange(self.ep_group, record.sent, record.received))

    def combine_postprocess(self, record: Exchange, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum each token's rows and restore its place."""
        return unpermute(hidden_states, record.sending).view(record.hidden_shape)
