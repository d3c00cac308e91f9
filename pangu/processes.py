"""What the processes of a run owe each other: to end with it, and to say whose fault an end is."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from pangu.plain_file import open_plain

# The number of the process that started this one, where `multiprocessing` does not know.
PARENT = "PANGU_PARENT"
# The exit code of a rank that waited in vain for another one: not itself the reason.
PEER_LOST = 4
_TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last row


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone (Linux only), so that
    a killed run leaves no process behind that still writes into its folder, or holds memory."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # Too late for a parent that has gone already.
    forked_by = multiprocessing.parent_process()
    parent = forked_by.pid if forked_by else int(os.environ.get(PARENT, os.getppid()))
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def last_step(run_dir: Path) -> int:
    """The last step in a run's `metrics.jsonl`, from its end alone; 0 without one."""
    try:
        with open_plain(run_dir / "metrics.jsonl") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    steps = [0]
    for line in lines:
        try:
            steps.append(int(json.loads(line)["step"]))
        except (
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ):  # cut short, foreign
            continue
    return max(steps)
