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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.moe.dispatch.messages import begin, exchange, travelled
from pangu.moe.dispatch.rows import exchange_rows
from pangu.moe.dispatch.uneven import gather_counts, gather_uneven, reduce_scatter_uneven
from pangu.ops.permute import Permutation, permute, plan_map, plan_rows, unpermute


class Splits(NamedTuple):
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
    agreed: tuple[Splits, Splits] | None = field(default=None, kw_only=True)  # rows, choices


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
            row_N = rank_N * routing_map.size(0) + token_N
            begins_N = row_N.diff(prepend=row_N.new_full((1,), -1)) != 0
            # The expert, counted from the rank's first, and whether its row begins here.
            codes_N = expert_N + self.num_local_experts * begins_N
            choice_N = token_N * routing_map.size(1) + rank_N * self.num_local_experts + expert_N
        weights_N = probs.flatten().index_select(0, choice_N)
        choices_N2 = torch.stack([codes_N.to(probs.dtype), weights_N], dim=1)
        counts = self._counts(chosen_TRX)
        record = Deduplicated(tokens.shape, sending=sending, counts=counts)
        return record, permute(tokens.flatten(0, -2), sending), choices_N2

    def token_dispatch(
        self, record: Deduplicated, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that chose experts of this rank, and their choices, by rank (expert tensor
        parallel first, then expert parallel)."""
        rows, choices = self.splits(record)
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

    def agree(self, maps: Sequence[torch.Tensor]) -> list[tuple[Splits, Splits]]:
        each = [self._counts(chosen.unflatten(-1, (self.ep_size, -1))) for chosen in maps]
        return self._agree(torch.stack(each))

    def splits(self, record: Deduplicated) -> tuple[Splits, Splits]:
        """Of rows and of choices: what `agree` said before, or says now of this one alone."""
        if record.agreed is None:
            (record.agreed,) = self._agree(record.counts[None])
        return record.agreed

    def _counts(self, chosen_TRX: torch.Tensor) -> torch.Tensor:
        """Rows, and choices, for each rank: `[2, EP]`."""
        return torch.stack([chosen_TRX.any(dim=2).sum(dim=0), chosen_TRX.sum(dim=(0, 2))])

    def _agree(self, own: torch.Tensor) -> list[tuple[Splits, Splits]]:
        """From this rank's counts, chunk by chunk, `[chunks, 2, EP]`."""
        everyone = gather_counts(own, self.tp_ep_group)[..., self.ep_group.rank()]
        # The group counts expert tensor parallel ranks fastest; what comes is by them first.
        sizes = (self.ep_size, self.tp_size, -1, 2)
        received = everyone.view(sizes).permute(2, 3, 1, 0).tolist()

        def splits(sent: list[int], parts: list[list[int]]) -> Splits:
            return Splits(sent, parts[self.tp_group.rank()], [sum(part) for part in parts])

        return [
            (splits(sent[0], parts[0]), splits(sent[1], parts[1]))
            for sent, parts in zip(own.tolist(), received, strict=True)
        ]

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
        rows, _ = self.splits(record)
        if self.tp_size > 1:
            hidden_states = reduce_scatter_uneven(hidden_states, rows.gathered, self.tp_group)
        way = exchange(self.ep_group, rows.sent, rows.received)
        return travelled(hidden_states, way, record.meanwhile_back)

    def combine_postprocess(
        self, record: Deduplicated, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The sum of each token's parts, in its place."""
        return unpermute(hidden_states, record.sending).view(record.hidden_shape)
