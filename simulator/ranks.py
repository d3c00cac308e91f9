"""What every pipeline rank holds: layers, parameters and memory. Needs no machine."""

from __future__ import annotations

from dataclasses import dataclass

from configs.layout import layers_per_virtual_stage
from configs.schema import Config
from simulator.counts.layer import blocks
from simulator.counts.records import shapes
from simulator.layout import from_config
from simulator.memory import (
    Memory,
    StageParameters,
    block_activations,
    rank_memory,
    stage_contents,
    stage_parameters,
)
from simulator.parts import expected_load


@dataclass(frozen=True)
class Rank:
    """One pipeline rank on one device: layers by chunk, parameters, and bytes."""

    rank: int
    layers: list[int]
    parameters: StageParameters
    memory: Memory


def pipeline_ranks(config: Config) -> list[Rank]:
    """All pipeline ranks of a configuration without violations."""
    s = shapes(config, from_config(config))
    counted = blocks(s, expected_load(s))
    kept = block_activations(s, counted)
    pp = config.parallel.pipeline_model_parallel_size
    layers = layers_per_virtual_stage(config)
    found = []
    for rank in range(pp):
        contents = stage_contents(s, rank, config.parallel.virtual_pipeline_model_parallel_size)
        memory = rank_memory(s, counted, kept, rank, contents)
        found.append(Rank(rank, layers[rank::pp], stage_parameters(s, contents), memory))
    return found
