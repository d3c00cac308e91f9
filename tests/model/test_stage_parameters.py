"""Parameters of a rank against what the trainer builds on it, in real processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from gloo import run
from layouts import MODEL, steps

from configs.compose import load
from simulator.counts.records import shapes
from simulator.layout import from_config
from simulator.memory import StageParameters, stage_contents, stage_parameters

MTP = [*MODEL, "model=pangu_ultra_moe", "model.num_layers=4", "model.num_dense_layers=1"]
MTP += ["model.attention=gqa", "model.qk_layernorm=false", "model.num_attention_heads=4"]
MTP += ["model.num_query_groups=2", "model.ffn_hidden_size=48", "moe.num_expert_groups=1"]
ADAPTERS = ["model.lora_rank=4"]
ADAPTERS += ["model.lora_modules=[linear_qkv,linear_fc1,linear_fc2,experts_fc1,experts_fc2]"]
LAYOUTS = {
    "tensor": ["parallel.tensor_model_parallel_size=2"],
    "pipeline": ["parallel.pipeline_model_parallel_size=2"],
    "patched": ["model.patched_layers=[0,3]", "parallel.pipeline_model_parallel_size=2"],
    "leap heads": [
        "parallel.pipeline_model_parallel_size=2",
        "model.mtp_num_layers=0",
        "model.leap_heads=3",
    ],
    "adapters": [*ADAPTERS, "parallel.pipeline_model_parallel_size=2"],
    "adapters cut": [
        *ADAPTERS,
        "parallel.tensor_model_parallel_size=2",
        "parallel.expert_tensor_parallel_size=2",
    ],
    "tied": ["parallel.pipeline_model_parallel_size=2", "model.tie_embeddings=true"],
}


def built(layouts: list[list[str]]) -> list[tuple[int, int]]:
    """Parameters of this rank in each layout, and how many of them are trained."""
    from megatron.core import parallel_state

    from pangu.engines.megatron import process_groups
    from pangu.model.build import build_model

    counts = []
    for overrides in layouts:
        config = load([*MTP, f"launch.processes={dist.get_world_size()}", *overrides])
        process_groups.initialize(config)
        chunks, _ = build_model(config)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        counts.append((sum(p.numel() for p in parameters), trained))
        parallel_state.destroy_model_parallel()
    return counts


def counted(overrides: list[str], rank: int, ranks: int = 2) -> StageParameters:
    config = load([*MTP, f"launch.processes={ranks}", *overrides])
    s = shapes(config, from_config(config))
    return stage_parameters(s, stage_contents(s, rank, int(s.layout.vpp)))


def test_a_rank_holds_what_the_trainer_builds_on_it():
    """MTP's projection is cut over tensor parallelism; its stage has its own embedding."""
    ranks = run(2, built, list(LAYOUTS.values()))
    for index, (name, overrides) in enumerate(LAYOUTS.items()):
        for rank in (0, 1):
            stage = 0 if name in ("tensor", "adapters cut") else rank
            held = counted(overrides, stage)
            assert (held.total, held.trained.total) == ranks[rank][index], (name, rank)


@pytest.mark.parametrize(("name", "table"), [("tensor", 0), ("pipeline", 256 * 32)])
def test_copies_of_the_embedding_are_known(name, table):
    assert counted(LAYOUTS[name], 0).copied == table


APART = ["model.num_layers=6", "parallel.pipeline_model_parallel_size=4", "moe.dispatcher=alltoall"]
LOSS_APART = [*APART, "parallel.pipeline_layout=[2,2,2,0]"]
APART += ["parallel.virtual_pipeline_model_parallel_size=2"]
APART += ["parallel.pipeline_layout=[1,1,1,1,1,1,0,0]"]


def stepped() -> tuple[list[tuple[int, int]], list[list[tuple[float, float]]]]:
    layouts = [[*MTP[len(MODEL) :], *overrides] for overrides in (APART, LOSS_APART)]
    results = [steps(overrides, 4, 2) for overrides in layouts]
    return built([APART]), results


def test_mtp_on_a_stage_of_its_own():
    """Where the stage before the last has no layers it holds MTP: the same loss and gradient as
    beside the loss, which stays on the last stage."""
    ranks = run(4, stepped)
    held = [int(counted(APART, rank, 4).total) for rank in range(4)]
    parameters = [counts[0][0] for counts, _ in ranks]
    assert sum(held) == sum(parameters)
    # megatron-core has the last norm beside the last layer, the count beside the loss
    assert held == pytest.approx(parameters, abs=32)
    for _, (apart, together) in ranks:
        for (loss, *rest), (same_loss, *same) in zip(apart, together, strict=True):
            assert loss == pytest.approx(same_loss, rel=1e-6)
            assert rest == pytest.approx(same, rel=1e-5)
