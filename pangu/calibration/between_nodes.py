"""What joins nodes, measured by all of them at once, under torchrun."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from tqdm import tqdm

from configs.schema import Config
from launch.environment import ProcessEnvironment
from pangu import backends
from pangu.calibration import messages
from pangu.calibration.fit import link_of
from pangu.calibration.samples import Sample
from simulator.api import Hardware

# Bytes. Long enough that a burst, which a slow link lets pass at once, is a small part.
QUICK_SIZES = [2**12, 2**20, 2**22]


def measure(
    config: Config, process: ProcessEnvironment, threads: int, sizes: Sequence[int]
) -> list[Sample] | None:
    """Collectives of `sizes` bytes among one rank of every node, as many at once as a node has
    ranks: what each gets of a card that they share. On rank 0; None on the others."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    backend = backends.select(config.backend.name, process.local_rank)
    process.export(os.environ)
    dist.init_process_group(backend.collective_library)
    rank, local = process.rank, process.local_world_size
    places = range(local)
    groups = [dist.new_group(list(range(place, process.world_size, local))) for place in places]
    every = [(kind, size) for kind in messages.KINDS for size in sizes]
    samples = []
    for kind, size in tqdm(every, "between nodes", disable=rank > 0, file=sys.stderr):
        samples.append(messages.measure(kind, size, groups[rank % local]))
    dist.barrier()
    dist.destroy_process_group()
    return samples if rank == 0 else None


def joined(machine: Hardware, samples: list[Sample], ranks: int) -> Hardware:
    """A machine of nodes of `ranks` devices: its own links inside one, and the measured one in
    place of what it had between nodes."""
    link, _ = link_of("between nodes", samples)
    own = machine.links[:-1] or machine.links
    inside = [replace(each, devices=min(each.devices or ranks, ranks)) for each in own]
    links = [*inside, link] if ranks > 1 else [link]
    return replace(machine, devices_per_node=ranks, links=links)
