"""Collectives between real processes, through the backend's own library."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from pangu import backends
from pangu.calibration.samples import ROUNDS, Sample

SIZES = [2**exponent for exponent in (12, 15, 18, 20, 21, 22, 23, 24)]  # bytes
QUICK_SIZES = [2**12, 2**18, 2**20]
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast")


def measure(kind: str, bytes: int, group: dist.ProcessGroup | None = None) -> Sample:
    """One collective over all processes, or of each group over its own; `bytes` as
    `simulator.collectives` counts them: the whole buffer of one rank. Collective: every rank calls
    it at the same time.

    The slowest rank's median counts: a collective has ended when all have it.
    """
    call = _call(kind, bytes // 4, group)
    _repeated(call, 2)
    # Every rank must repeat as often: the number follows from the time that all agreed on.
    repeats = max(1, min(50, round(0.01 / _slowest(_repeated(call, 2)))))
    seconds = statistics.median(_slowest(_repeated(call, repeats)) for _ in range(ROUNDS))
    shape = {"bytes": bytes, "size": dist.get_world_size(group)}
    return Sample(kind, shape, seconds)


def _repeated(call: Callable[[], object], repeats: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    backends.current().synchronize()
    return (time.perf_counter() - started) / repeats


def _slowest(seconds: float) -> float:
    tensor = torch.tensor([seconds], device=backends.current().device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _call(kind: str, count: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
    device, size, rank = backends.current().device, dist.get_world_size(group), dist.get_rank(group)
    count = max(count // size, 1) * size
    whole = torch.ones(count, device=device)
    part = torch.ones(count // size, device=device)
    other = torch.empty_like(whole)
    after, before = (rank + 1) % size, (rank - 1) % size

    def send_recv() -> None:
        # A pipeline's stages send one way: even ranks to odd ones.
        if rank % 2 == 0 and after > rank:
            dist.send(whole, group=group, group_dst=after)
        elif rank % 2:
            dist.recv(other, group=group, group_src=before)

    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "send_recv": send_recv,
        "broadcast": lambda: dist.broadcast(whole, group=group, group_src=0),
    }
    return calls[kind]
