"""Memory counts against published peaks of Megatron-LM runs (megatron-core with
TransformerEngine, distributed optimizer, float32 gradients, fused cross-entropy), and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from configs.compose import load
from configs.planning import SimulationConfig
from configs.schema import (
    BackendConfig,
    Config,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    TrainConfig,
)
from simulator.counts.layer import blocks
from simulator.counts.records import shapes
from simulator.layout import deal_layers, from_config, stage_content
from simulator.memory import (
    block_activations,
    rank_memory,
    stage_contents,
    units_in_flight,
)
from simulator.ranks import pipeline_ranks

GIB = 2**30


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> ModelConfig:
    return ModelConfig(
        name="llama3",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=128,
        vocab_size=128256,
    )


DEEPSEEK_V2 = ModelConfig(
    name="deepseek_v2",
    num_layers=4,
    hidden_size=5120,
    ffn_hidden_size=12288,
    num_attention_heads=128,
    vocab_size=102400,
    attention="mla",
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    qk_layernorm=True,
    num_experts=160,
    moe_ffn_hidden_size=1536,
    shared_expert_ffn_hidden_size=3072,
    num_dense_layers=1,
)
LLAMA_70B = llama(12, 8192, 28672, 64, 8)
LLAMA_405B = llama(4, 16384, 53248, 128, 16)


def peak(config: Config) -> float:
    layout = from_config(config)
    s = shapes(config, layout)
    counted = blocks(s)
    kept = block_activations(s, counted)
    ranks = range(layout.pp)
    chunks = [stage_contents(s, rank, layout.vpp) for rank in ranks]
    return max(float(rank_memory(s, counted, kept, rank, chunks[rank]).peak) for rank in ranks)


# SimuMax, docs/b200 of release 1.2: largest peak over the ranks of one 8-device node, GiB.
MEASURED = [
    (LLAMA_70B, {"tp": 1, "pp": 2}, 4096, 66.55),
    (LLAMA_70B, {"tp": 2}, 4096, 60.68),
    (LLAMA_70B, {"tp": 8}, 4096, 28.29),
    (LLAMA_405B, {"tp": 1, "pp": 2}, 4096, 87.08),
    (LLAMA_405B, {"tp": 4}, 4096, 52.89),
    (LLAMA_70B, {"cp": 8}, 32768, 104.51),
    (LLAMA_405B, {"tp": 2, "cp": 4}, 131072, 118.13),
    (DEEPSEEK_V2, {"ep": 8}, 4096, 45.63),
    (DEEPSEEK_V2, {"ep": 4, "pp": 2}, 4096, 44.70),
]


@pytest.mark.parametrize(("model", "sizes", "seq", "measured"), MEASURED)
def test_published_peaks(model, sizes, seq, measured):
    parallel = ParallelConfig(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        context_parallel_size=sizes.get("cp", 1),
        expert_model_parallel_size=sizes.get("ep", 1),
    )
    config = Config(
        model=model,
        moe=MoEConfig(top_k=6),
        parallel=parallel,
        backend=BackendConfig(precision="bf16"),
        train=TrainConfig(seq_length=seq, micro_batch_size=1),
        simulation=SimulationConfig(transformer_engine=True, fused_cross_entropy=True),
        devices=8,
    )
    config.train.global_batch_size = 4 * config.data_parallel_size
    assert peak(config) / GIB == pytest.approx(measured, rel=0.01)


def base(*overrides: str) -> Config:
    return load(["model=pangu_pro_moe", "devices=320", "train.seq_length=4096", *overrides])


def test_activations_follow_the_schedule():
    """1F1B keeps p - rank micro-batches; interleaving 2(p - rank - 1) + (v - 1)p + 1 chunks."""
    plain = from_config(
        base("parallel.pipeline_model_parallel_size=4", "train.global_batch_size=800")
    )
    assert [int(units_in_flight(plain, rank)) for rank in range(4)] == [4, 3, 2, 1]
    virtual = from_config(
        base(
            "parallel.pipeline_model_parallel_size=4",
            "parallel.virtual_pipeline_model_parallel_size=3",
            "train.global_batch_size=800",
        )
    )
    assert [int(units_in_flight(virtual, rank)) for rank in range(4)] == [15, 13, 11, 9]


def test_stages_hold_every_layer_once():
    config = base("parallel=pangu_pro")
    layout = from_config(config)
    dealt = deal_layers(config.model, layout)
    places = [(rank, chunk) for chunk in range(5) for rank in range(5)]
    contents = [stage_content(config.model, layout, dealt, *place) for place in places]
    assert sum(int(x.moe) for x in contents) == 48
    assert [int(x.moe) for x in contents] == [1] + [2] * 23 + [1]
    assert [int(x.embedding) for x in contents] == [1] + [0] * 24
    assert [int(x.head) for x in contents] == [0] * 24 + [1]


def test_each_module_recomputed_saves_what_it_says():
    config = base("memory=selective", "parallel.tensor_model_parallel_size=8")

    def kept(*modules: str) -> float:
        config.memory.recompute_modules = list(modules)  # type: ignore[assignment]
        s = shapes(config, from_config(config))
        return float(block_activations(s, blocks(s)).moe)

    tokens, tp = 4096, 8
    shard, rows = tokens / tp, tokens / tp * 8
    everything = kept()
    assert everything - kept("moe_act") == pytest.approx(rows * 1344 * 2)
    assert everything - kept("layernorm") == pytest.approx(2 * shard * 5120 * 2)
    assert everything - kept("shared_experts") == pytest.approx(tokens * 3 * 5376 / tp * 2)
    assert everything - kept("core_attn") == pytest.approx(4 * tokens * 40 / tp)


def test_full_recomputation_keeps_layer_inputs():
    config = base(
        "memory=full", "parallel.pipeline_model_parallel_size=4", "train.global_batch_size=320"
    )
    layout = from_config(config)
    s = shapes(config, layout)
    counted = blocks(s)
    memory = rank_memory(s, counted, block_activations(s, counted), 1, stage_contents(s, 1, 1))
    assert float(memory.activations) == 3 * 12 * 4096 * 5120 * 2


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 4, 12), (1, 2, 4, 12 / 8), (2, 2, 4 / 8, 12 / 8), (3, 2 / 8, 4 / 8, 12 / 8)],
)
def test_zero_stages_shard_optimizer_gradients_weights(stage, weights, gradients, optimizer):
    config = load(["model=pangu_ultra_dense", "devices=8", f"parallel.zero_stage={stage}"])
    s = shapes(config, from_config(config))
    counted = blocks(s)
    contents = stage_contents(s, 0, 1)
    memory = rank_memory(s, counted, block_activations(s, counted), 0, contents)
    parameters = 133_881_311_232
    assert float(memory.weights) == pytest.approx(parameters * weights)
    assert float(memory.gradients) == pytest.approx(parameters * gradients)
    assert float(memory.optimizer) == pytest.approx(parameters * optimizer)


@pytest.mark.parametrize(
    "treated",
    [
        [
            "memory=selective",
            "memory.recompute_modules=[layernorm,moe_fc1]",
            "memory.swap=[moe_act]",
        ],
        ["memory=full"],
        ["memory=full", "memory.recompute_method=block", "memory.recompute_num_layers=3"],
    ],
)
def test_holes_of_a_process_are_those_of_a_run_that_keeps_all(treated: list[str]) -> None:
    pipeline = ["parallel.pipeline_model_parallel_size=4", "train.global_batch_size=320"]
    pipeline += ["hardware=a100", "hardware.backend=cpu"]
    spared = pipeline_ranks(base("memory=none", *pipeline, *treated))
    for rank, all_kept in zip(spared, pipeline_ranks(base("memory=none", *pipeline)), strict=True):
        assert float(rank.memory.passing) < float(all_kept.memory.passing)
        assert all_kept.memory.leaves_holes == pytest.approx(all_kept.memory.passing)
        assert rank.memory.leaves_holes == pytest.approx(all_kept.memory.passing)


def test_swap_drops_what_recomputation_drops():
    config = base()
    s = shapes(config, from_config(config))
    before = block_activations(s, blocks(s)).moe
    config.memory.swap = ["moe_act"]
    s = shapes(config, from_config(config))
    swapped = block_activations(s, blocks(s)).moe
    assert float(before - swapped) == pytest.approx(4096 * 8 * 1344 * 2)
    assert np.ndim(swapped) == 0


def temporary(zero: int, ep: int, devices: int) -> float:
    """GiB that come and go on the fullest rank of Mixtral under TP4 CP2 PP2."""
    sizes = {"tensor_model": 4, "context": 2, "pipeline_model": 2, "expert_model": ep}
    layout = [f"parallel.{name}_parallel_size={size}" for name, size in sizes.items()]
    layout += [f"devices={devices}", f"parallel.zero_stage={zero}", "backend.precision=bf16"]
    memory = [rank.memory for rank in pipeline_ranks(load(["model=mixtral_8x7b", *layout]))]
    return max(float(one.temporary) for one in memory) / GIB


def test_what_has_no_replicas_is_never_gathered():
    """Experts spread over all ranks of a stage are whole at every ZeRO stage: from 2 to 3 only
    the dense part of two layers' weights is added; the gradient of one is there at both."""
    model = load(["model=mixtral_8x7b"]).model
    kv = 2 * model.num_query_groups * model.kv_channels
    attention = model.hidden_size * (2 * model.hidden_size + kv) // 4
    dense = attention + 2 * model.hidden_size + model.hidden_size * model.num_experts
    expert = 3 * model.hidden_size * model.moe_ffn_hidden_size
    for ep, devices, gathered in ((8, 16, dense), (4, 16, dense + 2 * expert)):
        added = temporary(3, ep, devices) - temporary(2, ep, devices)
        assert added == pytest.approx(2 * 2 * gathered / GIB)
