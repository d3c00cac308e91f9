"""The trainer itself under each launcher, and sweeps of it: as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.port import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.end_to_end]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "data=synthetic",
    "train.steps=3",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.seq_length=32",
    "train.validate_every=3",
    "train.validation_batches=1",
    "optimizer.warmup_steps=0",
]


def environ(**more: str) -> dict[str, str]:
    """A user's shell with the trainer's environment activated."""
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, Any, Any, Any]]:
    """What must not depend on the launcher, to the last bit."""
    return [
        (row["step"], row.get("loss"), row.get("grad_norm"), row.get("validation_loss"))
        for row in records(run_dir)
    ]


def test_same_metrics_from_every_launcher(tmp_path: Path, msrun: Path) -> None:
    arguments = ["experiment=quickstart", *SMALL]
    commands = {
        "alone": [sys.executable, "-m", "pangu.train"],
        "torchrun": [str(ROOT / "launch/torchrun.sh")],
        "msrun": [str(ROOT / "launch/msrun.sh")],
    }
    for name, command in commands.items():
        variables = {
            "PROCESSES": "2",
            "MASTER_PORT": str(free_port()),
            "MSRUN": str(msrun),
            "LOG_DIR": str(tmp_path / "logs"),
        }
        subprocess.run(
            [*command, *arguments, f"run_dir={tmp_path / name}"],
            env=environ(**variables),
            check=True,
            timeout=300,
        )
    assert [row[0] for row in losses(tmp_path / "alone")] == [1, 2, 3, 3]
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "alone")
    assert losses(tmp_path / "msrun") == losses(tmp_path / "alone")


def sweep(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pangu.train", "-m", *arguments, *SMALL, f"run_dir={tmp_path}"],
        env=environ(COLUMNS="160"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# Weights that a rate of 1e38 has thrown away are no reason to refuse a configuration.
JOBS = ("optimizer.lr=1e38,1e-3", "seed=1,2", "train.validate_every=0")


def test_sweep_survives_a_failing_job_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A job that diverges fails; SIGTERM interrupts another."""
    first = sweep(tmp_path, *JOBS)
    stopped = tmp_path / "optimizer.lr=1e-3,seed=2"
    deadline = time.monotonic() + 240
    while not (stopped / "config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM, output
    done = tmp_path / "optimizer.lr=1e-3,seed=1"
    assert (done / "sweep_job.json").exists()
    assert not (stopped / "sweep_job.json").exists()
    finished = (done / "metrics.jsonl").stat().st_mtime_ns

    again = sweep(tmp_path, *JOBS)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 1
    states = [
        line.split("│")[2].strip()
        for line in output.splitlines()
        if line.startswith("│ optimizer.lr=")
    ]
    assert states == ["failed (3)", "failed (3)", "skipped", "finished"]
    assert (done / "metrics.jsonl").stat().st_mtime_ns == finished
    assert [row["step"] for row in records(stopped)][-1] == 3
