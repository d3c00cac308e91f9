"""What the ranks of a run agree on and say, whatever the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from tqdm import tqdm

T = TypeVar("T")


def from_rank_0(make: Callable[[], T]) -> T:
    """`make()` of rank 0, on every rank; an exception there is raised on every rank."""
    box: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:  # passed on: the others wait for an answer
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[1], Exception):
        raise box[1]
    return box[0]  # type: ignore[return-value]


def say(line: str) -> None:
    """A line of the run's log, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)
