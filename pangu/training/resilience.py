"""What a run does when it is told to stop, or when its numbers stop being numbers."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from pangu import backends


class Diverged(Exception):
    """The run cannot go on by itself (exit code 3); the message is one sentence."""


class StopSignal:
    """SIGTERM and SIGINT become a request that all ranks follow after the same step."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        # A second signal changes nothing: launchers often send one each, to every process.
        self.requested = True

    def agreed(self) -> bool:
        """Whether any rank has been told to stop. Collective."""
        flag = torch.tensor([float(self.requested)], device=backends.current().device)
        dist.all_reduce(flag)
        return flag.item() > 0


class SkippedSteps:
    """Counts non-finite steps in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def count(self, skipped: bool) -> None:
        """Take note of a step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def too_many(self) -> bool:
        """Whether the weights must be given up for those of the last checkpoint."""
        return self.in_a_row >= self.limit
