"""Which part of a model a pipeline stage holds, and which ranks share a node. The trainer, the
simulator (for arrays of layouts) and the flags for other engines all ask here.

Virtual stage i is chunk i // pipeline ranks of rank i % pipeline ranks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np

from configs.schema import Config

Part = Literal["embedding", "decoder", "mtp", "loss"]  # megatron-core's names


def ranks_per_node(config: Config) -> int:
    """Ranks that share a node: as they are started, or else the planned machine's; 0 where neither
    tells."""
    launch = config.launch
    if launch.processes * launch.nodes == config.world_size:
        return launch.processes
    planned = (config.hardware or {}).get("devices_per_node")
    return planned if isinstance(planned, int) and planned > 0 else 0


def num_virtual_stages(config: Config) -> int:
    """Model chunks in all: pipeline ranks times chunks per rank."""
    p = config.parallel
    return p.pipeline_model_parallel_size * p.virtual_pipeline_model_parallel_size


def first_layer(stage: Any, layers: int, each: Any, noop_layers: Any = 0, more: Any = 0) -> Any:
    """The first layer of a virtual stage, where stages have `each` slots, the first `more` of them
    one more; numbers, or arrays of them.

    No-op layers fill the slots nearest to the ends, the greater half behind: the head and the
    embedding sit there.
    """
    start = stage * each + np.minimum(stage, more) - noop_layers // 2
    return np.clip(start, 0, layers)


def layers_per_virtual_stage(config: Config) -> list[int]:
    """Transformer layers of each virtual stage, in order of depth.

    Raises:
        ValueError: the layers, with the no-op layers, do not fill the stages evenly.
    """
    p, layers = config.parallel, config.model.num_layers
    if p.pipeline_layout is not None:
        return list(p.pipeline_layout)
    stages, slots = num_virtual_stages(config), layers + p.num_noop_layers
    if slots % stages:
        raise ValueError(f"{slots} layers and no-op layers do not divide into {stages} stages")
    starts = first_layer(np.arange(stages + 1), layers, slots // stages, p.num_noop_layers)
    return [int(end - start) for start, end in pairwise(starts)]


def stage_of_mtp(stages: Any, pipeline_ranks: Any, layers_before_last: Any) -> Any:
    """The virtual stage that holds the multi-token-prediction modules: the last one, where the
    loss is, or the one before it where that has no layers of its own (and is not on the first
    rank, which has the embedding already). Numbers, or arrays of them."""
    return stages - 1 - (pipeline_ranks > 2) * (layers_before_last == 0)


def mtp_stage(config: Config) -> int:
    """`stage_of_mtp` of one configuration."""
    counts = layers_per_virtual_stage(config)
    before = counts[-2] if len(counts) > 1 else 0
    ranks = config.parallel.pipeline_model_parallel_size
    return int(stage_of_mtp(len(counts), ranks, before))


def stage_parts(config: Config) -> list[list[Part]]:
    """What each virtual stage holds, in order of depth."""
    stages: list[list[Part]] = [["decoder"] * n for n in layers_per_virtual_stage(config)]
    stages[0].insert(0, "embedding")
    stages[mtp_stage(config)] += ["mtp"] * config.model.mtp_num_layers
    stages[-1].append("loss")
    return stages


def is_even(config: Config) -> bool:
    """Whether every virtual stage holds the same number of layers."""
    return len(set(layers_per_virtual_stage(config))) == 1
