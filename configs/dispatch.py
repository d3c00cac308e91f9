"""Which dispatcher takes tokens to their experts. The trainer, the simulator and the flags for
other engines all ask here."""

from __future__ import annotations

from configs.schema import DispatcherType, MoEConfig
from configs.violation import ConfigError, Violation


def dispatcher(moe: MoEConfig, expert_parallel: int, expert_tensor_parallel: int) -> DispatcherType:
    """The dispatcher that `moe.dispatcher` stands for; `auto` takes the cheapest that fits, and
    knows nothing of nodes.

    Raises:
        ConfigError: the dispatcher named cannot serve this router or these sizes.
    """
    if moe.dispatcher != "auto":
        if reason := why_not(moe.dispatcher, moe, expert_parallel, expert_tensor_parallel):
            raise ConfigError([Violation("moe.dispatcher", moe.dispatcher, reason)])
        return moe.dispatcher
    candidates: tuple[DispatcherType, ...] = ("local", "moge")
    for kind in candidates:
        if not why_not(kind, moe, expert_parallel, expert_tensor_parallel):
            return kind
    # A gather moves a token to EP ranks, an exchange of rows to its K experts.
    fixed = moe.router != "expert_choice"
    return "allgather" if fixed and expert_parallel <= moe.top_k else "alltoall"


def why_not(
    kind: DispatcherType,
    moe: MoEConfig,
    expert_parallel: int,
    expert_tensor_parallel: int,
    ranks_per_node: int = 0,
) -> str:
    """Why a dispatcher cannot serve this router over these ranks; "" where it can. `ranks_per_node`
    is 0 where it is not known."""
    spread = expert_parallel * expert_tensor_parallel
    if kind == "local" and spread > 1:
        return f"tokens cannot stay local: experts are spread over EP x ETP = {spread} ranks"
    if kind == "local" and moe.router == "expert_choice":
        return "it counts on a fixed number of experts per token, which expert choice has not"
    if kind == "moge" and moe.router != "moge":
        return f"its equal splits come from router=moge, not {moe.router}"
    if kind == "moge" and moe.num_expert_groups % expert_parallel:
        return (
            f"equal splits need whole groups on every rank: {moe.num_expert_groups} groups over "
            f"{expert_parallel} expert-parallel ranks"
        )
    if kind == "hierarchical" and expert_tensor_parallel > 1:
        return (
            "it takes tokens to whole experts, and expert_tensor_parallel_size = "
            f"{expert_tensor_parallel} slices them"
        )
    if kind == "hierarchical" and ranks_per_node and expert_parallel % ranks_per_node:
        inside = "lie inside one node" if expert_parallel < ranks_per_node else "do not fill nodes"
        return (
            f"its two levels are nodes and their ranks: {expert_parallel} expert-parallel ranks "
            f"{inside} of {ranks_per_node}"
        )
    return ""
