"""A layout as the command-line flags of Megatron-LM (core_v0.16.1) and MindSpeed-LLM.

Names are those of `megatron/training/arguments.py`, which makes them of TransformerConfig's fields,
and of `mindspeed/features_manager`. What an engine cannot do stands beside them as a comment.
"""

from __future__ import annotations

from configs.dispatch import resolved
from configs.layout import Part, layers_per_virtual_stage, stage_parts
from configs.schema import Config

# What Megatron-LM's fine-grained offloading calls the tensors of a swapped module: it names the
# operators whose input goes to the host.
OFFLOADED = {
    "layernorm": ("qkv_linear",),
    "core_attn": ("core_attn",),
    "mla_up_proj": ("core_attn",),
    "moe": ("expert_fc1", "moe_act"),
    "moe_act": ("moe_act",),
}
# Members of megatron-core's TransformerLayer, which MindSpeed swaps whole.
SWAPPED = {
    "layernorm": ("input_layernorm", "pre_mlp_layernorm"),
    "core_attn": ("self_attention",),
    "mla_up_proj": ("self_attention",),
}

OURS = ("moe_fc1", "moe_permute")  # recomputed by neither engine by themselves

# Of a pipeline's layout, | between virtual stages.
LETTERS: dict[Part, str] = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


def launch_flags(config: Config) -> str:
    """The flags, one a line: those that both engines know, then each engine's own."""
    both = [*_sizes(config), *_stages(config), *_experts(config), *_memory(config)]
    parts = {
        "# Megatron-LM and MindSpeed-LLM": both,
        "# Megatron-LM only": _megatron(config),
        "# MindSpeed-LLM only": _mindspeed(config),
    }
    return "".join(f"{line}\n" for title, flags in parts.items() for line in (title, *flags))


def _sizes(config: Config) -> list[str]:
    p, train = config.parallel, config.train
    flags = [
        f"--tensor-model-parallel-size {p.tensor_model_parallel_size}",
        f"--pipeline-model-parallel-size {p.pipeline_model_parallel_size}",
        f"--micro-batch-size {train.micro_batch_size}",
        f"--global-batch-size {train.global_batch_size}",
        f"--seq-length {train.seq_length}",
    ]
    if p.sequence_parallel and p.tensor_model_parallel_size > 1:
        flags.append("--sequence-parallel")
    if p.context_parallel_size > 1:
        flags.append(f"--context-parallel-size {p.context_parallel_size}")
    if p.zero_stage:
        flags.append("--use-distributed-optimizer")
    if p.overlap_grad_reduce:
        flags.append("--overlap-grad-reduce")
    if p.overlap_param_gather:
        flags.append("--overlap-param-gather")
    return flags


def _stages(config: Config) -> list[str]:
    """Stages that hold unlike numbers of layers are spelt out; no-op layers do not exist."""
    counts = layers_per_virtual_stage(config)
    if config.parallel.pipeline_layout is not None or len(set(counts)) > 1:
        stages = ("".join(LETTERS[part] for part in stage) for stage in stage_parts(config))
        return [f"--pipeline-model-parallel-layout {'|'.join(stages)}"]
    if config.parallel.virtual_pipeline_model_parallel_size > 1:
        return [f"--num-layers-per-virtual-pipeline-stage {counts[0]}"]
    return []


def _experts(config: Config) -> list[str]:
    p = config.parallel
    if not config.model.num_experts:
        return []
    return [
        f"--expert-model-parallel-size {p.expert_model_parallel_size}",
        f"--expert-tensor-parallel-size {p.expert_tensor_parallel_size}",
        *([] if _dispatches_once(config) else [_dispatcher(config)]),
        "--moe-grouped-gemm",
        *(["# does not cut a layer's tokens into chunks"] * (config.moe.dispatch_chunks > 1)),
    ]


def _dispatches_once(config: Config) -> bool:
    return config.model.num_experts > 0 and config.moe.dispatcher == "deduplicated"


