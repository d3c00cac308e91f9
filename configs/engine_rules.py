"""What each engine cannot train: rules of `engine=deepspeed` and of what belongs to it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.deepspeed_keys import DECIDED, FIXED, IDLE, KEYS, unknown
from configs.problem import CP, EP, ETP, PP, TP, Problem, get
from configs.schema import Config

NAME, ZERO, OFFLOAD = "engine.name", "parallel.zero_stage", "engine.offload"
NVME_PATH = "engine.nvme_path"
MEGATRON: dict[str, list[Any]] = {NAME: ["megatron"]}


def engine(config: Config) -> Iterator[Problem]:
    """What the engine named does not train."""
    if config.engine.name == "megatron":
        yield from _megatron(config)
        return
    yield from _layout(config)
    yield from _memory(config)
    yield from _json(config)


def _megatron(config: Config) -> Iterator[Problem]:
    more: dict[str, list[Any]] = {NAME: ["deepspeed"]}
    stage = config.parallel.zero_stage
    if stage > 1:
        reason = "the simulator plans it; megatron-core's optimizer shards its state alone, "
        reason += "DeepSpeed gradients (2) and weights (3) too"
        yield Problem("megatron ZeRO", ZERO, stage, reason, {ZERO: [0, 1], **more})
    reason = "is DeepSpeed's, and engine=megatron has none of it"
    if config.engine.offload != "none":
        options = {OFFLOAD: ["none"], **more}
        yield Problem("megatron offload", OFFLOAD, config.engine.offload, reason, options)
    elif path := config.engine.nvme_path:
        yield Problem("megatron NVMe", NVME_PATH, path, reason, more, "without it")
    if config.engine.config:
        key = "engine.config"
        yield Problem("megatron JSON", key, config.engine.config, reason, {key: [{}], **more})


def _layout(config: Config) -> Iterator[Problem]:
    """DeepSpeed here is for data- and expert-parallel ranks."""
    why = {
        PP: "DeepSpeed's pipeline is for models of its own, and ZeRO 2 and 3 go with none",
        TP: "DeepSpeed shards over data-parallel ranks, each of which has whole layers",
        CP: "DeepSpeed shards over data-parallel ranks, each of which has whole sequences",
        ETP: "DeepSpeed knows experts that are whole",
    }
    for key, reason in why.items():
        if (size := get(config, key)) > 1:
            yield Problem(f"deepspeed {key}", key, size, reason, {key: [1], **MEGATRON})
    if config.parallel.zero_stage == 3 and (size := get(config, EP)) > 1:
        reason = "ZeRO 3 shards weights over all data-parallel ranks, and experts on "
        reason += f"{size} expert-parallel ranks are not copies of each other"
        yield Problem("ZeRO 3 and EP", ZERO, 3, reason, {ZERO: [0, 1, 2], EP: [1]})
    no: tuple[tuple[str, str], ...] = (
        ("parallel.overlap_grad_reduce", "DeepSpeed has its own: "),
        ("parallel.overlap_param_gather", "DeepSpeed gathers weights in its own way: "),
        ("parallel.overlap_expert_parallel", "DeepSpeed runs one micro-batch after the other"),
    )
    for key, reason in no:
        if get(config, key):
            if reason.endswith(": "):
                reason += "engine.config={zero_optimization:{overlap_comm:true}}"
            yield Problem(f"deepspeed {key}", key, True, reason, {key: [False], **MEGATRON})
    yield from _precision(config)
    if (chunks := config.moe.dispatch_chunks) > 1:
        key, reason = "moe.dispatch_chunks", "DeepSpeed expects a layer's experts to compute once"
        yield Problem("deepspeed chunks", key, chunks, reason, {key: [1], **MEGATRON})
    if config.model.num_experts and config.moe.placement == "dynamic":
        key, reason = "moe.placement", "experts cannot move between DeepSpeed's pieces of weights"
        options = {key: ["static"], **MEGATRON}
        yield Problem("deepspeed placement", key, "dynamic", reason, options)


def _precision(config: Config) -> Iterator[Problem]:
    key, precision, stage = (
        "backend.precision",
        config.backend.precision,
        config.parallel.zero_stage,
    )
    float32 = {key: ["auto", "fp32"], **MEGATRON}
    if precision == "bf16" and stage == 0:
        reason = "at stage 0 DeepSpeed keeps no weights in float32 beside bfloat16's, and sums "
        reason += "gradients up in bfloat16"
        yield Problem("deepspeed bf16", key, precision, reason, {**float32, ZERO: [1, 2, 3]})
    elif precision not in ("auto", "fp32", "bf16"):
        reason = "DeepSpeed trains in float32 here, and from stage 1 on in bfloat16"
        yield Problem("deepspeed precision", key, precision, reason, float32)


def _memory(config: Config) -> Iterator[Problem]:
    memory, offload, stage = config.memory, config.engine.offload, config.parallel.zero_stage
    if memory.swap:
        key, reason = "memory.swap", "activations are swapped beside megatron-core's schedule"
        yield Problem("deepspeed swap", key, memory.swap, reason, {key: [[]], **MEGATRON})
    if memory.swap_optimizer:
        key, reason = "memory.swap_optimizer", "DeepSpeed has engine.offload for that"
        options = {key: [False], **MEGATRON}
        yield Problem("deepspeed swapped state", key, True, reason, options)
    if config.optimizer.moments_dtype != "fp32":
        key, reason = "optimizer.moments_dtype", "DeepSpeed keeps moments in float32"
        options = {key: ["fp32"], **MEGATRON}
        yield Problem("deepspeed moments", key, config.optimizer.moments_dtype, reason, options)
    if offload == "nvme" and stage != 3:
        reason = "DeepSpeed has files for stage 3 alone: at others the state would stay in the "
        reason += "host's memory without a word"
        yield Problem("nvme stage", OFFLOAD, offload, reason, {ZERO: [3]})
    elif offload != "none" and stage == 0:
        reason = "stage 0 shards nothing, and DeepSpeed offloads what it has sharded"
        options = {OFFLOAD: ["none"], ZERO: [1, 2, 3]}
        yield Problem("offload of nothing", OFFLOAD, offload, reason, options)
    if (offload == "nvme") != bool(config.engine.nvme_path):
        reason = "engine.offload=nvme and a folder on the drive belong together"
        hint = "engine.offload=nvme engine.nvme_path=FOLDER"
        yield Problem("nvme path", NVME_PATH, config.engine.nvme_path, reason, hint=hint)


def _json(config: Config) -> Iterator[Problem]:
    key, given = "engine.config", list(_dotted(config.engine.config))
    for name, ours in DECIDED.items():
        if any(path == name or path.startswith(f"{name}.") for path in given):
            reason = f"{name} of DeepSpeed's JSON follows from {ours}"
            yield Problem(f"JSON {name}", key, config.engine.config, reason, hint=f"{ours}=…")
    for name in (*FIXED, *IDLE):
        if any(path == name or path.startswith(f"{name}.") for path in given):
            reason = f"{name} would change what the engine has reckoned with"
            if name in IDLE:
                reason = f"{name} is for what is not used of DeepSpeed, and would do nothing"
            yield Problem(f"JSON {name}", key, config.engine.config, reason, hint="without it")
    for name, hint in unknown(config.engine.config):
        reason = f"DeepSpeed's JSON has no {name}, and DeepSpeed ignores what it does not know"
        yield Problem(f"JSON {name}", key, config.engine.config, reason, hint=hint)
    for name, value in config.engine.config.items():
        if KEYS.get(name) and not isinstance(value, dict):
            reason = f"{name} of DeepSpeed's JSON is a section"
            hint = f"engine.config={{{name}:{{KEY:VALUE}}}}"
            yield Problem(f"JSON {name}", key, config.engine.config, reason, hint=hint)

    aio = config.engine.config.get("aio")
    for name, value in (aio if isinstance(aio, dict) else {}).items():
        if name in (KEYS["aio"] or ()) and (type(value) is not int or value < 1):
            reason = f"aio.{name} is a number of 1 or more"
            hint = f"engine.config={{aio:{{{name}:8}}}}"
            yield Problem(f"JSON aio.{name}", key, config.engine.config, reason, hint=hint)


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
