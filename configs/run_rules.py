"""Rules about memory policy, optimizer and data, and what the trainer can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from configs.change_rules import ALLOWABLE
from configs.layout import num_virtual_stages
from configs.limits import bounded
from configs.problem import Problem, get
from configs.schema import Config, ModelConfig, RecomputeModule

# What is recomputed where something larger is.
INSIDE: dict[str, set[str]] = {
    "moe": {"moe_act", "moe_fc1", "moe_permute", "shared_experts"},
    "moe_fc1": {"moe_act"},
}
# Whose recomputation keeps on the device what whose swap would send away: the engine keeps inputs
# of what it recomputes as leaves, which their gradient's node holds.
KEEPS: dict[str, set[str]] = {
    "moe_act": {"moe", "moe_fc1"},
    "moe_fc1": {"moe", "moe_permute"},
    "moe_permute": {"layernorm", "moe"},
}
# The largest beta with which a moment in bfloat16 surely moves.
SLOWEST_BF16 = 0.99


def bounds(config: Config) -> tuple[Config, list[Problem]]:
    """Numbers outside their limits, and the configuration with others in their places."""
    mended, found = bounded(config)
    problems = []
    for one in found:
        plain = one.key.endswith("]") or one.key.startswith(("optimizer.phases", "data."))
        key, values = one.key, {} if plain else {one.key: [one.nearest]}
        hint = f"{key}={one.nearest}" if plain else ""
        problems.append(Problem(f"bounds:{key}", key, one.value, one.reason, values, hint))
    return mended, problems


def memory(config: Config) -> Iterator[Problem]:
    yield from _auto(config)
    yield from _recomputation(config)
    yield from _swap(config)


def _auto(config: Config) -> Iterator[Problem]:
    policy, key = config.memory, "memory.limit_gib"
    if policy.recompute_granularity != "auto":
        if policy.limit_gib is not None:
            reason = "only memory=auto chooses what to keep by a limit"
            hint = "beside memory=auto, or no limit"
            yield Problem("limit", key, policy.limit_gib, reason, hint=hint)
        return
    if policy.limit_gib is None:
        reason = "memory=auto recomputes and swaps modules until a run stays below a limit"
        ways: dict[str, list[Any]] = {"memory.recompute_granularity": ["none"]}
        yield Problem("no limit", key, None, reason, ways, hint="a limit in GiB")
    if policy.swap:
        reason = "memory=auto chooses what is swapped"
        options: dict[str, list[Any]] = {"memory.swap": [[]]}
        yield Problem("swap chosen", "memory.swap", policy.swap, reason, options)
    if not config.hardware:
        reason = "memory=auto weighs seconds against bytes, of a machine"
        hint = "a preset of configs/hardware, or the file that python -m pangu.calibrate writes"
        yield Problem("no machine", "hardware", None, reason, hint=hint)


def _absent(model: ModelConfig, modules: list[RecomputeModule]) -> list[str]:
    """Those of `modules` that a model does not have."""
    absent = {
        "mla_up_proj": model.attention != "mla",
        "moe": not model.num_experts,
        "moe_act": not model.num_experts,
        "moe_fc1": not model.num_experts,
        "moe_permute": not model.num_experts,
        "shared_experts": not model.shared_expert_ffn_hidden_size,
        "mlp": bool(model.num_experts) and not model.num_dense_layers,
    }
    return [name for name in modules if absent.get(name)]


def _swap(config: Config) -> Iterator[Problem]:
    policy, key = config.memory, "memory.swap"
    again = policy.recompute_modules if policy.recompute_granularity == "selective" else []
    missing = _absent(config.model, policy.swap)
    both = [name for name in policy.swap if name in again]
    kept = [name for name in policy.swap if name not in (*missing, *both)]
    if missing:
        reason = f"this model has no {', '.join(missing)} to swap"
        yield Problem("absent swap", key, policy.swap, reason, {key: [kept]})
    if both:
        reason = f"{', '.join(both)} cannot be swapped and recomputed too"
        options: dict[str, list[Any]] = {key: [kept], "memory.recompute_granularity": ["none"]}
        yield Problem("swapped twice", key, policy.swap, reason, options)
    if policy.swap and policy.recompute_granularity == "full":
        reason = "whole layers are recomputed: nothing inside them is kept"
        options = {key: [[]], "memory.recompute_granularity": ["none"]}
        yield Problem("swap of nothing", key, policy.swap, reason, options)


def _recomputation(config: Config) -> Iterator[Problem]:
    policy, model = config.memory, config.model
    key = "memory.recompute_modules"
    if policy.recompute_granularity == "selective":
        if not policy.recompute_modules:
            reason = "selective recomputation with nothing selected"
            options: dict[str, list[Any]] = {
                key: [["core_attn"]],
                "memory.recompute_granularity": ["none"],
            }
            yield Problem("nothing selected", key, [], reason, options)
        missing = _absent(model, policy.recompute_modules)
        if missing:
            kept = [name for name in policy.recompute_modules if name not in missing]
            reason = f"this model has no {', '.join(missing)} to recompute"
            options = {key: [kept or ["core_attn"]]}
            yield Problem("absent module", key, policy.recompute_modules, reason, options)
        if "moe_permute" in policy.recompute_modules and config.moe.dispatch_chunks > 1:
            kept = [name for name in policy.recompute_modules if name != "moe_permute"]
            reason = "recomputing moe_permute sends a layer's tokens once more, all at once"
            options = {key: [kept or ["core_attn"]], "moe.dispatch_chunks": [1]}
            yield Problem("chunks sent again", key, policy.recompute_modules, reason, options)
        for outer, within in INSIDE.items():
            inner = within & set(policy.recompute_modules)
            if outer in policy.recompute_modules and inner:
                kept = [name for name in policy.recompute_modules if name not in inner]
                reason = f"recomputing {outer} already recomputes {', '.join(sorted(inner))}"
                yield Problem("nested", key, policy.recompute_modules, reason, {key: [kept]})
    if policy.recompute_granularity == "full":
        slots = model.num_layers + config.parallel.num_noop_layers
        layout = config.parallel.pipeline_layout or [-(-slots // num_virtual_stages(config))]
        per_stage = max(layout)
        if policy.recompute_num_layers > per_stage:
            key = "memory.recompute_num_layers"
            reason = f"a stage holds {per_stage} layers"
            options = {key: list(range(1, per_stage + 1))}
            yield Problem("full", key, policy.recompute_num_layers, reason, options)


def optimizer(config: Config) -> Iterator[Problem]:
    yield from _moments(config)
    options = config.optimizer
    schedules = [("optimizer", options.lr, options.min_lr)] + [
        (f"optimizer.phases[{index}]", phase.lr, phase.min_lr)
        for index, phase in enumerate(options.phases)
    ]
    for key, lr, min_lr in schedules:
        if min_lr > lr:
            reason = f"the rate decays from lr={lr:g} and cannot end above it"
            yield Problem(f"lr {key}", f"{key}.min_lr", min_lr, reason, hint=f"at most {lr:g}")
    planned = sum(phase.steps for phase in options.phases)
    if options.phases and config.train.steps > planned:
        reason = f"the phases end after {planned} steps"
        yield Problem(
            "phases", "train.steps", config.train.steps, reason, {"train.steps": [planned]}
        )
    parallel = config.parallel
    if parallel.overlap_param_gather and not (
        parallel.overlap_grad_reduce and parallel.zero_stage >= 1
    ):
        key = "parallel.overlap_param_gather"
        reason = "gathering weights early needs overlap_grad_reduce=true and zero_stage>=1"
        yield Problem("overlap", key, True, reason, {key: [False]})


def _moments(config: Config) -> Iterator[Problem]:
    """bfloat16 tells apart what differs by 1/256: a moment that decays more slowly stays."""
    options = config.optimizer
    if options.moments_dtype != "bf16":
        return
    for key in ("adam_beta1", "adam_beta2"):
        beta = getattr(options, key)
        if beta > SLOWEST_BF16:
            reason = (
                f"a moment in bf16 does not move by {1 - beta:.2g} of itself, which is less than "
            )
            reason += "it can tell apart"
            fields: dict[str, list[Any]] = {f"optimizer.{key}": [SLOWEST_BF16]}
            fields["optimizer.moments_dtype"] = ["fp32"]
            yield Problem("slow bf16 moments", f"optimizer.{key}", beta, reason, fields)


def data(config: Config) -> Iterator[Problem]:
    source = config.data
    if source.name == "indexed" and not source.blend:
        hint = "data.blend={path/of/corpus: 1.0}, written by python -m pangu.data.prepare"
        reason = "an indexed corpus needs at least one prefix of .bin/.idx files"
        yield Problem("blend", "data.blend", {}, reason, hint=hint)
    crossing = source.reset_position_ids and not source.reset_attention_mask
    if crossing and config.model.position_embedding == "rope":
        key = "data.reset_position_ids"
        reason = "rotary positions are distances, and documents see each other: nothing restarts"
        options: dict[str, list[Any]] = {"data.reset_attention_mask": [True], key: [False]}
        yield Problem("positions", key, True, reason, options)


def swap_limits(config: Config) -> Iterator[Problem]:
    """What the trainer cannot swap."""
    memory = config.memory
    again = memory.recompute_modules if memory.recompute_granularity == "selective" else []
    for module in sorted(set(again) & KEEPS.keys()):
        if held := KEEPS[module] & set(memory.swap):
            kept = [name for name in memory.swap if name not in held]
            reason = f"recomputing {module} keeps what {', '.join(sorted(held))} would send away"
            yield Problem(
                f"held {module}", "memory.swap", memory.swap, reason, {"memory.swap": [kept]}
            )
    if memory.swap_optimizer and config.backend.name != "cpu":
        key = "memory.swap_optimizer"
        reason = "the trainer swaps the optimizer's state into a file, where the device is the host"
        options: dict[str, list[Any]] = {key: [False], "backend.name": ["cpu"]}
        yield Problem("swapped optimizer", key, True, reason, options)
    if memory.swap_optimizer and config.model.num_experts and config.moe.placement == "dynamic":
        key = "moe.placement"
        reason = "moments that move while a checkpoint reads their file would be saved elsewhere"
        options = {key: ["static"], "memory.swap_optimizer": [False]}
        yield Problem("swapped and placed", key, "dynamic", reason, options)


def _overlap_limits(config: Config) -> Iterator[Problem]:
    """Where the trainer cannot run a forward pass beside a backward pass."""
    parallel, key = config.parallel, "parallel.overlap_expert_parallel"
    if not parallel.overlap_expert_parallel:
        return
    options: dict[str, list[Any]] = {key: [False]}
    stages, chunks = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
    if parallel.pipeline_model_parallel_size > 1 == parallel.virtual_pipeline_model_parallel_size:
        reason = "in a pipeline the trainer overlaps micro-batches of interleaved stages alone"
        more = {**options, f"parallel.{stages}": [1], f"parallel.{chunks}": [2]}
        yield Problem("overlapped stages", key, True, reason, more)
    if config.model.lora_rank and config.model.lora_dropout:
        reason = "two passes in one process draw from one generator, and none could be recomputed"
        more = {**options, "model.lora_dropout": [0.0]}
        yield Problem("overlapped dropout", key, True, reason, more)


def _chunk_limits(config: Config) -> Iterator[Problem]:
    """Where the trainer cannot cut what travels to experts into chunks."""
    model, parallel, memory = config.model, config.parallel, config.memory
    again = memory.recompute_modules if memory.recompute_granularity == "selective" else []
    adapted = model.lora_rank and "experts_fc1" in model.lora_modules
    early = parallel.overlap_grad_reduce and config.moe.dispatch_chunks > 1
    if adapted and early and "moe_fc1" in again:
        key, reason = "moe.dispatch_chunks", "adapters inside a recomputed moe_fc1 get a gradient "
        reason += "of each chunk, and overlap_grad_reduce would reduce the first alone"
        options: dict[str, list[Any]] = {key: [1], "parallel.overlap_grad_reduce": [False]}
        yield Problem("adapters in chunks", key, config.moe.dispatch_chunks, reason, options)


def trainer_limits(config: Config) -> Iterator[Problem]:
    """What the simulator can plan and the trainer does not run."""
    parallel, backend, resume = config.parallel, config.backend, config.checkpoint.resume
    plan_only = "the simulator plans it, the trainer does not run it"
    limits: tuple[tuple[str, list[Any]], ...] = (
        ("parallel.schedule", ["1f1b"]),
        ("backend.precision", ["auto", "fp32", "fp64", "bf16"]),
    )
    for key, allowed in limits:
        if (value := get(config, key)) not in allowed:
            loss_scale = "its range needs a scaled loss, which the trainer does not have"
            reason = loss_scale if value == "fp16" else plan_only
            yield Problem(f"plan only {key}", key, value, reason, {key: allowed})
    # Experts would go on without, and differ from the dense layers beside them.
    ungated: tuple[tuple[str, list[Any]], ...] = (
        ("model.activation", ["swiglu"]),
        ("model.add_mlp_bias", [False]),
    )
    for key, allowed in ungated if config.model.num_experts else ():
        if (value := get(config, key)) not in allowed:
            reason = "the trainer's experts are SwiGLU without biases"
            options: dict[str, list[Any]] = {key: allowed}
            yield Problem(f"experts {key}", key, value, reason, options)
    if parallel.context_parallel_size > 1 and parallel.context_parallel_type == "ring":
        key = "parallel.context_parallel_type"
        yield Problem("ring", key, "ring", plan_only, {key: ["all_to_all"]})
    if config.data.name == "stdlib" and config.model.vocab_size < 257:
        key = "model.vocab_size"
        reason = "data=stdlib has 257 tokens at least: 256 bytes and the end of a document"
        options = {key: [257, 1024]}
        yield Problem("small vocabulary", key, config.model.vocab_size, reason, options)
    if backend.name == "npu" and backend.precision == "fp64":
        key = "backend.precision"
        reason = "NPUs have no double-precision matrix products"
        yield Problem("npu fp64", key, "fp64", reason, {key: ["auto", "bf16", "fp32"]})
    yield from swap_limits(config)
    yield from _overlap_limits(config)
    yield from _chunk_limits(config)
    if resume not in ("auto", "never") and not os.path.isdir(resume):
        key = "checkpoint.resume"
        yield Problem("resume", key, resume, "there is no such folder", {key: ["auto", "never"]})
    allowed = config.checkpoint.allow_changes
    if unknown := [name for name in allowed if name not in ALLOWABLE]:
        key, reason = (
            "checkpoint.allow_changes",
            f"{', '.join(unknown)} cannot be allowed to change",
        )
        yield Problem("allow_changes", key, allowed, reason, hint=f"of {', '.join(ALLOWABLE)}")


def profile(config: Config) -> Iterator[Problem]:
    key, steps, count = "profile.steps", config.profile.steps, config.train.steps
    if late := [step for step in steps if step > count]:
        reason = f"a run of {count} steps has no step {late[0]}"
        options: dict[str, list[Any]] = {key: [[s for s in steps if s <= count]]}
        yield Problem("late profile", key, steps, reason, options)
    if steps and config.backend.name in ("cuda", "npu"):
        reason = "traces are taken of processes on CPUs; others have their vendor's profiler"
        yield Problem("profiled device", key, steps, reason, {key: [[]], "backend.name": ["cpu"]})
