"""The drill of `tests/drills/kills.py` with three of its thirty kills: a launcher, each rank."""

import os
import signal
import subprocess
import sys

import pytest
from drills.kills import KILLS, MODEL, Drill, Kill, drill, losses, wait_for

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
SHORT = (
    Kill("launcher", signal.SIGKILL, "step"),
    Kill("rank 0", signal.SIGKILL, "validation"),
    Kill("rank 1", signal.SIGKILL, "save"),
)


@pytest.mark.end_to_end
def test_kills_are_said_leave_nothing_running_and_lose_nothing(tmp_path):
    assert len(KILLS) == 30
    assert set(SHORT) < set(KILLS)
    said: list[str] = []
    assert drill(SHORT, tmp_path, said.append) == [], "\n".join(said)
    assert len(said) == 4


@pytest.mark.end_to_end
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    here = Drill(tmp_path)
    first = here.start(here.run_dir)
    try:
        wait_for(first, lambda: len(losses(here.run_dir)) >= 2)
        log = here.run_dir / "logs" / "rank_1.log"
        size = log.stat().st_size
        command = [sys.executable, "-m", "pangu.train", *MODEL, f"run_dir={here.run_dir}"]
        for environ in (
            {},
            # by a launcher
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | RENDEZVOUS,
        ):
            alone = ["launch.processes=1"] if environ else []
            second = subprocess.run(
                [*command, *alone], env=os.environ | environ, capture_output=True, text=True
            )
            assert second.returncode == 2, second.stderr
            said = " ".join(second.stderr.replace("│", " ").split())
            assert f"is in use by process {first.pid} on" in said
        assert log.stat().st_size >= size, "not even the other's logs are touched"
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 0
    assert sorted(losses(here.run_dir)) == list(range(1, here.saved()[-1] + 1))
