"""What the processes of a run owe each other: to end with it, and to say whose fault an end is."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

# The number of the process that started this one, where `multiprocessing` does not know.
PARENT = "PANGU_PARENT"
# The exit code of a rank that waited in vain for another one: not itself the reason.
PEER_LOST = 4


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
