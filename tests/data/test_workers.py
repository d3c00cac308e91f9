"""Processes that read batches ahead: they end with the run, and not before it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

READ = """
import signal, sys, time
from configs.compose import load
from pangu.data.datasets import batches, build_datasets
signal.signal(signal.SIGTERM, lambda *_: None)  # as a run, which saves first
config = load(["data=synthetic", "data.num_workers=2", "backend=cpu"])
data = build_datasets(config, train_samples=1000, validation_samples=0, seq_length=512)
rows = batches(data.train, config, data_parallel_rank=0, data_parallel_size=1,
               consumed_sequences=0, micro_batch_size=2)
next(rows), next(rows)  # one of each worker
print("reading", flush=True)
for _ in sys.stdin:
    for _ in range(20):
        next(rows)
    print("read", flush=True)
raise RuntimeError("the run fails")
"""


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def reading():
    """A process with two workers, which reads more when it is written a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    workers = children(process.pid)
    yield process, workers
    for pid in (process.pid, *workers):
        if runs(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.end_to_end
def test_workers_outlive_a_signal_to_all_but_not_their_run(reading):
    process, workers = reading
    assert len(workers) >= 2
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            os.kill(worker, number)
    os.kill(process.pid, signal.SIGTERM)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "read\n", "the batches that a last validation needs"
    assert children(process.pid) == workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 3  # torch's own look after five seconds, where they do not wait
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker of a killed run lives on"
        time.sleep(0.05)


@pytest.mark.end_to_end
def test_a_run_that_fails_is_not_kept_by_its_workers(reading):
    process, workers = reading
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    assert not any(map(runs, workers))
