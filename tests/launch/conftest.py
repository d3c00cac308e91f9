"""An msrun in an environment of its own."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINDSPORE = "mindspore==2.10.0"


@pytest.fixture(scope="session")
def msrun() -> Path:
    """msrun in an environment of its own, kept in .cache for the next time."""
    folder = ROOT / ".cache" / MINDSPORE.replace("==", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
            pip = [folder / "venv/bin/python", "-m", "pip", "install", "-q", MINDSPORE]
            installed = subprocess.run(pip, capture_output=True, text=True)
            if installed.returncode:
                pytest.skip(f"{MINDSPORE} cannot be installed: {installed.stderr.splitlines()[-1]}")
            (folder / "installed").touch()
    return folder / "venv/bin/msrun"
