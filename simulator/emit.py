"""A recommended layout as files: an experiment for `pangu.train` and `pangu.doctor`, and the
launch flags of Megatron-LM and MindSpeed-LLM."""

from __future__ import annotations

from typing import Any

import yaml

from configs.compose import groups
from configs.layout import layers_per_virtual_stage, mtp_stage
from configs.schema import Config, ParallelConfig
from simulator.counts.moe import gathers

DECIDED = ("parallel", "memory")  # groups that a search decides on


def experiment(config: Config, overrides: list[str]) -> str:
    """YAML of an experiment: the user's own overrides, then what the search has decided."""
    known = groups()
    chosen: list[dict[str, str]] = []
    tree: dict[str, Any] = {}
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if key in known and not value.endswith((".yaml", ".yml")):
            if key not in DECIDED:
                chosen.append({f"override /{key}": value})
        elif key in known:
            tree["hardware"] = config.hardware
        elif key.split(".")[0] not in DECIDED:
            _put(tree, key.split("."), yaml.safe_load(value))
    tree["devices"] = config.world_size
    tree["parallel"] = _parallel(config.parallel)
    tree["memory"] = vars(config.memory)
    if config.simulation.swap_modules:
        tree.setdefault("simulation", {})["swap_modules"] = list(config.simulation.swap_modules)
    tree.setdefault("train", {})
    tree["train"]["micro_batch_size"] = config.train.micro_batch_size
    tree["train"]["global_batch_size"] = config.train.global_batch_size
    tree["train"]["seq_length"] = config.train.seq_length
    head = "# @package _global_\n# Written by `python -m simulator search`.\n"
    if chosen:
        head += yaml.safe_dump({"defaults": chosen}, sort_keys=False)
    return head + yaml.safe_dump(tree, sort_keys=False)


def _parallel(parallel: ParallelConfig) -> dict[str, Any]:
    return dict(vars(parallel))


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _layout_flag(config: Config) -> str:
    """Megatron-LM's letters: E embedding, t layer, m MTP, L loss, | between virtual stages."""
    parts = ["t" * layers for layers in layers_per_virtual_stage(config)]
    parts[0] = "E" + parts[0]
    parts[mtp_stage(config)] += "m" * config.model.mtp_num_layers
    parts[-1] += "L"
    return "|".join(parts)


def _dispatcher(config: Config) -> str:
    """Megatron's nearest to what was counted; its overlapped schedule knows all-to-all alone."""
    ranks = config.parallel.expert_model_parallel_size
    gather = gathers(config.moe, config.simulation.dispatch, ranks)
    overlapped = config.parallel.schedule == "1f1b_overlap"
    return "allgather" if gather and ranks > 1 and not overlapped else "alltoall"


def launch_flags(config: Config) -> str:
    """The layout as command-line flags, one a line: Megatron-LM's, then MindSpeed-LLM's own."""
    p, memory, train, model = config.parallel, config.memory, config.train, config.model
    flags = [
        f"--tensor-model-parallel-size {p.tensor_model_parallel_size}",
        f"--pipeline-model-parallel-size {p.pipeline_model_parallel_size}",
        f"--micro-batch-size {train.micro_batch_size}",
        f"--global-batch-size {train.global_batch_size}",
        f"--seq-length {train.seq_length}",
    ]
    slots = model.num_layers + p.num_noop_layers
    if p.pipeline_layout is not None:
        flags.append(f"--pipeline-model-parallel-layout {_layout_flag(config)}")
    elif p.virtual_pipeline_model_parallel_size > 1:
        stages = p.pipeline_model_parallel_size * p.virtual_pipeline_model_parallel_size
        flags.append(f"--num-layers-per-virtual-pipeline-stage {slots // stages}")
    if p.sequence_parallel and p.tensor_model_parallel_size > 1:
        flags.append("--sequence-parallel")
    if p.context_parallel_size > 1:
        kind = "p2p" if p.context_parallel_type == "ring" else "a2a"
        flags.append(f"--context-parallel-size {p.context_parallel_size}")
        flags.append(f"--cp-comm-type {kind}")
    if model.num_experts:
        flags += [
            f"--expert-model-parallel-size {p.expert_model_parallel_size}",
            f"--expert-tensor-parallel-size {p.expert_tensor_parallel_size}",
            f"--moe-token-dispatcher-type {_dispatcher(config)}",
            "--moe-grouped-gemm",
        ]
    if p.zero_stage:
        flags.append("--use-distributed-optimizer")
    if p.overlap_grad_reduce:
        flags.append("--overlap-grad-reduce")
    if p.overlap_param_gather:
        flags.append("--overlap-param-gather")
    if memory.recompute_granularity != "none":
        flags.append(f"--recompute-granularity {memory.recompute_granularity}")
    if memory.recompute_granularity == "full":
        flags.append(f"--recompute-method {memory.recompute_method}")
        flags.append(f"--recompute-num-layers {memory.recompute_num_layers}")
    if memory.recompute_granularity == "selective":
        flags.append(f"--recompute-modules {' '.join(memory.recompute_modules)}")
    lines = ["# Megatron-LM", *flags, "# MindSpeed-LLM, in addition"]
    lines += ["--use-flash-attn", "--use-fused-rmsnorm", "--use-fused-swiglu"]
    if p.num_noop_layers:
        back = (p.num_noop_layers + 1) // 2
        front = p.num_noop_layers - back
        layers = [*range(front), *range(slots - back, slots)]
        lines.append(f"--noop-layers {','.join(map(str, layers))}")
    if p.context_parallel_size > 1:
        kind = "megatron" if p.context_parallel_type == "ring" else "ulysses"
        lines.append(f"--context-parallel-algo {kind}_cp_algo")
    if p.schedule == "1f1b_overlap":
        lines.append("--moe-fb-overlap")
    return "\n".join(lines) + "\n"
