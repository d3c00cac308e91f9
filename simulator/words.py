"""A layout in words."""

from __future__ import annotations

from itertools import groupby

from configs.schema import Config, MemoryConfig, ParallelConfig


def recompute_words(memory: MemoryConfig) -> str:
    """What is recomputed, in a few words."""
    if memory.recompute_granularity == "selective":
        return "+".join(memory.recompute_modules)
    if memory.recompute_granularity == "full" and memory.recompute_method == "block":
        return f"full, {memory.recompute_num_layers} a stage"
    return memory.recompute_granularity


def stages_words(parallel: ParallelConfig) -> str:
    """Layers by virtual stage where they are not dealt evenly, runs of equal ones together."""
    if parallel.pipeline_layout is None:
        return "even"
    runs = ((layers, len(list(run))) for layers, run in groupby(parallel.pipeline_layout))
    return " ".join(f"{layers}×{count}" if count > 1 else str(layers) for layers, count in runs)


def layout_words(config: Config, *, recompute: bool = True) -> str:
    """A layout in one line: sizes above 1, micro-batch and, if wanted, what is recomputed."""
    p = config.parallel
    sizes = {
        "TP": p.tensor_model_parallel_size,
        "PP": p.pipeline_model_parallel_size,
        "VPP": p.virtual_pipeline_model_parallel_size,
        "CP": p.context_parallel_size,
        "EP": p.expert_model_parallel_size,
        "ETP": p.expert_tensor_parallel_size,
        "DP": config.data_parallel_size,
    }
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    words.append(f"MBS{config.train.micro_batch_size}")
    if recompute and config.memory.recompute_granularity != "none":
        words.append(f"recompute {recompute_words(config.memory)}")
    return " ".join(words)
