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

from pangu.moe.dispatch.allgather import AllGatherDispatcher
from pangu.ops.choice import choices
from pangu.ops.permute import Permutation, plan


class MogeDispatcher(AllGatherDispatcher):
    """All-gather and reduce-scatter with J choices of every token on every rank."""

    def choices_by_rank(self, probs: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
        """`[EP, T, 2·J]`: J experts, counted from the rank's first, and their weights. Expert
        numbers ride as floats, which hold them exactly."""
        assert self.choices is not None
        shape = (self.ep_size, self.num_local_experts)
        experts_TEJ, weights_TEJ = choices(
            probs.unflatten(-1, shape),
            routing_map.unflatten(-1, shape),
            self.choices // self.ep_size,
        )
        return torch.cat([experts_TEJ.to(probs.dtype), weights_TEJ], dim=-1).transpose(0, 1)

    def plan_rows(self, choices: torch.Tensor) -> tuple[Permutation, torch.Tensor]:
        """From all ranks' choices of experts on this rank, `[R·T, 2·J]`."""
        experts, weights = choices.chunk(2, dim=-1)
        permutation = plan(experts.detach().long(), self.num_local_experts)
        return permutation, weights.flatten().index_select(0, permutation.order_N)
