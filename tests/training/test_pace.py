"""Ranks that hold up the others are named."""

import os
import signal
import threading
from pathlib import Path

import pytest
from test_resilience import finish, losses, start, wait_for

from pangu.training.pace import slow_ranks


def test_a_rank_is_compared_with_others_that_do_the_same():
    said = slow_ranks([0.1, 0.1, 0.2, 0.1, 0.9], [0, 0, 0, 0, 4])
    assert said == (
        "slow in the last 20 steps, in work of their own per step: rank 2 0.20 s (others 0.10 s)"
    )
    assert slow_ranks([0.1, 0.14, 0.1], [0, 0, 0]) == ""
    assert slow_ranks([0.001, 0.004], [0, 0]) == "", "nobody notices 3 ms"


@pytest.mark.end_to_end
def test_a_slow_rank_of_a_run_is_named(tmp_path):
    """Rank 1 is held for a quarter of a second, two or three times a second."""
    process = start(tmp_path, "train.steps=41", "launch.processes=2")
    wait_for(process, lambda: len(losses(tmp_path)) >= 1)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    _, second = map(int, Path(children).read_text().split())
    over = threading.Event()

    def hold() -> None:
        while not over.wait(0.05):
            os.kill(second, signal.SIGSTOP)
            over.wait(0.3)
            os.kill(second, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    wait_for(process, lambda: len(losses(tmp_path)) >= 40)
    over.set()
    thread.join()
    code, output = finish(process)
    assert code == 0, output
    assert "in work of their own per step: rank 1 " in output
