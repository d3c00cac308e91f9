"""Collectives through shared memory: right results, ranks that end or hang."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pangu import backends
from pangu.backends import shared_memory

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not shared_memory.register(), reason="needs Linux's memfd and /proc"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
# One element, fewer than ranks, some, and more than fit into a slot, by far and by a little.
SIZES = (1, 2, 1001, shared_memory.SLOT // 4 + 1, shared_memory.SLOT)


def values(rank, size, dtype):
    """Whole numbers, so that sums are exact in any order and precision."""
    generator = torch.Generator().manual_seed(100 * size + rank)
    return torch.randint(-8, 9, (size,), generator=generator).to(dtype)


def reductions(group, dtype, size):
    rank, ranks = group.rank(), group.size()
    everyone = torch.stack([values(r, size, dtype) for r in range(ranks)])
    for op, expected in (
        (dist.ReduceOp.SUM, everyone.sum(0).to(dtype)),
        (dist.ReduceOp.MAX, everyone.amax(0)),
        (dist.ReduceOp.MIN, everyone.amin(0)),
    ):
        for asynchronous in (False, True):
            own = values(rank, size, dtype)
            work = dist.all_reduce(own, op, group, async_op=asynchronous)
            if asynchronous:
                work.wait()
            assert torch.equal(own, expected)
    if group.links:  # gloo itself sums something else
        strided = torch.zeros(size, 2, dtype=dtype)
        strided[:, 1] = values(rank, size, dtype)
        dist.all_reduce(strided[:, 1], group=group)
        assert torch.equal(strided[:, 1], everyone.sum(0).to(dtype))
        assert not strided[:, 0].any()
    tensors = [values(rank, size, dtype), torch.ones(3, dtype=dtype)]
    with dist._coalescing_manager(group):
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    assert torch.equal(tensors[0], everyone.sum(0).to(dtype))
    assert tensors[1].tolist() == [ranks] * 3
    whole = torch.cat([values(rank + 10 * r, size, dtype) for r in range(ranks)])
    part = torch.empty(size, dtype=dtype)
    dist.reduce_scatter_single(part, whole, group=group)
    expected = sum(values(r + 10 * rank, size, dtype) for r in range(ranks))
    assert torch.equal(part, expected)


def movements(group, dtype, size):
    rank, ranks = group.rank(), group.size()
    gathered = torch.empty(ranks * size, dtype=dtype)
    dist.all_gather_single(gathered, values(rank, size, dtype), group=group)
    assert torch.equal(gathered, torch.cat([values(r, size, dtype) for r in range(ranks)]))
    rows = torch.empty(ranks, 2, dtype=dtype)
    columns = values(rank, 2 * ranks, dtype).view(2, ranks).t()
    columns = columns if group.links else columns.contiguous()  # gloo itself refuses others
    dist.all_to_all_single(rows, columns, group=group)
    expected = [values(r, 2 * ranks, dtype).view(2, ranks).t()[rank] for r in range(ranks)]
    assert torch.equal(rows, torch.stack(expected))
    own, kept = [size if r == rank else 0 for r in range(ranks)], torch.empty(size, dtype=dtype)
    dist.all_to_all_single(kept, values(rank, size, dtype), own, own, group)
    assert torch.equal(kept, values(rank, size, dtype))
    # Rank r sends rank q nothing, or rows whose number depends on both.
    count = [[(r + 2 * q) % 3 * size // 2 for q in range(ranks)] for r in range(ranks)]
    sent = [values(rank + 10 * q, 2 * count[rank][q], dtype) for q in range(ranks)]
    taken = [count[r][rank] for r in range(ranks)]
    output = torch.empty(sum(taken), 2, dtype=dtype)
    dist.all_to_all_single(output, torch.cat(sent).view(-1, 2), taken, count[rank], group)
    expected = [values(r + 10 * rank, 2 * count[r][rank], dtype) for r in range(ranks)]
    assert torch.equal(output.flatten(), torch.cat(expected))


def every_collective():
    groups = [dist.group.WORLD]
    pair = dist.new_group([0, dist.get_world_size() - 1])
    if pair is not dist.GroupMember.NON_GROUP_MEMBER:
        groups.append(pair)
    for group in groups:
        assert isinstance(group, shared_memory.SharedMemoryGroup)
        for dtype in DTYPES:
            for size in SIZES if dtype is torch.float32 else SIZES[:3]:
                reductions(group, dtype, size)
                movements(group, dtype, size)
        assert set(group.links) == set(range(group.size())) - {group.rank()}
    dist.barrier()
    return True


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_collective_gives_what_its_definition_says(ranks):
    assert gloo.run(ranks, every_collective) == [True] * ranks


def sums_of_rounding_numbers():
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(dist.get_rank()))
    small, scattered = x[:5].clone(), torch.empty(100_000)
    dist.reduce_scatter_single(scattered, x)
    dist.all_reduce(x)
    dist.all_reduce(small)
    return x, small, scattered


def test_all_ranks_get_the_same_bits_in_the_order_of_ranks():
    parts = [
        torch.randn(300_000, generator=torch.Generator().manual_seed(rank)) for rank in range(3)
    ]
    expected = parts[0] + parts[1] + parts[2]
    assert not torch.equal(expected, parts[2] + parts[1] + parts[0])  # the order does matter
    for rank, (x, small, scattered) in enumerate(gloo.run(3, sums_of_rounding_numbers)):
        assert torch.equal(x, expected)
        assert torch.equal(small, expected[:5])
        assert torch.equal(scattered, expected.chunk(3)[rank])


def ranks_on_two_hosts():
    host = shared_memory._host()
    shared_memory._host = lambda: f"{host}{dist.get_rank() // 2}"
    reductions(dist.group.WORLD, torch.float32, 1001)
    movements(dist.group.WORLD, torch.float32, 1001)
    return dist.group.WORLD.links


def test_ranks_on_two_hosts_use_gloo():
    assert gloo.run(3, ranks_on_two_hosts) == [None] * 3


def meet(rank, store, results, end):
    """Rank 0 waits in a collective for rank 1, which `end`s; what rank 0 hears."""
    backends.select("cpu")
    dist.init_process_group(
        shared_memory.NAME,
        rank=rank,
        world_size=2,
        store=dist.FileStore(store, 2),
        timeout=timedelta(seconds=3),
    )
    x = torch.ones(4)
    dist.all_reduce(x)
    if rank == 1:
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    try:
        dist.all_reduce(x)
        dist.all_reduce(x)
    except dist.DistError as error:
        results.put(str(error))


@pytest.mark.parametrize(
    ("end", "message"),
    [("killed", "rank 1 is gone"), ("hangs", "waited 3 s")],
)
def test_a_rank_that_ends_or_hangs_is_noticed(tmp_path: Path, end, message):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=meet, args=(rank, str(tmp_path / "store"), results, end))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    processes[0].join(60)
    assert processes[0].exitcode == 0
    processes[1].kill()
    assert message in results.get()
