"""Eight of the damages of `python -m tests.drills.damages`, one of each kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = (
    "__0_0.distcp: a bit",
    "manifest.json: a pipe",
    "config.yaml: no permission",
    ".metadata, sealed: cut short",
    "manifest: an optimizer's step beyond all",
    "beside: a copy named step_00000009",
    "set_aside: no permission, one kept",
    "metrics: without a step",
)


@pytest.mark.end_to_end
def test_a_damaged_run_goes_on_from_what_is_sound_and_says_so():
    command = [sys.executable, "-m", "tests.drills.damages", *SHORT]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "8 damages, 0 wrong: 6 from 4, 2 from 6"
