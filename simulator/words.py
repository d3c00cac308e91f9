"""A layout in words."""

from __future__ import annotations

from itertools import groupby

from configs.schema import Config, MemoryConfig, ParallelConfig


def recompute_words(memory: MemoryConfig) -> str:
    """What is recomputed, and what is swapped, in a few words."""
    words: str = memory.recompute_granularity
    if words == "selective":
        words = "+".join(memory.recompute_modules)
    elif words == "full" and memory.recompute_method == "block":
        words = f"full, {memory.recompute_num_layers} a stage"
    if not memory.swap:
        return words
    swap = f"swap {'+'.join(memory.swap)}"
    return swap if words == "none" else f"{words}, {swap}"


def schedule_words(parallel: ParallelConfig) -> str:
    return parallel.schedule + (" overlapped" if parallel.overlap_expert_parallel else "")


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
    if recompute and (config.memory.recompute_granularity != "none" or config.memory.swap):
        words.append(f"recompute {recompute_words(config.memory)}")
    return " ".join(words)
