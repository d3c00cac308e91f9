"""Every token once to each rank that holds experts of its choice: all-to-all of tokens, experts,
all-to-all of per-token sums.

Shapes: T tokens of this rank, H hidden, E experts, X of them on this rank, N choices, M rows: a row
is a token on its way to one rank.

An all-to-all of choices moves a token to the same rank as often as it chose experts there. Here
which experts and which weights travel beside it as two numbers per choice; the receiver makes a row
per choice, and sends one sum per token back. Numbers of rows and of choices are gathered first, and
the host waits for them.

Received per rank and layer, forward: M·H + 2·N values, and M·H on the way back. Of K even choices a
token's experts lie on EP·(1 - (1 - 1/EP)^K) ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.moe.dispatch.messages import begin, exchange, travelled
from pangu.moe.dispatch.rows import exchange_rows
from pangu.moe.dispatch.uneven import gather_counts, gather_uneven, reduce_scatter_uneven
from pangu.ops.permute import Permutation, permute, plan_map, plan_rows, unpermute


@dataclass
class Splits:
    """How many go to and come from each expert-parallel rank, and to each expert tensor parallel
    rank that way."""

    sent: list[int]
    received: list[int]
    gathered: list[int]


@dataclass
class Deduplicated(DispatchRecord):
    """`sending` sorts this rank's tokens by the ranks they go to, `permutation` what it received by
    expert. `counts` is `[2, EP]`: rows, and choices, for each rank."""

    sending: Permutation = field(kw_only=True)
    counts: torch.Tensor = field(kw_only=True)
    rows: Splits | None = None
    choices: Splits | None = None


class DeduplicatedDispatcher(Dispatcher[Deduplicated]):
    """For every router and every size; the cheaper, the more experts of a token share a rank."""

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Deduplicated, torch.Tensor, torch.Tensor]:
        """Sort by rank: rows `[M, H]`, and the choices `[N, 2]` behind them, row by row."""
        with torch.no_grad():
            chosen_TRX = routing_map.unflatten(-1, (self.ep_size, -1))
            sending = plan_map(chosen_TRX.any(dim=-1))
            rank_N, token_N, expert_N = chosen_TRX.transpose(0, 1).nonzero(as_tuple=True)
            choices_R = chosen_TRX.sum(dim=(0, 2))
            row_N = rank_N * routing_map.size(0) + token_N
            begins_N = row_N.diff(prepend=row_N.new_full((1,), -1)) != 0
            # The expert, counted from the rank's first, and whether its row begins here.
            codes_N = expert_N + self.num_local_experts * begins_N
            choice_N = token_N * routing_map.size(1) + rank_N * self.num_local_experts + expert_N
        weights_N = probs.flatten().index_select(0, choice_N)
        choices_N2 = torch.stack([codes_N.to(probs.dtype), weights_N], dim=1)
        counts = torch.stack([sending.counts_E, choices_R])
        record = Deduplicated(tokens.shape, sending=sending, counts=counts)
        return record, permute(tokens.flatten(0, -2), sending), choices_N2

    def token_dispatch(
        self, record: Deduplicated, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that chose experts of this rank, and their choices, by rank (expert tensor
        parallel first, then expert parallel)."""
        rows, choices = record.rows, record.choices = self._agree_on_splits(record.counts)
        dtype = self.config.moe.dispatch_dtype
        arrived = begin(
            (hidden_states, exchange_rows(self.ep_group, dtype, rows.received, rows.sent)),
            (probs, exchange(self.ep_group, choices.received, choices.sent)),
        )
        record.meanwhile()
        tokens, numbers = arrived()
        if self.tp_size > 1:
            tokens = gather_uneven(tokens, rows.gathered, self.tp_group)
            numbers = gather_uneven(numbers, choices.gathered, self.tp_group)
        return tokens, numbers

    def _agree_on_splits(self, counts: torch.Tensor) -> tuple[Splits, Splits]:
        everyone = gather_counts(counts, self.tp_ep_group)[..., self.ep_group.rank()]
        # The group counts expert tensor parallel ranks fastest; what comes is by them first.
        received = everyone.view(self.ep_size, self.tp_size, 2).permute(2, 1, 0).tolist()
        rows, choices = (
            Splits(sent, parts[self.tp_group.rank()], [sum(part) for part in parts])
            for sent, parts in zip(counts.tolist(), received, strict=True)
        )
        return rows, choices

    def dispatch_postprocess(
        self, record: Deduplicated, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A row `[N, H]` per choice, sorted by expert."""
        codes_N, weights_N = probs.unbind(dim=1)
        codes_N = codes_N.detach().long()
        rows_N = (codes_N >= self.num_local_experts).cumsum(0) - 1
        permutation = plan_rows(
            codes_N % self.num_local_experts,
            rows_N,
            hidden_states.size(0),
            self.num_local_experts,
        )
        record.permutation = permutation
        weights_N = weights_N.index_select(0, permutation.order_N)
        return permute(hidden_states, permutation), permutation.counts_E, weights_N

    def combine_preprocess(self, record: Deduplicated, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of this rank's experts for each token that came, `[M, H]`."""
        assert record.permutation is not None
        return unpermute(hidden_states, record.permutation)

    def token_combine(self, record: Deduplicated, hidden_states: torch.Tensor) -> torch.Tensor:
        """The ranks' sums for this rank's tokens, in the order in which they were sent."""
        rows = record.rows
        assert rows is not None
        if self.tp_size > 1:
            hidden_states = reduce_scatter_uneven(hidden_states, rows.gathered, self.tp_group)
        return travelled(hidden_states, exchange(self.ep_group, rows.sent, rows.received))

    def combine_postprocess(
        self, record: Deduplicated, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The sum of each token's parts, in its place."""
        return unpermute(hidden_states, record.sending).view(record.hidden_shape)
