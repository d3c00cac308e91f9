"""What a run does when it is told to stop, or when its numbers stop being numbers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from launch.environment import report_refusal
from pangu.backends import whereabouts
from pangu.backends.copies import scalar


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
            self.hear(self.asked().item())
        return self._agreed

    def asked(self) -> torch.Tensor:
        """How many ranks have been told to stop, on the device, `[1]`. Collective."""
        flag = scalar(float(self.requested))
        dist.all_reduce(flag)
        return flag

    def hear(self, told: float) -> None:
        """Take note of what `asked` gave, which all ranks read at the same step."""
        self._agreed = self._agreed or told > 0

    def heard(self) -> bool:
        """Whether all ranks know that they have been told to stop."""
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
    """After a collective has failed or run into its timeout: which one, who has come to it, and
    where the others are.

    Every rank that fails says so in the rendezvous store; the first to do so asks them all, and the
    others stay until it has heard: one of them may be the store's host.
    Returns sentences, none on the other ranks.
    """
    said = [f"{_where()}The rendezvous store does not answer: rank 0 hangs or is gone."]

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            said[:] = [_heard(grace_seconds)]

    # A store whose host is stopped keeps whoever calls it for ever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3 * grace_seconds)
    return said[0]


def _where() -> str:
    here = whereabouts.here
    return f"It failed in step {here.step}, in {here.collective}. " if here.number else ""


def _heard(grace_seconds: float) -> str:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=grace_seconds))
    if store.add("failed", 1) > 1:
        store.wait(["heard"], timedelta(seconds=2 * grace_seconds))
        return ""
    ranks = dist.get_world_size()
    found = whereabouts.ask(store, ranks, grace_seconds)
    store.set("heard", "")
    return whereabouts.describe(whereabouts.here, ranks, found)


FAILURE = "rank_*.failure"  # in the folder of logs: a traceback that ended its rank


def leave_traceback(run_dir: Path, rank: int) -> None:
    """In the handler of an exception that ends this rank: leave it for the other ranks, on other
    nodes too, and for torchrun to end its account with."""
    text = traceback.format_exc()
    report_refusal(os.environ, text)
    with contextlib.suppress(OSError):
        path = run_dir / "logs" / FAILURE.replace("*", str(rank))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def forget_traceback(run_dir: Path, rank: int) -> None:
    """That of an earlier run in this folder."""
    with contextlib.suppress(OSError):
        (run_dir / "logs" / FAILURE.replace("*", str(rank))).unlink()


def tracebacks(run_dir: Path) -> str:
    """Those with which other ranks of this run have ended."""
    found = []
    for path in sorted((run_dir / "logs").glob(FAILURE)):
        with contextlib.suppress(OSError):
            found.append(f"{path.stem.replace('_', ' ')} has failed:\n{path.read_text()}")
    return "\n".join(found)
