"""The heap of a CPU process: one for all threads."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import ctypes, threading
from pangu.backends.cpu import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=libc.malloc, args=(1_000_000,)) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_threads_share_one_heap() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("<heap nr=") == 1