def _dispatcher(config: Config) -> str:
    """The nearest to what was counted that both engines have; their overlapped schedules know
    all-to-all alone."""
    ranks = config.parallel.expert_model_parallel_size
    gather = resolved(config) in ("allgather", "moge") and ranks > 1 and not _overlapped(config)
    return f"--moe-token-dispatcher-type {'allgather' if gather else 'alltoall'}"


def _overlapped(config: Config) -> bool:
    return config.parallel.overlap_expert_parallel


def _memory(config: Config) -> list[str]:
    memory = config.memory
    if memory.recompute_granularity == "none":
        return []
    flags = [f"--recompute-granularity {memory.recompute_granularity}"]
    if memory.recompute_granularity == "full":
        flags.append(f"--recompute-method {memory.recompute_method}")
        flags.append(f"--recompute-num-layers {memory.recompute_num_layers}")
    else:
        own = [name for name in memory.recompute_modules if name in OURS]
        known = [name for name in memory.recompute_modules if name not in OURS]
        flags.append(f"--recompute-modules {' '.join(known)}")
        flags += [f"# does not recompute {name} by itself" for name in own]
    return flags


def _megatron(config: Config) -> list[str]:
    p, memory = config.parallel, config.memory
    flags = []
    if p.context_parallel_size > 1:
        flags.append(f"--cp-comm-type {'p2p' if p.context_parallel_type == 'ring' else 'a2a'}")
    if _overlapped(config):
        flags.append("--overlap-moe-expert-parallel-comm")
        if p.pipeline_model_parallel_size > 1 and p.virtual_pipeline_model_parallel_size == 1:
            flags.append("# overlaps expert communication only where stages are interleaved")
        if config.memory.recompute_granularity == "full":
            flags.append("# does not recompute whole layers beside that overlap")
    if _dispatches_once(config):
        flags += ["--moe-token-dispatcher-type flex", "--moe-flex-dispatcher-backend deepep"]
    elif config.model.num_experts and config.moe.dispatcher == "hierarchical":
        flags.append("# gathers nothing between nodes: a flat all-to-all")
    flags += _zero(p.zero_stage)
    if memory.swap:
        known = [module for module in memory.swap if module in OFFLOADED]
        named = dict.fromkeys(name for module in known for name in OFFLOADED[module])
        flags.append("--fine-grained-activation-offloading")
        flags.append(f"--offload-modules {' '.join(named)}")
        for module in sorted(set(memory.swap) - set(known)):
            flags.append(f"# does not offload {module}")
    if memory.swap_optimizer:
        flags += ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
        flags.append("--overlap-cpu-optimizer-d2h-h2d")
    return flags


def _zero(stage: int) -> list[str]:
    """ZeRO 2 and 3 are Megatron-LM's FSDP."""
    if stage < 2:
        return []
    shards = "optim_grads" if stage == 2 else "optim_grads_params"
    return ["--use-megatron-fsdp", f"--data-parallel-sharding-strategy {shards}"]


def _mindspeed(config: Config) -> list[str]:
    p, memory = config.parallel, config.memory
    flags = ["--use-flash-attn", "--use-fused-rmsnorm", "--use-fused-swiglu"]
    if _dispatches_once(config):
        flags += [_dispatcher(config), "# sends a token once per expert, not once per node"]
    if p.context_parallel_size > 1:
        kind = "megatron" if p.context_parallel_type == "ring" else "ulysses"
        flags.append(f"--context-parallel-algo {kind}_cp_algo")
    if _overlapped(config):
        flags.append("--moe-fb-overlap")
        if p.expert_tensor_parallel_size > 1 or p.expert_model_parallel_size == 1:
            flags.append("# overlaps only with whole experts over several ranks")
        if p.overlap_grad_reduce:
            flags.append("# does not overlap the reduction of gradients beside that")
    if memory.swap:
        named = dict.fromkeys(
            name for module in memory.swap for name in SWAPPED.get(module, ("mlp",))
        )
        flags += ["--swap-attention", f"--swap-modules {','.join(named)}"]
        if _overlapped(config):
            flags.append("# does not swap beside --moe-fb-overlap")
    if memory.swap_optimizer:
        flags.append("--swap-optimizer")
    return flags
