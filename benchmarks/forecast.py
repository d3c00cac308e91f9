"""Is a forecast right? Calibrate this machine, then compare runs of `pangu.train` that the
calibration has not seen with what the simulator expects of them: one process, expert parallelism
over two, a pipeline of two; the quick-start model on random tokens. It calibrates with as many
processes as the run has: two that are busy at once slow each other down.

Only meaningful with two idle cores: prints the machine's load beside the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.compose import load
from simulator.predict import Forecast, predict

RUNS = {
    "one process": ["launch.processes=1"],
    "expert parallel 2": ["launch.processes=2", "parallel.expert_model_parallel_size=2"],
    "pipeline of 2": ["launch.processes=2", "parallel.pipeline_model_parallel_size=2"],
}
COMMON = [
    "model=moge_tiny",
    "data=synthetic",
    "backend=cpu",
    "backend.threads=1",
    "optimizer.warmup_steps=0",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.seq_length=256",
    "train.steps=20",
    "train.validate_every=0",
    "checkpoint.save_at_end=false",
]
WARM_UP = 4


def measure(overrides: list[str], folder: str) -> tuple[float, float]:
    """Median seconds of a step and GiB of a real run."""
    run = Path(folder) / "run"
    command = [sys.executable, "-m", "pangu.train", *overrides, f"run_dir={run}"]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_seconds" in row][WARM_UP:]
    seconds = statistics.median(row["step_seconds"] for row in steps)
    return seconds, max(row["memory_gib"] for row in steps)


def line(name: str, expected: Forecast, seconds: float, memory: float) -> str:
    """A row of the table."""
    time_error = expected.step_seconds / seconds - 1
    memory_error = expected.peak_memory_gib / memory - 1
    return (
        f"{name:20}{seconds:9.3f}{expected.step_seconds:10.3f}{time_error:+9.1%}"
        f"{memory:11.3f}{expected.peak_memory_gib:10.3f}{memory_error:+9.1%}"
    )


def main() -> None:
    """Print measured and forecast of the three runs."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            preset = Path(folder) / f"{processes}.yaml"
            command = [sys.executable, "-m", "pangu.calibrate", "--out", str(preset)]
            command += ["--processes", str(processes), "backend=cpu", "backend.threads=1"]
            subprocess.run(command, check=True)
        print(f"{'':20}{'step s':>9}{'forecast':>10}{'':9}{'GiB':>11}{'forecast':>10}")
        for name, layout in RUNS.items():
            preset = Path(folder) / f"{layout[0].removeprefix('launch.processes=')}.yaml"
            expected = predict(load([*COMMON, *layout, f"hardware={preset}"]))
            with tempfile.TemporaryDirectory() as place:
                seconds, memory = measure([*COMMON, *layout], place)
            print(line(name, expected, seconds, memory), flush=True)
    print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
