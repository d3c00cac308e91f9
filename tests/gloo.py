"""Real gloo processes for tests: `run` starts them, calls a function on every rank and returns
what each rank returned."""

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pangu import backends
from pangu.engines.megatron.fitting import select_backend


def join(rank: int, world_size: int, store: str) -> None:
    """Enter the process group."""
    select_backend("cpu")
    torch.set_num_threads(1)
    dist.init_process_group(
        backends.current().collective_library,
        rank=rank,
        world_size=world_size,
        store=dist.FileStore(store, world_size),
        timeout=timedelta(minutes=2),
    )


def single() -> None:
    """A process group of this process alone, for tests without others."""
    if not dist.is_initialized():
        join(0, 1, os.path.join(tempfile.mkdtemp(), "store"))
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel(tensor_model_parallel_size=1)


def parallel(ranks_per_node: int | None = None, **sizes: int) -> None:
    """Megatron-core's process groups, anew, and those of the experts' nodes."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    if ranks_per_node:
        from pangu.moe.dispatch import nodes

        nodes.initialize(ranks_per_node)
    model_parallel_cuda_manual_seed(1234)


def drop_groups() -> None:
    """Undo `parallel`, with the threads of every group, of which each run has fifty."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def leave() -> None:
    """Undo `single`, for what makes groups of its own in this process."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` on one rank, in this process: starting another takes seconds."""
    leave()
    join(0, 1, os.path.join(tempfile.mkdtemp(), "store"))
    try:
        return function(*arguments)
    finally:
        leave()


def run(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world_size` ranks; the results in order of rank."""
    _start_server()
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _enter,
            (world_size, folder, environment, _Output(), function, arguments),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


class _Output:
    """Where this process writes to. A forked rank that is handed it writes there, and not where the
    server does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _write_to, (DupFd(1), DupFd(2))


def _write_to(*places: Any) -> None:
    for number, place in enumerate(places, 1):
        os.dup2(place.detach(), number)


def _start_server() -> None:
    """The process that ranks are forked from: it has imported the engine, which takes seconds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # it looks for the module there alone
    forkserver.set_forkserver_preload(["engine_loaded"])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def _enter(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    _: None,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    join(rank, world_size, os.path.join(folder, "store"))
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    if dist.is_initialized():  # a program that was run has left
        dist.destroy_process_group()
