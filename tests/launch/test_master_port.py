"""A rendezvous port that is taken: a sentence with another one, exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def train(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = ["data=synthetic", "backend=cpu", "train.steps=1", f"run_dir={folder}"]
    return subprocess.run(
        [sys.executable, "-m", "pangu.train", *arguments, "launch.processes=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess[str], taken: int) -> None:
    said = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2, done.stderr
    assert f"MASTER_PORT {taken} is in use on this machine" in said
    assert "Traceback" not in done.stderr


@pytest.mark.end_to_end
def test_set_by_the_user_for_processes_started_here(tmp_path, taken):
    done = train(tmp_path, MASTER_PORT=str(taken))
    refused(done, taken)
    assert "unset it" in done.stderr
    assert not list(tmp_path.glob("logs/*")), "before any process starts"
    assert train(tmp_path, MASTER_PORT="a").returncode == 2


@pytest.mark.end_to_end
def test_found_by_rank_0_of_a_launcher(tmp_path, taken):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    refused(train(tmp_path, **ranks, MASTER_PORT=str(taken)), taken)


def test_by_the_scripts_before_they_launch(taken):
    script = ROOT / "launch/torchrun.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"MASTER_PORT": str(taken), "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(script)], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"MASTER_PORT={taken}: port {taken} is in use on this machine")
    assert done.stderr.count("\n") == 1
    assert port.main([str(port.free_port())]) == 0
    assert port.main([str(port.free_port()), str(taken)]) == 2
    assert port.main(["70000"]) == 2
