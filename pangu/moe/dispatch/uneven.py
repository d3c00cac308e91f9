"""Gathering and reducing rows of which every rank has its own number, in plain all-to-alls: gloo
and hccl have no collective for uneven parts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pangu.moe.dispatch.messages import exchange, travelled


def gather_counts(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Integers of all ranks, `[ranks, *own.shape]`."""
    everyone = own.new_empty(group.size(), *own.shape)
    if group.size() > 1:
        dist.all_gather_into_tensor(everyone.flatten(0, 1), own, group=group)
    else:
        everyone.copy_(own)
    return everyone


def gather_uneven(x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' rows, `sizes` of them, one after the other: each rank sends all its rows to all.
    Its gradient sums what the ranks return."""
    copies = x.expand(group.size(), *x.shape).flatten(0, 1)
    return travelled(copies, exchange(group, sizes, [x.size(0)] * group.size()))


def reduce_scatter_uneven(
    x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's rows, summed over the ranks; rank r owns `sizes[r]` rows."""
    own = sizes[group.rank()]
    parts = travelled(x, exchange(group, [own] * group.size(), sizes))
    return parts.unflatten(0, (group.size(), own)).sum(dim=0)
