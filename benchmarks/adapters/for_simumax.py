"""SimuMax (MooreThreads/SimuMax): dense and MoE models on B200, efficiencies measured by shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

SYSTEMS = {"b200": "b200_bf16_ceperm"}
TRANSFORMER_ENGINE = "2.11.0"  # what its own B200 scripts set


def settings(config: Config, system: str | None = None) -> dict[str, Any]:
    """Its strategy, model and system for a configuration, as its own B200 scripts set them.

    `system` stands in for the device's system file where only the speed of evaluation counts.

    Raises:
        ValueError: there is no word for the configuration.
    """
    model, parallel, train = config.model, config.parallel, config.train
    traits = config.simulation
    name = (config.hardware or {})["name"]
    cp = parallel.context_parallel_size
    refusals = {
        "no system file for the device": name not in SYSTEMS and not system,
        "no efficiency for float8 or float4": config.backend.precision in ("fp8", "fp4"),
        "sharded weights (ZeRO-3)": parallel.zero_stage > 1,
        "ring attention": cp > 1 and parallel.context_parallel_type == "ring",
        "overlap of expert exchange": parallel.schedule != "1f1b",
        "multi-token prediction": model.mtp_num_layers > 0,
    }
    for reason, refused in refusals.items():
        if refused:
            raise ValueError(reason)
    return {
        "system": system or SYSTEMS[name],
        "model": _model(config),
        "strategy": {
            "seq_len": train.seq_length,
            "micro_batch_size": train.micro_batch_size,
            "micro_batch_num": config.num_microbatches,
            "world_size": config.world_size,
            "tp_size": parallel.tensor_model_parallel_size,
            "cp_size": cp,
            "cp_comm_type": "a2a",
            "pp_size": parallel.pipeline_model_parallel_size,
            "ep_size": parallel.expert_model_parallel_size,
            "etp_size": parallel.expert_tensor_parallel_size,
            "enable_sequence_parallel": parallel.sequence_parallel,
            "interleaving_size": parallel.virtual_pipeline_model_parallel_size,
            "zero_state": parallel.zero_stage,
            "use_fp32_accum_grad": traits.fp32_gradients,
            "cross_entropy_loss_fusion": traits.fused_cross_entropy,
            "dispatch_probs": model.num_experts > 0,
            "te_version": TRANSFORMER_ENGINE,
            "pp_comm_async": False,
            "enable_straggler_model": False,
            **_recomputation(config),
        },
    }


def _model(config: Config) -> dict[str, Any]:
    model = config.model
    words = {
        "model_name": "row",
        "hidden_size": model.hidden_size,
        "head_num": model.num_attention_heads,
        "kv_head_num": model.num_query_groups or model.num_attention_heads,
        "head_size": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "layer_num": model.num_layers,
        "vocab_size": model.vocab_size,
        "use_swiglu": model.activation == "swiglu",
    }
    if model.num_experts:
        words |= {
            "expert_num": model.num_experts,
            "topk": config.moe.top_k,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "dense_layers": model.num_dense_layers,
            "moe_pad_expert_input_to_capacity": True,
            "capacity": 1,
        }
        if model.shared_expert_ffn_hidden_size:
            words["moe_shared_expert_intermediate_size"] = model.shared_expert_ffn_hidden_size
    if model.attention == "mla":
        words |= {
            "attention_type": "mla",
            "head_size": model.qk_head_dim,
            "v_head_dim": model.v_head_dim,
            "qk_head_dim": model.qk_head_dim,
            "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
            "q_lora_rank": model.q_lora_rank,
            "kv_lora_rank": model.kv_lora_rank,
        }
    return words


def _recomputation(config: Config) -> dict[str, Any]:
    """Raises ValueError for what it cannot recompute."""
    memory, model = config.memory, config.model
    layers = model.num_layers // config.parallel.pipeline_model_parallel_size
    if memory.recompute_granularity == "none":
        return {}
    if memory.recompute_granularity == "full":
        if memory.recompute_method == "block":
            layers = memory.recompute_num_layers
        return {"recompute_granularity": "full_block", "recompute_layer_num": layers}
    modules = list(memory.recompute_modules)
    if modules == ["core_attn"]:
        return {"recompute_granularity": "sdp_only", "recompute_layer_num": layers}
    if "core_attn" in modules:
        raise ValueError("recomputation of the attention core beside other parts")
    return {
        "recompute_granularity": "selective_recompute",
        "recompute_layer_num": layers,
        "megatron_recompute": True,
        "megatron_recompute_modules": modules,
    }


def open_peer(folder: Path) -> Any:
    """Step seconds and GiB of one setting, by SimuMax itself."""
    import warnings

    from simumax.core.config import ModelConfig, StrategyConfig, SystemConfig
    from simumax.core.perf_llm import PerfLLM

    warnings.simplefilter("ignore")
    systems: dict[str, Any] = {}

    def evaluate(question: dict[str, Any]) -> dict[str, float]:
        name = question["system"]
        if name not in systems:
            path = folder / "configs" / "system" / f"{name}.json"
            systems[name] = SystemConfig.init_from_config_file(str(path))
        peer = PerfLLM()
        peer.enable_chunk_profile_cache = question.get("cached", False)
        peer.enable_search_unit_profile_cache = question.get("cached", False)
        peer.configure(
            strategy_config=StrategyConfig(**question["strategy"]),
            model_config=ModelConfig(**question["model"]),
            system_config=systems[name],
        )
        peer.run_estimate()
        seconds = _seconds(peer.analysis_cost().data["duration_time_per_iter"])
        peaks = peer.get_pp_stage_peak_mem(peer.analysis_mem(), "peak_mem", toG=True)
        return {"step_seconds": seconds, "peak_gib": max(float(peak) for peak in peaks.values())}

    return evaluate


def _seconds(text: str) -> float:
    """It prints durations with a unit that it chooses."""
    value, unit = text.split()
    return float(value) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]


if __name__ == "__main__":
    from serve import serve

    serve(open_peer)
