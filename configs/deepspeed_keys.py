"""Keys of DeepSpeed 0.19.8's JSON, of which DeepSpeed itself ignores those that it does not know.

`tests/engines/test_deepspeed.py` holds the tables against what the installed DeepSpeed asks for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

# Keys that ours decide.
DECIDED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "backend.precision",
    "bf16": "backend.precision",
    "bfloat16": "backend.precision",
    "amp": "backend.precision",
    "torch_autocast": "backend.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "engine.offload",
    "zero_optimization.zenflow": "engine.offload",
    "sequence_parallel_size": "parallel.context_parallel_size",
    "tensor_parallel": "parallel.tensor_model_parallel_size",
    "expert_parallel": "parallel.expert_model_parallel_size",
    "use_data_before_expert_parallelism": "parallel.expert_model_parallel_size",
    "pipeline": "parallel.pipeline_model_parallel_size",
    "activation_checkpointing": "memory",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
    "data_efficiency": "data",
    "dataloader_drop_last": "data",
    "vocabulary_size": "model.vocab_size",
}
# Keys with which its gradients would be other than the engine reckons with.
FIXED = (
    "gradient_allreduce_op",
    "managed_gradient_accumulation",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# Keys of what this project has no use for: another launcher's, generation's, libaio's.
IDLE = (
    "autotuning",
    "hybrid_engine",
    "weight_quantization",
    "aio.intra_op_parallelism",
    "aio.overlap_events",
    "aio.single_submit",
    "aio.use_gds",
)
# What may be asked for; inside a section None where DeepSpeed itself refuses what it does not know.
KEYS: dict[str, tuple[str, ...] | None] = {
    "aio": ("block_size", "queue_depth"),
    "comet": None,
    "comms_logger": None,
    "communication_data_type": None,
    "compile": None,
    "csv_monitor": None,
    "data_types": ("buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"),
    "disable_allgather": None,
    "disable_python_gc": None,
    "dump_state": None,
    "flops_profiler": (
        "detailed",
        "enabled",
        "module_depth",
        "output_file",
        "profile_step",
        "recompute_fwd_factor",
        "top_modules",
    ),
    "gradient_predivide_factor": None,
    "log_level": None,
    "memory_breakdown": None,
    "prescale_gradients": None,
    "seq_parallel_communication_data_type": None,
    "steps_per_print": None,
    "tensorboard": None,
    "timers": ("throughput",),
    "wall_clock_breakdown": None,
    "wandb": None,
    "zero_optimization": (
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ),
}


def unknown(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every key, dotted, that DeepSpeed does not know, and which near ones it knows."""
    decided = {name.partition(".")[0] for name in DECIDED if "." not in name}
    for name, value in given.items():
        if name in decided or name in FIXED or name in IDLE:
            continue
        if name not in KEYS:
            yield name, _near(name, [*KEYS, *decided])
            continue
        inner = KEYS[name]
        if inner is None or not isinstance(value, dict):
            continue
        theirs = [key.partition(".")[2] for key in (*DECIDED, *IDLE) if key.startswith(f"{name}.")]
        for key in value:
            if key not in inner and key not in theirs:
                yield f"{name}.{key}", _near(key, inner)


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
