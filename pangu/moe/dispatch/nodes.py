"""The expert-parallel ranks by nodes: those that share one, and those in the same place of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class NodeGroups:
    """Of this rank: `inside` the ranks of its node, `between` one rank of each node. Both in the
    order of the expert-parallel ranks, which fill one node after the other."""

    inside: dist.ProcessGroup
    between: dist.ProcessGroup


_groups: NodeGroups | None = None


def initialize(ranks_per_node: int, timeout: timedelta | None = None) -> NodeGroups:
    """Make the groups of all ranks, anew, after megatron-core's; every rank calls it.

    Raises:
        ValueError: the expert-parallel ranks do not fill whole nodes.
    """
    global _groups
    ranks = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
    size = len(ranks)
    if size % ranks_per_node or ranks[-1] - ranks[0] != size - 1:
        raise ValueError(f"expert-parallel ranks {ranks} do not fill nodes of {ranks_per_node}")
    # Ranks that follow one another hold whole experts, so the others' groups are such blocks too.
    world = torch.arange(dist.get_world_size()).view(-1, size // ranks_per_node, ranks_per_node)
    _groups = NodeGroups(
        inside=_own(world.flatten(0, 1), timeout, "EXPERTS_INSIDE_NODE"),
        between=_own(world.mT.flatten(0, 1), timeout, "EXPERTS_BETWEEN_NODES"),
    )
    return _groups


def current() -> NodeGroups:
    """What `initialize` made last.

    Raises:
        RuntimeError: it was not called.
    """
    if _groups is None:
        raise RuntimeError("no groups of nodes: pangu.moe.dispatch.nodes.initialize comes first")
    return _groups


def _own(ranks: torch.Tensor, timeout: timedelta | None, name: str) -> dist.ProcessGroup:
    """Of groups `[groups, ranks]`, made in the same order everywhere, the one of this rank."""
    own, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout, group_desc=name)
    assert own is not None
    return own
