"""How tokens travel to their experts and back: the six stages of megatron-core's dispatcher
protocol (dispatch_preprocess, token_dispatch, dispatch_postprocess, combine_preprocess,
token_combine, combine_postprocess), each with the record of its call. Only the two `token_` stages
communicate."""

from __future__ import annotations

from typing import Any

from configs.schema import DispatcherType, MoEConfig
from pangu.moe.dispatch.allgather import AllGatherDispatcher
from pangu.moe.dispatch.alltoall import AllToAllDispatcher
from pangu.moe.dispatch.deduplicated import DeduplicatedDispatcher
from pangu.moe.dispatch.dispatcher import Dispatcher
from pangu.moe.dispatch.local import LocalDispatcher
from pangu.moe.dispatch.moge import MogeDispatcher

DISPATCHERS: dict[DispatcherType, type[Dispatcher[Any]]] = {
    "local": LocalDispatcher,
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "deduplicated": DeduplicatedDispatcher,
    "moge": MogeDispatcher,
}


def resolve(moe: MoEConfig, expert_parallel: int, expert_tensor_parallel: int) -> DispatcherType:
    """The dispatcher that `moe.dispatcher` stands for; `auto` takes the cheapest that fits.

    Raises:
        ValueError: the dispatcher named cannot serve this router or these sizes.
    """
    alone = expert_parallel * expert_tensor_parallel == 1
    # A token's number of experts is fixed, except where the experts do the choosing.
    fixed = moe.router != "expert_choice"
    whole_groups = moe.router == "moge" and moe.num_expert_groups % expert_parallel == 0
    if moe.dispatcher == "auto":
        if alone and fixed:
            return "local"
        if whole_groups:
            return "moge"
        # A gather moves a token to EP ranks, an exchange of rows to its K experts.
        return "allgather" if fixed and expert_parallel <= moe.top_k else "alltoall"
    if moe.dispatcher == "local" and not (alone and fixed):
        raise ValueError(
            "moe.dispatcher=local needs expert_model_parallel_size and "
            "expert_tensor_parallel_size 1 and a router other than expert_choice"
        )
    if moe.dispatcher == "moge" and not whole_groups:
        raise ValueError(
            "moe.dispatcher=moge needs moe.router=moge and num_expert_groups divisible by "
            f"expert_model_parallel_size ({moe.num_expert_groups} and {expert_parallel})"
        )
    return moe.dispatcher


__all__ = [
    "DISPATCHERS",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "DeduplicatedDispatcher",
    "Dispatcher",
    "LocalDispatcher",
    "MogeDispatcher",
    "resolve",
]
