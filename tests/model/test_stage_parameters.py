"""Parameters of a rank against what the trainer builds on it, in real processes."""

from __future__ import annotations

import pytest
from gloo import run
from layouts import MODEL

from configs.compose import load
from simulator.counts.records import shapes
from simulator.layout import from_config
from simulator.memory import StageParameters, stage_contents, stage_parameters

MTP = [*MODEL, "model=pangu_ultra_moe", "model.num_layers=4", "model.num_dense_layers=1"]
MTP += ["model.attention=gqa", "model.qk_layernorm=false", "model.num_attention_heads=4"]
MTP += ["model.num_query_groups=2", "model.ffn_hidden_size=48", "moe.num_expert_groups=1"]
MTP += ["launch.processes=2"]
LAYOUTS = {
    "tensor": ["parallel.tensor_model_parallel_size=2"],
    "pipeline": ["parallel.pipeline_model_parallel_size=2"],
    "tied": ["parallel.pipeline_model_parallel_size=2", "model.tie_embeddings=true"],
}


def built(layouts: list[list[str]]) -> list[int]:
    from megatron.core import parallel_state

    from pangu.model.build import build_model
    from pangu.training import distributed

    counts = []
    for overrides in layouts:
        config = load([*MTP, *overrides])
        distributed.initialize(config)
        chunks, _ = build_model(config)
        counts.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
        parallel_state.destroy_model_parallel()
    return counts


def counted(overrides: list[str], rank: int) -> StageParameters:
    config = load([*MTP, *overrides])
    s = shapes(config, from_config(config))
    return stage_parameters(s, stage_contents(s, rank, int(s.layout.vpp)))


def test_a_rank_holds_what_the_trainer_builds_on_it():
    """MTP's projection is cut over tensor parallelism; its stage has its own embedding."""
    ranks = run(2, built, list(LAYOUTS.values()))
    for index, (name, overrides) in enumerate(LAYOUTS.items()):
        for rank in (0, 1):
            stage = 0 if name == "tensor" else rank
            assert counted(overrides, stage).total == ranks[rank][index], (name, rank)


@pytest.mark.parametrize(("name", "table"), [("tensor", 0), ("pipeline", 256 * 32)])
def test_copies_of_the_embedding_are_known(name, table):
    assert counted(LAYOUTS[name], 0).copied == table
