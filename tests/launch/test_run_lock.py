"""One run at a time in a folder: real processes, killed ones, hosts that cannot see each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from configs.violation import ConfigError
from pangu import run_lock
from pangu.run_lock import RUN, Holder, hold

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from pangu.run_lock import hold
with hold(Path(sys.argv[1])) as descriptor:
    if len(sys.argv) > 2:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
        print(child.pid)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start() -> Iterator:
    started: list[subprocess.Popen[str]] = []

    def holding(folder: Path, *more: str) -> tuple[subprocess.Popen[str], list[str]]:
        command = [sys.executable, "-c", HOLD, str(folder), *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        said: list[str] = []
        assert process.stdout is not None
        while "held" not in said:
            said.append(process.stdout.readline().strip())
            assert process.poll() is None
        return process, said

    yield holding
    for process in started:
        process.kill()
        process.communicate()


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, hold(folder):
        pass
    (violation,) = caught.value.violations
    assert (violation.key, violation.value) == ("run_dir", folder)
    return violation.reason


def test_the_other_process_is_named_until_it_is_killed(tmp_path, start, capfd):
    process, _ = start(tmp_path)
    sentence = refusal(tmp_path)
    assert f"is in use by process {process.pid} on {os.uname().nodename}, since 20" in sentence
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert capfd.readouterr().err == ""
    with hold(tmp_path):
        said = capfd.readouterr().err
        assert f"(process {process.pid} on {os.uname().nodename}" in said
        assert said.endswith("was killed, or its host went down\n")
        assert f"process {os.getpid()} " in refusal(tmp_path), "also from this very process"
    capfd.readouterr()
    with hold(tmp_path):
        assert capfd.readouterr().err == "", "left in good order"


def test_what_a_killed_run_leaves_behind_keeps_the_folder(tmp_path, start, monkeypatch):
    process, said = start(tmp_path, "with a child")
    child = int(said[0])
    process.kill()
    process.wait()
    monkeypatch.setattr(run_lock, "STRAGGLERS", 0.3)
    assert f"is in use by process {process.pid}" in refusal(tmp_path), "the child still writes"
    monkeypatch.setattr(run_lock, "STRAGGLERS", 30)
    threading.Timer(0.5, os.kill, (child, signal.SIGKILL)).start()
    with hold(tmp_path):  # waits for it
        pass


ELSEWHERE = Holder("node7", "another boot", 77, "1", "2026-01-02 03:04:05 +0000")


def write(folder: Path, holder: Holder) -> None:
    (folder / RUN).write_text(json.dumps(asdict(holder)))


def test_another_host_is_watched_where_locks_do_not_reach_it(tmp_path, monkeypatch, capfd):
    """Locks of this host say nothing about the other: only its heartbeat does."""
    monkeypatch.setattr(run_lock, "PATIENCE", 0.5)
    write(tmp_path, ELSEWHERE)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            write(tmp_path, replace(ELSEWHERE, beat=int(time.monotonic() * 1000)))

    thread = threading.Thread(target=beat)
    thread.start()
    sentence = refusal(tmp_path)
    over.set()
    thread.join()
    assert sentence == "is in use by process 77 on node7, since 2026-01-02 03:04:05 +0000"
    capfd.readouterr()
    with hold(tmp_path):
        said = capfd.readouterr().err
        assert "was last used by process 77 on node7" in said
        assert "was killed, or its host went down" in said
        assert (found := Holder.read(tmp_path / RUN)) is not None
        assert found.pid == os.getpid()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path):
        found = Holder.read(tmp_path / RUN)
        assert found is not None
        assert f"process {os.getpid()} " in refusal(tmp_path)
    write(tmp_path, replace(found, started="1"))  # its number, in another process's hands
    with hold(tmp_path):
        pass


def test_the_holder_counts_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    with hold(tmp_path):
        deadline = time.monotonic() + 20
        while (found := Holder.read(tmp_path / RUN)) is None or found.beat < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (tmp_path / RUN).stat().st_size == run_lock._SIZE


def test_a_folder_that_cannot_hold_a_lock_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be opened: " in refusal(tmp_path / "file")


def test_a_second_sweep_is_refused_before_a_job_starts(tmp_path, capfd):
    from pangu.sweep import sweep

    with hold(tmp_path, run_lock.SWEEP):
        assert sweep(["seed=1,2", "data=synthetic", f"run_dir={tmp_path}"]) == 2
    assert f"is in use by process {os.getpid()}" in " ".join(capfd.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.SWEEP]
