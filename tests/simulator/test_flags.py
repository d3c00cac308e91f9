"""The flags of a plan, as Megatron-LM's parser makes them of megatron-core's own fields."""

from __future__ import annotations

from dataclasses import fields

import pytest
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from configs.compose import load
from simulator.flags import OFFLOADED, SWAPPED, launch_flags

# Of megatron/training/arguments.py, core_v0.16.1: those that are no field of TransformerConfig,
# and those that it defines itself because their types do not suit its factory.
ARGUMENTS = {
    *("micro_batch_size", "global_batch_size", "seq_length", "use_distributed_optimizer"),
    *("overlap_grad_reduce", "overlap_param_gather", "num_layers_per_virtual_pipeline_stage"),
    *("optimizer_cpu_offload", "use_precision_aware_optimizer", "overlap_cpu_optimizer_d2h_h2d"),
    *("use_megatron_fsdp", "data_parallel_sharding_strategy"),
}
# Of mindspeed/features_manager, and of MindSpeed-LLM's own arguments.
MINDSPEED = {
    *("use_flash_attn", "use_fused_rmsnorm", "use_fused_swiglu", "context_parallel_algo"),
    *("moe_fb_overlap", "swap_attention", "swap_modules", "swap_optimizer"),
}
PLANS = {
    "plain": ["model=qwen3_30b_a3b", "parallel.expert_model_parallel_size=8"],
    "uneven": ["model=pangu_pro_moe", "parallel=pangu_pro", "memory=full"],
    "apart": ["model=pangu_ultra_moe", "parallel=pangu_ultra",
              "parallel.overlap_expert_parallel=true"],
    "ring": ["model=mixtral_8x7b", "parallel.context_parallel_size=2", "parallel.zero_stage=3",
             "parallel.context_parallel_type=ring", "memory=selective"],
    "swapped": ["model=pangu_ultra_moe", "parallel=pangu_ultra",
                "memory.swap=[layernorm,mla_up_proj,moe_act,shared_experts]",
                "memory.swap_optimizer=true"],
    "once": ["model=deepseek_v3", "parallel.expert_model_parallel_size=64",
             "moe.dispatcher=deduplicated"],
}  # fmt: skip


def parts(name: str) -> dict[str, dict[str, str]]:
    """Flags with their values by the engine that they are meant for."""
    config = load([*PLANS[name], "devices=512", "train.global_batch_size=512"])
    found: dict[str, dict[str, str]] = {}
    for line in launch_flags(config).splitlines():
        if line.startswith("# Me") or line.startswith("# Mi"):
            flags = found.setdefault(line.removeprefix("# "), {})
        elif not line.startswith("#"):
            flag, _, value = line.removeprefix("--").partition(" ")
            flags[flag.replace("-", "_")] = value
    return found


@pytest.mark.parametrize("name", PLANS)
def test_every_name_is_the_engines_own(name):
    of_core = {field.name for field in fields(TransformerConfig)}
    found = parts(name)
    for engine in ("Megatron-LM and MindSpeed-LLM", "Megatron-LM only"):
        assert set(found[engine]) <= of_core | ARGUMENTS
    assert set(found["MindSpeed-LLM only"]) <= MINDSPEED | of_core


def test_uneven_stages_are_a_layout_that_megatron_core_reads():
    """48 layers on 25 virtual stages: the first and the last have one layer, all others two."""
    flags = parts("uneven")["Megatron-LM and MindSpeed-LLM"]
    assert "num_layers_per_virtual_pipeline_stage" not in flags
    stages = PipelineParallelLayerLayout.parse_str_to_list(flags["pipeline_model_parallel_layout"])
    counts = [sum(layer.name == "decoder" for layer in stage) for stage in stages]
    assert counts == [1, *[2] * 23, 1]
    assert stages[0][0].name == "embedding"
    assert stages[-1][-1].name == "loss"
    assert flags["recompute_granularity"] == "full"


def test_overlap_is_each_engines_own_flag():
    found = parts("apart")
    assert "overlap_moe_expert_parallel_comm" in found["Megatron-LM only"]
    assert "moe_fb_overlap" in found["MindSpeed-LLM only"]
    assert found["Megatron-LM and MindSpeed-LLM"]["moe_token_dispatcher_type"] == "alltoall"
    assert "overlap_moe_expert_parallel_comm" not in parts("swapped")["Megatron-LM only"]


def test_a_token_once_per_node_is_megatrons_flexible_dispatcher():
    found = parts("once")
    assert found["Megatron-LM only"]["moe_token_dispatcher_type"] == "flex"
    assert found["Megatron-LM only"]["moe_flex_dispatcher_backend"] == "deepep"
    assert "moe_token_dispatcher_type" not in found["Megatron-LM and MindSpeed-LLM"]
    assert found["MindSpeed-LLM only"]["moe_token_dispatcher_type"] == "alltoall"


def test_what_is_swapped_has_each_engines_names():
    found = parts("swapped")
    assert found["Megatron-LM only"]["offload_modules"] == "qkv_linear core_attn moe_act"
    swapped = found["MindSpeed-LLM only"]["swap_modules"]
    assert swapped == "input_layernorm,pre_mlp_layernorm,self_attention,mlp"
    assert "swap_optimizer" in found["MindSpeed-LLM only"]
    config = load([*PLANS["swapped"], "devices=512", "train.global_batch_size=512"])
    assert "# does not offload shared_experts" in launch_flags(config).splitlines()


def test_modules_are_megatron_cores():
    """What may be offloaded stands in the configuration's docstring; what MindSpeed swaps is a
    member of the layer."""
    import inspect

    from megatron.core.transformer.transformer_layer import TransformerLayer

    source = inspect.getsource(TransformerConfig)
    assert all(f'"{name}"' in source for names in OFFLOADED.values() for name in names)
    layer = inspect.getsource(TransformerLayer)
    assert all(f"self.{name} =" in layer for names in SWAPPED.values() for name in names)


def test_ring_and_sharded_weights():
    found = parts("ring")
    assert found["Megatron-LM only"]["cp_comm_type"] == "p2p"
    assert found["Megatron-LM only"]["data_parallel_sharding_strategy"] == "optim_grads_params"
    assert found["MindSpeed-LLM only"]["context_parallel_algo"] == "megatron_cp_algo"
