"""What this rank's collectives send to every other rank, seen from outside: for tests."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

GATHERS = ("all_gather_into_tensor", "reduce_scatter_tensor")


class Traffic:
    """`calls`: of each collective its kind, the ranks of its group, and how many elements went to
    each rank of the world (its own is 0), `[world]`. Sums that a reduce-scatter makes on its way
    count as if they were made where they are wanted. `dtypes` of everything that was sent."""

    def __init__(self):
        self.calls = []
        self.dtypes = set()

    def add(self, kind, group, dtype, elements):
        ranks = dist.get_process_group_ranks(group)
        sent = torch.zeros(dist.get_world_size(), dtype=torch.long)
        sent[ranks] = torch.as_tensor(elements, dtype=torch.long)
        sent[dist.get_rank()] = 0
        self.dtypes.add(dtype)
        if dtype.is_floating_point:  # others are the numbers of rows to come
            self.calls.append((kind, tuple(ranks), sent))

    def sent(self):
        """Elements to each rank, `[world]`."""
        zero = torch.zeros(dist.get_world_size(), dtype=torch.long)
        return sum((sent for _, _, sent in self.calls), zero)


@contextmanager
def watch():
    """The `Traffic` of what runs inside."""
    traffic = Traffic()
    exchange = dist.all_to_all_single
    gather, scatter = (getattr(dist, name) for name in GATHERS)

    def all_to_all(output, input, output_split_sizes, input_split_sizes, group, **options):
        splits = input_split_sizes or [input.size(0) // group.size()] * group.size()
        width = input[0].numel() if input.numel() else 0
        traffic.add("all_to_all", group, input.dtype, [rows * width for rows in splits])
        return exchange(output, input, output_split_sizes, input_split_sizes, group, **options)

    def all_gather(output, input, group, **options):
        traffic.add("all_gather", group, input.dtype, input.numel())
        return gather(output, input, group=group, **options)

    def reduce_scatter(output, input, group, **options):
        traffic.add("reduce_scatter", group, input.dtype, output.numel())
        return scatter(output, input, group=group, **options)

    replaced = dict(zip(GATHERS, (all_gather, reduce_scatter), strict=True))
    with patch.multiple(dist, all_to_all_single=all_to_all, **replaced):
        yield traffic
