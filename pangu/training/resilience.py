"""What a run does when it is told to stop, or when its numbers stop being numbers."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from pangu import backends


class Diverged(Exception):
    """The run cannot go on by itself (exit code 3); the message is one sentence."""


class StopSignal:
    """SIGTERM and SIGINT become a request that all ranks follow after the same step, validation
    batch or generated token."""

    def __init__(self, *, speaks: bool = True) -> None:
        self.requested = False
        self._speaks = speaks
        self._agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        # A second signal changes nothing: launchers often send one each, to every process.
        if self._speaks and not self.requested:
            # Heard at once, also where a save is waited for. Not through sys.stderr: the main
            # thread may be inside one of its calls.
            line = f"{signal.Signals(number).name}: stopping when what is under way is done\n"
            os.write(2, ("\n" * os.isatty(2) + line).encode())  # not behind the progress bar
        self.requested = True

    def agreed(self) -> bool:
        """Whether any rank has been told to stop; once it was so, it stays so. Collective."""
        if not self._agreed:
            flag = torch.tensor([float(self.requested)], device=backends.current().device)
            dist.all_reduce(flag)
            self._agreed = flag.item() > 0
        return self._agreed


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
        return self.in_a_row >= max(1, self.limit)


def is_failed_collective(error: RuntimeError) -> bool:
    """Whether an error came out of the collective library: a timeout, or a peer that is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def missing_ranks(grace_seconds: float = 5.0) -> str:
    """After a collective has failed or run into its timeout: who was not waiting in it.

    Every rank that fails says so in the rendezvous store; the first to do so looks who has not
    after some seconds. Returns a sentence, empty on the other ranks.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=grace_seconds))
    try:
        store.set(f"failed/{rank}", "")
        if store.add("failed", 1) > 1:
            return ""
        time.sleep(grace_seconds)
        silent = [str(other) for other in range(size) if not store.check([f"failed/{other}"])]
    except RuntimeError:
        return "The rendezvous store does not answer: rank 0 hangs or is gone."
    if not silent:
        return "All ranks report a failed collective: none hangs elsewhere."
    return (
        f"A collective failed; of {size} ranks these did not come to it or are gone: "
        f"{', '.join(silent)}."
    )
