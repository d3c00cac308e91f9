"""A run without room, and then with it: two sizes of `python -m tests.drills.full_disk`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.end_to_end
def test_a_run_without_room_says_so_and_goes_on_when_there_is_some():
    command = [sys.executable, "-m", "tests.drills.full_disk", "0", "600"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("4 runs without room, 0 wrong")
