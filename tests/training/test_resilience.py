"""Stopped, killed, out of disk, out of numbers: through the command that users run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_runs import MODEL

from pangu.checkpoint import manifest
from pangu.report.run_files import METRICS, read_metrics

PATIENCE = 180  # seconds, on a machine that does other things too


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pangu.train", *MODEL, "model.num_layers=2"]
    return subprocess.Popen(
        [*command, f"run_dir={run_dir}", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def train(run_dir: Path, *overrides: str) -> tuple[int, str]:
    return finish(start(run_dir, *overrides))


def wait_for(process: subprocess.Popen[str], condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / METRICS) if "loss" in row}


def saved(run_dir: Path) -> list[int]:
    return [manifest.step_of(folder) for folder in manifest.complete(run_dir / "checkpoints")]


@pytest.mark.end_to_end
def test_a_stop_signal_saves_on_all_ranks_and_a_kill_costs_no_finished_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    endless = ["train.steps=100000", "checkpoint.keep_last=3"]
    process = start(run_dir, *endless, "launch.processes=2")
    wait_for(process, lambda: len(losses(run_dir)) >= 3)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    stopped = max(losses(run_dir))
    assert saved(run_dir) == [stopped]
    assert f"told to stop after step {stopped}" in output

    process = start(run_dir, *endless, "checkpoint.save_every=1", "launch.processes=1")
    partial = run_dir / "checkpoints"
    wait_for(process, lambda: len(saved(run_dir)) >= 2 and list(partial.glob(".*.partial")))
    process.kill()
    process.communicate()
    newest, reached = saved(run_dir)[0], max(losses(run_dir))
    assert newest > stopped

    # Ctrl-C this time, with one process.
    process = start(run_dir, *endless)
    wait_for(process, lambda: max(losses(run_dir), default=0) > reached)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 0, output
    assert f"resuming from {run_dir}/checkpoints/step_{newest:08d}" in output
    assert sorted(losses(run_dir)) == list(range(1, saved(run_dir)[0] + 1)), "each step once"
    assert not list(partial.glob(".*.partial"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 3 MB; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.end_to_end
def test_a_full_disk_costs_neither_the_run_nor_the_last_good_checkpoint(small_disk):
    run_dir = small_disk / "run"
    overrides = ["checkpoint.save_every=2", "checkpoint.keep_last=4", "launch.processes=2"]
    code, output = train(run_dir, "train.steps=10", *overrides)
    assert code == 1, "it went on to its end, but that is not on disk"
    assert sorted(losses(run_dir)) == list(range(1, 11))
    kept = saved(run_dir)
    assert 0 < len(kept) < 5, "some fitted, not all"
    assert kept == sorted(range(2, 2 * len(kept) + 1, 2), reverse=True)
    failed = {
        row["step"]: row["checkpoint_error"]
        for row in read_metrics(run_dir / METRICS)
        if "checkpoint_error" in row
    }
    assert sorted(failed) == [step for step in (2, 4, 6, 8, 10) if step not in kept]
    assert all("No space left on device" in reason for reason in failed.values())
    assert f"the checkpoint of step {max(failed)} could not be saved" in output
    assert f"steps {kept[0] + 1} to 10 are in no other: the last one is of step {kept[0]}" in output
    assert not list((run_dir / "checkpoints").glob(".*.partial"))

    enlarge = ["mount", "-o", "remount,size=64m", str(small_disk)]
    subprocess.run(enlarge, check=True)
    before = losses(run_dir)
    code, output = train(run_dir, "train.steps=11", *overrides)
    assert code == 0, output
    assert f"step_{kept[0]:08d}" in output
    after = losses(run_dir)
    assert {step: after[step] for step in before} == before, "the last good one was whole"
    assert saved(run_dir)[0] == 11

    code, output = train(run_dir, "train.steps=7", *overrides)
    assert code == 0, output
    assert "nothing to train: train.steps=7, and the checkpoint is of step 11" in output


EXPLODING = (
    "optimizer.phases=["
    "{name: calm, steps: 4, lr: 1e-3, min_lr: 1e-3, schedule: constant},"
    "{name: mad, steps: 100, lr: 1e38, min_lr: 1e38, schedule: constant}]"
)


@pytest.mark.end_to_end
def test_a_run_that_diverges_goes_back_a_bounded_number_of_times_and_exits_with_3(tmp_path):
    code, output = train(
        tmp_path,
        "train.steps=50",
        "checkpoint.save_every=2",
        "train.max_skipped_steps=3",
        "train.max_rollbacks=2",
        EXPLODING,
    )
    assert code == 3, output
    assert output.count("rolling back to step 4") == 1
    assert output.count("rolling back to step 2") == 1, "the second time to the one before it"
    assert "the run has diverged: 3 steps in a row up to" in output
    assert "Traceback" not in output
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows if "rolled_back_from" in row] == [2], "rows after it went"
    skipped = [row for row in rows if "skipped_steps" in row]
    assert [row["skipped_steps"] for row in skipped] == [7, 8, 9]
    assert all(row["loss"] is None or row["grad_norm"] is None for row in skipped)
    assert max(saved(tmp_path)) <= 4, "nothing is saved among skipped steps"


@pytest.mark.end_to_end
def test_a_rank_that_hangs_is_named(tmp_path):
    process = start(
        tmp_path, "train.steps=100000", "launch.processes=2", "launch.timeout_minutes=0.5"
    )
    wait_for(process, lambda: len(losses(tmp_path)) >= 2)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    _, second = Path(children).read_text().split()
    # Ranks started here on a CPU have a heap that stays whole: see pangu.train.
    assert (
        b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0\0"
        in Path(f"/proc/{second}/environ").read_bytes()
    )
    os.kill(int(second), signal.SIGSTOP)
    code, output = finish(process)
    assert code == 4
    assert "Traceback" not in output
    assert f"rank 0 waited in vain for another after step {max(losses(tmp_path))}: " in output
    assert "Traceback" in (tmp_path / "logs" / "rank_0.traceback").read_text()
    done = max(losses(tmp_path))  # which its last collectives are still of
    assert any(f"It failed in step {step}, in " in output for step in (done, done + 1))
    assert "Did not come: rank 1. It does not answer: stopped, cut off or gone." in output
