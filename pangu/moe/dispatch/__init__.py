"""How tokens travel to their experts and back: the six stages of megatron-core's dispatcher
protocol (dispatch_preprocess, token_dispatch, dispatch_postprocess, combine_preprocess,
token_combine, combine_postprocess), each with the record of its call. Only the two `token_` stages
communicate."""

from __future__ import annotations

from typing import Any

from configs.schema import DispatcherType
from pangu.moe.dispatch.allgather import AllGatherDispatcher
from pangu.moe.dispatch.alltoall import AllToAllDispatcher
from pangu.moe.dispatch.deduplicated import DeduplicatedDispatcher
from pangu.moe.dispatch.dispatcher import Dispatcher
from pangu.moe.dispatch.hierarchical import HierarchicalDispatcher
from pangu.moe.dispatch.local import LocalDispatcher
from pangu.moe.dispatch.moge import MogeDispatcher

DISPATCHERS: dict[DispatcherType, type[Dispatcher[Any]]] = {
    "local": LocalDispatcher,
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "deduplicated": DeduplicatedDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "moge": MogeDispatcher,
}

__all__ = [
    "DISPATCHERS",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "DeduplicatedDispatcher",
    "Dispatcher",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "MogeDispatcher",
]
