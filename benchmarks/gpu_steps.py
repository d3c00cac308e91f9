"""Whole training steps on a GPU: time, tokens, MFU, peak memory, and where a step's time goes.

Part of `benchmarks/gpu.py`. Three models, as in the table of goals: 8 × 4096 tokens in
two micro-batches, AdamW with float32 masters, nothing recomputed.
"""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

BATCH = ["train.seq_length=4096", "train.global_batch_size=8", "train.micro_batch_size=4"]
TINY_BATCH = ["train.seq_length=16", "train.global_batch_size=2", "train.micro_batch_size=1"]
MODELS = {
    "1B MoGE": [
        "model=moge_tiny",
        "model.num_layers=16",
        "model.hidden_size=1024",
        "model.num_attention_heads=16",
        "model.num_query_groups=4",
        "model.kv_channels=64",
        "model.vocab_size=32768",
        "model.max_position_embeddings=4096",
        "model.num_experts=64",
        "model.moe_ffn_hidden_size=256",
        "model.shared_expert_ffn_hidden_size=0",
        "moe.top_k=8",
        "moe.num_expert_groups=8",
    ],
    "Qwen3-30B × 4 layers": ["model=qwen3_30b_a3b", "model.num_layers=4"],
    "Pangu Pro × 2 layers": ["model=pangu_pro_moe", "model.num_layers=2"],
}
TINY_MODELS = {"tiny": ["model=moge_tiny", "model.num_layers=1", "model.vocab_size=64"]}
STEPS = 5
# What a kernel is, by its name; the first that fits.
KINDS = {
    "ours": r"^_(swiglu|rms_norm|cross_entropy|routing|choice|permute|rotary)_|^_adamw",
    "attention": r"flash|fmha|attention",
    "grouped products": r"grouped|group_gemm|GroupProblem",
    "products": r"gemm|nvjet|cutlass|cublas",
    "optimizer": r"multi_tensor|adam",
    "copies and casts": r"copy|memcpy|memset|fill",
    "sorts, scans, searches": r"sort|scan|radix|topk|search|bucket",
    "gathers": r"index|gather|scatter|embedding",
    "reductions": r"reduce|norm|softmax",
    "element-wise": r"elementwise|foreach|vectorized|fused",
}


def step_of(overrides: list[str]) -> tuple[Any, Callable[[], Any]]:
    """The configuration, and one training step of its model."""
    from configs.compose import load
    from pangu.data.datasets import batches, build_datasets
    from pangu.engines.contract import StepShape
    from pangu.engines.megatron.engine import MegatronEngine

    config = load([*overrides, "data=synthetic", "optimizer.warmup_steps=0"])
    train = config.train
    data = build_datasets(
        config,
        train_samples=(STEPS + 4) * train.global_batch_size,
        validation_samples=0,
        seq_length=train.seq_length,
    )
    engine = MegatronEngine.build(config)
    iterator = batches(
        data.train,
        config,
        data_parallel_rank=0,
        data_parallel_size=1,
        consumed_sequences=0,
        micro_batch_size=train.micro_batch_size,
    )
    shape = StepShape(config.num_microbatches, train.micro_batch_size, train.seq_length)
    before: list[Callable[[], Any]] = []

    def step() -> None:
        """Queued before the step before it is read, as in training."""
        result = engine.train_step(iterator, shape)
        while before:
            before.pop()()
        before.append(result)

    return config, step


def in_a_row(step: Callable[[], Any], count: int) -> float:
    """Milliseconds of a step among others, after two that are not counted."""
    from pangu import backends

    for _ in range(2 if count > 1 else 0):
        step()
    backends.current().synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    backends.current().synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def kinds(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a step on the device, by kind of kernel; ours also each by itself."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        step()
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiled.key_averages():
        taken = event.self_device_time_total / 1e3
        matches = (kind for kind, names in KINDS.items() if re.search(names, event.key, re.I))
        kind = next(matches, "others")
        found[kind] = found.get(kind, 0.0) + taken
        if kind == "ours":
            found[event.key] = found.get(event.key, 0.0) + taken
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def waits(step: Callable[[], Any]) -> int:
    """How often the host waits for the device in a step, copies to it included."""
    import torch

    if not torch.cuda.is_available():
        step()
        return 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in said)


def measured(overrides: list[str]) -> dict[str, Any]:
    """Of a model: milliseconds a step, tokens/s, MFU in percent, GiB at peak, kinds of kernels."""
    import torch

    from pangu import backends
    from simulator.api import model_flops_per_token

    backend = backends.current()
    backend.reset_peak_memory()
    config, step = step_of(overrides)
    taken = in_a_row(step, STEPS if backend.asynchronous else 1)
    tokens = config.train.global_batch_size * config.train.seq_length
    rate = tokens / taken * 1e3
    row: dict[str, Any] = {"ms": taken, "tokens/s": rate, "GiB": backend.memory_bytes() / 2**30}
    if peak := backend.peak_tflops("bf16"):
        flops = model_flops_per_token(config, seq_length=config.train.seq_length)
        row["MFU"] = 100 * rate * flops / (peak * 1e12)
    row["kinds"], row["waits"] = kinds(step), waits(step)
    del step
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def measured_steps(models: dict[str, list[str]], batch: list[str]) -> list[dict[str, Any]]:
    """Each model on our kernels and on plain operators; what does not fit says so."""
    import torch
    from gpu import plain_forms

    from pangu import backends

    ours, found = backends.current().operators, []
    for name, overrides in models.items():
        for kind, variants in (("kernels", ours), ("plain", plain_forms())):
            backends.use(variants)
            row: dict[str, Any] = {"model": name, "operators": kind}
            try:
                row |= measured([*overrides, *batch, f"backend={backends.current().name}"])
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
                gc.collect()
                torch.cuda.empty_cache()
            found.append(row)
    backends.use(ours)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        name = f"{row['model']}, {row['operators']}"
        if "error" in row:
            print(f"{name}: {row['error']}")
            continue
        mfu = f"{row['MFU']:.1f} % MFU, " if "MFU" in row else ""
        print(
            f"{name}: {row['ms']:.0f} ms, {row['tokens/s']:.0f} tokens/s, {mfu}"
            f"{row['GiB']:.1f} GiB, the host waits {row['waits']} times"
        )
        for kind, taken in row["kinds"].items():
            print(f"    {kind:32} {taken:8.2f} ms")
