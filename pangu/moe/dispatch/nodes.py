"""The expert-parallel ranks by nodes: those that share one, and those in the same place of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

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
    """Make this rank's groups, anew, after megatron-core's; all expert-parallel ranks call it.

    Raises:
        ValueError: the expert-parallel ranks do not fill whole nodes.
    """
    global _groups
    ranks = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
    if len(ranks) % ranks_per_node or ranks[-1] - ranks[0] != len(ranks) - 1:
        raise ValueError(f"expert-parallel ranks {ranks} do not fill nodes of {ranks_per_node}")
    nodes = [ranks[i : i + ranks_per_node] for i in range(0, len(ranks), ranks_per_node)]
    here = next(node for node in nodes if dist.get_rank() in node)
    place = here.index(dist.get_rank())
    _groups = NodeGroups(
        inside=_group(here, timeout, "EXPERTS_INSIDE_NODE"),
        between=_group([node[place] for node in nodes], timeout, "EXPERTS_BETWEEN_NODES"),
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


def _group(ranks: list[int], timeout: timedelta | None, name: str) -> dist.ProcessGroup:
    # Pipeline stages without experts make none: the members alone agree on it.
    return dist.new_group(ranks, timeout, use_local_synchronization=True, group_desc=name)
