"""llm-analysis (cli99/llm-analysis): a roofline with efficiencies that its user supplies.

It leaves out the pipeline bubble and the reduction of gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

DEVICES = {
    ("a100", 80): "a100-sxm-80gb",
    ("a100", 40): "a100-sxm-40gb",
    ("h100", 80): "h100-sxm-80gb",
}
DEFAULT = {"flops_efficiency": 1.0, "hbm_memory_efficiency": 1.0}
# What its README and its own training examples take where nothing was measured.
SUGGESTED = {"flops_efficiency": 0.5, "hbm_memory_efficiency": 0.9}


def settings(
    config: Config,
    efficiencies: dict[str, float] = SUGGESTED,
    answer: str = "latency_per_iter",
) -> dict[str, Any]:
    """Its model, GPU, parallelism and arguments of `training` for a configuration.

    Its "sharded" data-parallel ranks gather the weights of every layer in every micro-batch,
    whatever the ZeRO stage. Where weights are whole, replicas are therefore its "replicated" ranks
    (beyond those that share the experts).

    Raises:
        ValueError: there is no word for the configuration.
    """
    model, parallel, memory, train = config.model, config.parallel, config.memory, config.train
    hardware = config.hardware or {}
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    dp = config.data_parallel_size
    sharded = dp if parallel.zero_stage == 3 else ep
    gpu = DEVICES.get((hardware["name"], int(hardware["memory_gib"])))
    heads = model.num_attention_heads
    selective = memory.recompute_granularity == "selective"
    block = memory.recompute_granularity == "full" and memory.recompute_method == "block"
    special = model.attention == "mla" or model.mtp_num_layers > 0
    shared = model.shared_expert_ffn_hidden_size or model.num_dense_layers
    refusals = {
        "no GPU file for the device": gpu is None,
        "float8 and float4": config.backend.precision in ("fp8", "fp4"),
        "latent attention, multi-token prediction": special,
        "heads that do not add up to the width": (model.kv_channels or model.hidden_size // heads)
        * heads
        != model.hidden_size,
        "context parallelism": parallel.context_parallel_size > 1,
        "shared experts, dense layers among experts": bool(model.num_experts and shared),
        "experts cut otherwise than attention": bool(model.num_experts) and etp != tp,
        "experts over more than data-parallel ranks": dp % ep != 0,
        "recomputation of some layers": block,
        "recomputation of parts other than attention": selective
        and "core_attn" not in memory.recompute_modules,
        "stages of unequal depth": model.num_layers % pp != 0,
    }
    for reason, refused in refusals.items():
        if refused:
            raise ValueError(reason)
    return {
        "gpu": gpu,
        "efficiencies": efficiencies,
        "answer": answer,
        "model": {
            "name": "row",
            "num_layers": model.num_layers,
            "n_head": heads,
            "num_key_value_heads": model.num_query_groups or heads,
            "hidden_dim": model.hidden_size,
            "vocab_size": model.vocab_size,
            "max_seq_len": train.seq_length,
            "ffn_embed_dim": model.moe_ffn_hidden_size or model.ffn_hidden_size,
            "mlp_gated_linear_units": model.activation == "swiglu",
            "moe_num_experts": max(model.num_experts, 1),
            "moe_top_k": config.moe.top_k if model.num_experts else 1,
        },
        "parallel": {
            "tp_size": tp,
            "pp_size": pp,
            "dp_size": sharded,
            "rdp_size": dp // sharded,
            "ep_size": ep,
            "sp_size": tp if parallel.sequence_parallel else 1,
        },
        "training": {
            "batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": config.num_microbatches,
            "global_batch_size": train.global_batch_size,
            "seq_len": train.seq_length,
            "activation_recomputation": {"none": 0, "selective": 1, "full": 4}[
                memory.recompute_granularity
            ],
            "ds_zero": parallel.zero_stage,
            "flash_attn": config.simulation.fused_attention,
        },
    }


def open_peer(folder: Path) -> Any:
    """Step seconds and GiB of one setting, by llm-analysis itself."""
    import logging

    from llm_analysis import analysis, config

    logging.disable(logging.CRITICAL)

    def evaluate(question: dict[str, Any]) -> dict[str, float]:
        peer = analysis.LLMAnalysis(
            config.ModelConfig(**question["model"]),
            config.get_gpu_config_by_name(question["gpu"]),
            config.get_dtype_config_by_name("w16a16e16"),
            config.ParallelismConfig(**question["parallel"]),
            **question["efficiencies"],
        )
        words = dict(question["training"])
        again = analysis.ActivationRecomputation(words.pop("activation_recomputation"))
        zero = analysis.DSZeRO(words.pop("ds_zero"))
        result = peer.training(activation_recomputation=again, ds_zero=zero, **words)
        return {
            "step_seconds": result[question["answer"]],
            "peak_gib": result["estimated_peak_memory_per_gpu"] / 2**30,
        }

    return evaluate


if __name__ == "__main__":
    from serve import serve

    serve(open_peer)
