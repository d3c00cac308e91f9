"""A collective that fails names itself, who came to it, and where the others are."""

import os
import re
import signal
import time
from datetime import timedelta

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from configs.compose import load
from launch.port import free_port
from pangu.backends import shared_memory, whereabouts
from pangu.backends.whereabouts import Whereabouts

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not shared_memory.register(), reason="needs Linux's memfd and /proc"),
]


def meet(rank, port, results):
    """Ranks 0 and 1 of five wait for the others, in step 7; what they hear."""
    from pangu import backends
    from pangu.training.resilience import missing_ranks

    backends.select("cpu")
    dist.init_process_group(
        shared_memory.NAME,
        rank=rank,
        world_size=5,
        store=dist.TCPStore("127.0.0.1", port, 5, is_master=rank == 0),
        timeout=timedelta(seconds=15),
    )
    answers = whereabouts.Answers(dist.distributed_c10d._get_default_store(), rank)
    group = dist.new_group(range(5), timedelta(seconds=10), group_desc="EXPERTS")
    x = torch.ones(5)
    dist.all_reduce(x, group=group)
    dist.all_reduce(x)
    whereabouts.here.step = 7
    if rank == 2:
        time.sleep(60)
    if rank == 3:
        dist.all_gather_single(torch.empty(25), x)
    if rank == 4:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        dist.all_to_all_single(torch.empty(5), x, group=group)
    except dist.DistError:
        results.put(missing_ranks())
    answers.stop()


def test_who_came_to_a_collective_and_where_the_others_are():
    """Rank 2 computes, rank 3 waits in another one, rank 4 is stopped."""
    context = mp.get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [context.Process(target=meet, args=(rank, port, results)) for rank in range(5)]
    for process in processes:
        process.start()
    for process in processes[:2]:
        process.join(120)
    for process in processes[2:]:
        process.kill()
    said = sorted([results.get(timeout=5), results.get(timeout=5)])
    assert said[0] == "", "said once"
    first, *others = said[1].splitlines()
    collective = "all_to_all_single number 2 of EXPERTS (ranks 0, 1, 2, 3, 4)"
    assert first == f"It failed in step 7, in {collective}. Came to it: ranks 0, 1."
    where = [
        "rank 2, in step 7, for [0-9]+ s computing, after allreduce number 1 of .*",
        "rank 3, in step 7, for [0-9]+ s in all_gather_single number 2 of .*",
        "rank 4. It does not answer: stopped, cut off or gone.",
    ]
    for line, pattern in zip(others, where, strict=True):
        assert re.fullmatch(f"Did not come: {pattern}", line)


def timeouts():
    from pangu.engines.megatron import process_groups

    process_groups.initialize(load(["backend=cpu", "launch.processes=2", *LAYOUT]))
    groups = dist.distributed_c10d._world.pg_map.keys() - {dist.group.WORLD}
    return {group.group_desc: group._timeout for group in groups}


LAYOUT = ["launch.timeout_minutes=0.25", "parallel.expert_model_parallel_size=2"]


def test_every_group_has_the_timeout_of_the_configuration():
    found = gloo.run(2, timeouts)[0]
    assert "EXPERT_MODEL_PARALLEL_GROUP" in found
    assert set(found.values()) == {15.0}


def test_other_groups_that_are_silent_are_named_too():
    at = {"group": "pair", "operation": "allreduce", "number": 3, "inside": True, "step": 5}
    own = Whereabouts(ranks=(0, 1), **at)
    behind = Whereabouts(ranks=(0, 1), **at | {"number": 2, "since": 12.3})
    told = [Whereabouts.heard(there.told()) for there in (own, behind)]
    assert told[0].key == own.key
    said = whereabouts.describe(own, 4, {0: own, 1: behind, 3: Whereabouts()})
    assert said.splitlines() == [
        "It failed in step 5, in allreduce number 3 of pair (ranks 0, 1). Came to it: rank 0.",
        "Did not come: rank 1, in step 5, for 12 s in allreduce number 2 of pair (ranks 0, 1).",
        "In other groups these do not answer: rank 2.",
    ]
