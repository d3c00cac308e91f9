"""Process groups of a run: torch.distributed, then megatron-core's parallel groups."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from configs.dispatch import resolved
from configs.layout import mtp_stage, ranks_per_node
from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu import backends
from pangu.backends import whereabouts
from pangu.moe.dispatch import nodes

_answers: list[whereabouts.Answers] = []  # while there is a run


def initialize(config: Config) -> None:
    """Join the run. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be in the environment.

    Every group gets the same timeout, so that a missing rank ends the run with a message
    instead of a hang.
    """
    timeout = timedelta(minutes=config.launch.timeout_minutes)
    backend = backends.current()
    if not dist.is_initialized():
        dist.init_process_group(backend.collective_library, timeout=timeout)
        if dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
            _answers.append(whereabouts.Answers(store, dist.get_rank()))
    p = config.parallel
    virtual = p.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_model_parallel_size,
        expert_tensor_parallel_size=p.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.launch.timeout_minutes,
        create_gloo_process_groups=False,
        get_embedding_ranks=lambda ranks: _embedding_ranks(config, ranks),
    )
    if config.model.num_experts and resolved(config) == "hierarchical":
        if not (per_node := ranks_per_node(config)):
            reason = "nodes have different numbers of ranks"
            raise ConfigError([Violation("moe.dispatcher", "hierarchical", reason)])
        nodes.initialize(per_node, timeout)
    # On a CPU the device's generator is the host's, of which the engine warns at every mask.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


def _embedding_ranks(config: Config, pipeline: list[int]) -> list[int]:
    """Ranks of a pipeline over which megatron-core adds up the embedding's gradients: its own
    choice, the two ends, unless multi-token prediction looks it up elsewhere."""
    ends = {pipeline[0], pipeline[-1]}
    mtp = pipeline[mtp_stage(config) % len(pipeline)]
    if config.model.mtp_num_layers and mtp not in ends:
        ends.add(mtp)
        if not config.model.tie_embeddings:  # the last rank then has the head's weight alone
            ends.remove(pipeline[-1])
    return sorted(ends)


def join_alone(config: Config) -> None:
    """A run of this process alone, without a launcher: benchmarks, generation, notebooks."""
    store = dist.HashStore()
    name = backends.current().collective_library
    dist.init_process_group(name, store=store, rank=0, world_size=1)
    initialize(config)


def shutdown() -> None:
    """Leave the run."""
    while _answers:
        _answers.pop().stop()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_last_stage() -> bool:
    """Whether this rank computes the loss."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def sum_over_losses(values: torch.Tensor) -> torch.Tensor:
    """Sum of float64 `values` over the ranks that see different tokens; same result on every rank.

    Tensor-parallel ranks hold copies and earlier pipeline stages hold nothing: they add zero.
    """
    counts = is_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    total = values if counts else torch.zeros_like(values)
    if backends.current().reduces_float64:
        dist.all_reduce(total)
        return total
    # Its bits are gathered, and added here.
    every = total.new_empty(dist.get_world_size() * total.numel(), dtype=torch.int64)
    dist.all_gather_into_tensor(every, total.flatten().view(torch.int64))
    return every.view(torch.float64).view(-1, *total.shape).sum(0)
