"""One measuring process: joins the others, measures its device beside them, reports to the
process that started it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Sized
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from pangu import backends
from pangu.calibration import messages, operators
from pangu.calibration.samples import Device
from pangu.processes import die_with_parent


def steps(processes: int, quick: bool) -> int:
    """Length of the progress bar's part that belongs to the workers."""
    shapes: list[Sized] = [operators.PRODUCTS, operators.GROUPED, operators.ATTENTION]
    shapes += [operators.VECTORS, operators.FEW_ROWS]
    local = sum(min(3, len(each)) if quick else len(each) for each in shapes) + 2
    sizes = len(messages.QUICK_SIZES if quick else messages.SIZES)
    return local + (sizes * len(messages.KINDS) if processes > 1 else 0)


def work(
    rank: int,
    processes: int,
    threads: int,
    store: str,
    config: Config,
    quick: bool,
    out: Queue[Any],
) -> None:
    """Measure, with all processes busy at the same time. Puts ("progress", text) and, last,
    ("done", Device) into `out`; or ("error", sentence). Rank 0 alone reports."""
    die_with_parent()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    try:
        backend = backends.select(config.backend.name, rank)
    except RuntimeError as error:
        out.put(("error", str(error)))
        return
    dist.init_process_group(
        backend.collective_library,
        rank=rank,
        world_size=processes,
        store=dist.FileStore(store, processes),
    )
    device = describe(config, threads)
    for name, measure in operators.plan(quick):
        _say(out, rank, name)
        dist.barrier()  # all ranks run the same operator at the same time
        device.samples += measure()
    if processes > 1:
        for kind in messages.KINDS:
            for size in messages.QUICK_SIZES if quick else messages.SIZES:
                _say(out, rank, f"{kind} of {size // 1024} KiB")
                device.samples.append(messages.measure(kind, size))
    if rank == 0:
        out.put(("done", device))
    dist.barrier()
    dist.destroy_process_group()


def _say(out: Queue[Any], rank: int, text: str) -> None:
    if rank == 0:
        out.put(("progress", text))


def describe(config: Config, threads: int) -> Device:
    """This process's device, as yet without samples."""
    backend = backends.current()
    configured = config.backend.precision
    precision = backend.default_precision if configured == "auto" else configured
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core")]
    return Device(
        backend=backend.name,
        asynchronous=backend.asynchronous,
        description=f"{backend.description}, {os.cpu_count()} cores of host {platform.node()}",
        precision=precision,
        memory_bytes=backend.total_memory_bytes,
        matrix_units=backend.matrix_units,
        peak_tflops=config.backend.peak_tflops or backend.peak_tflops(precision),
        threads=threads,
        versions=", ".join(versions),
    )
