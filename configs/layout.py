"""Which layers a pipeline stage holds, and which ranks share a node. The trainer and the simulator
both ask here."""

from __future__ import annotations

from configs.schema import Config


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


def layers_per_virtual_stage(config: Config) -> list[int]:
    """Transformer layers of each virtual stage, in order of depth; virtual stage i is chunk
    i // pipeline ranks of rank i % pipeline ranks.

    No-op layers fill the slots nearest to the ends: the last stage first, then the first, in turn,
    since the head and the embedding sit there.

    Raises:
        ValueError: the layers, with the no-op layers, do not fill the stages evenly.
    """
    p, layers = config.parallel, config.model.num_layers
    if p.pipeline_layout is not None:
        return list(p.pipeline_layout)
    stages = num_virtual_stages(config)
    slots = layers + p.num_noop_layers
    if slots % stages:
        raise ValueError(f"{slots} layers and no-op layers do not divide into {stages} stages")
    counts = [slots // stages] * stages
    front, back = 0, stages - 1
    for i in range(p.num_noop_layers):
        position = back if i % 2 == 0 else front
        if counts[position] == 0:
            raise ValueError(f"{p.num_noop_layers} no-op layers leave no layer to replace")
        counts[position] -= 1
        if i % 2 == 0:
            back = back - 1 if counts[back] == 0 else back
        else:
            front = front + 1 if counts[front] == 0 else front
    return counts


def mtp_stage(config: Config) -> int:
    """The virtual stage that holds the multi-token-prediction modules: the last one, where the
    loss is, or the one before it where that has no layers of its own (and is not on the first
    rank, which has the embedding already)."""
    counts = layers_per_virtual_stage(config)
    last = len(counts) - 1
    return last - 1 if config.parallel.pipeline_model_parallel_size > 2 and not counts[-2] else last


def is_even(config: Config) -> bool:
    """Whether every virtual stage holds the same number of layers."""
    return len(set(layers_per_virtual_stage(config))) == 1
