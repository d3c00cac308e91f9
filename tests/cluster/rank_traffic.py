"""What collectives of a known size send over a node's card, as every rank sees it: run by the tests
under torchrun. Writes `{operation: [bytes sent, start, end]}` to a file a rank.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pangu import backends

SIZE = 1 << 20  # float32 numbers that a rank gives: 4 MiB
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def main() -> None:
    backends.select("cpu")
    dist.init_process_group(backends.current().collective_library)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    per_node = ranks // 2
    inside = [dist.new_group([n * per_node + r for r in range(per_node)]) for n in range(2)]
    across = [dist.new_group([r, r + per_node]) for r in range(per_node)]
    mine, pair = inside[rank // per_node], across[rank % per_node]
    x = torch.ones(SIZE)
    operations: dict[str, Callable[[], object]] = {
        "all-reduce inside": lambda: dist.all_reduce(x, group=mine),
        "all-to-all inside": lambda: exchange(x, mine),
        "all-to-all across": lambda: exchange(x, pair),
        "all-to-all of all": lambda: exchange(x, dist.group.WORLD),
        "all-gather across": lambda: dist.all_gather_single(torch.empty(2 * SIZE), x, group=pair),
    }
    found = {name: measured(operation) for name, operation in operations.items()}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def exchange(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every rank keeps an equal share and sends each other one."""
    dist.all_to_all_single(torch.empty_like(x), x, group=group)


def measured(operation: Callable[[], object]) -> list[float]:
    """Bytes, start and end, after a first call that connects. No rank is in another operation while
    one of its node reads the counter."""
    operation()
    together()
    before = int(SENT.read_text())
    together()
    started = time.monotonic()  # one clock for all processes of a machine
    operation()
    ended = time.monotonic()
    together()
    sent = int(SENT.read_text()) - before
    together()
    return [sent, started, ended]


def together() -> None:
    """All have come here, and what they had to acknowledge is under way no more."""
    dist.barrier()
    time.sleep(0.2)
    dist.barrier()


if __name__ == "__main__":
    main()
