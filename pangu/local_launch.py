"""Starts the processes of one machine when no launcher did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from configs.violation import ConfigError, Violation
from launch import port
from launch.environment import STARTED_BY, ProcessEnvironment
from pangu.processes import PARENT, PEER_LOST, last_step

if TYPE_CHECKING:
    from configs.schema import Config

# After one process failed: how long the others may take to report their own end, and then to
# follow SIGTERM, in seconds.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, and its exit code, -N for signal N."""

    rank: int
    code: int

    @property
    def exit_code(self) -> int:
        """As a shell counts: 128 + N for signal N."""
        return self.code if self.code > 0 else 128 - self.code

    @property
    def signal(self) -> str:
        """The name of the signal that ended the rank, or ""."""
        return signal.Signals(-self.code).name if self.code < 0 else ""


def start_local(
    command: Sequence[str], processes: int, run_dir: Path, kept_open: Sequence[int] = ()
) -> int:
    """Run `command` once per rank and wait for all.

    Rank 0 keeps the terminal; rank N writes `run_dir/logs/rank_N.log`. SIGINT and SIGTERM are
    passed on, for every rank to save and leave. When a process fails the others are ended, and the
    last line says which rank failed, how and after which step. MASTER_PORT is used where it is
    set, else a free one.

    Args:
        kept_open: file descriptors that every process has too.

    Returns:
        The exit code of the process that failed first, 128 + N for signal N, or 0.

    Raises:
        ConfigError: MASTER_PORT cannot be listened on.
    """
    logs = run_dir / "logs"
    master_port = _master_port()
    logs.mkdir(parents=True, exist_ok=True)
    children: list[subprocess.Popen[bytes]] = []
    told = _pass_on_signals(children)
    for rank in range(processes):
        environ = child_environment("local")
        ProcessEnvironment(
            "local", rank, processes, rank, processes, "127.0.0.1", master_port
        ).export(environ)
        output = None if rank == 0 else (logs / f"rank_{rank}.log").open("wb")
        # A session of its own: Ctrl-C reaches the children once, through us.
        children.append(
            subprocess.Popen(
                command,
                env=environ,
                stdout=output,
                stderr=None if rank == 0 else subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=tuple(kept_open),
            )
        )
        if output is not None:
            output.close()
    for number in told:  # before all were there
        _signal(children, number)
    failure = _wait(children)
    if failure is None:
        return 0
    # What ends every rank alike, a mistake of the user's for one, rank 0 has said on the terminal.
    said = failure.code > 0 and failure.code == children[0].returncode
    wished = -failure.code in told
    if not said and not wished:
        _show(failure, logs / f"rank_{failure.rank}.log", last_step(run_dir))
    return failure.exit_code


def child_environment(started_by: str) -> dict[str, str]:
    """This process's environment, for one that it starts and that ends with it."""
    return {**os.environ, STARTED_BY: started_by, PARENT: str(os.getpid())}


def _master_port() -> int:
    text = os.environ.get("MASTER_PORT")
    if text is None:
        return port.free_port()
    number = int(text) if text.isdecimal() else 0
    if why := port.obstacle(number):
        hint = f"unset it, or MASTER_PORT={port.free_port()}"
        raise ConfigError([Violation("MASTER_PORT", text, why, hint)])
    return number


def _pass_on_signals(children: Sequence[subprocess.Popen[bytes]]) -> list[signal.Signals]:
    """The signals that were sent to this process, as they come."""
    told: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        passed_on = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        told.append(passed_on)
        _signal(children, passed_on)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    return told


def _signal(children: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> Failure | None:
    """Wait for all; the failure that the others followed, if there was one."""
    while True:
        codes = [child.poll() for child in children]
        if any(codes):
            break
        if None not in codes:
            return None
        time.sleep(0.05)
    first = [Failure(rank, code) for rank, code in enumerate(codes) if code]
    found = first + [Failure(rank, code) for rank, code in _end(children)]
    # Who is killed says nothing; who misses it may be quicker to fail.
    return min(found, key=lambda failure: (failure.code > 0, failure.code == PEER_LOST))


def _end(children: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Let the other ranks report, then end them. Ranks that failed by themselves, and how."""
    failed: list[tuple[int, int]] = []
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            _signal(children, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(child.poll() is None for child in children):
            time.sleep(0.05)
        if number is None:
            codes = [(rank, child.returncode) for rank, child in enumerate(children)]
            failed = [(rank, code) for rank, code in codes if code]
    return failed


def _show(failure: Failure, log: Path, step: int, lines: int = 40) -> None:
    """The end of the failed rank's log, and, as the last line, who failed and how."""
    rank, name = failure.rank, failure.signal
    if rank and name != "SIGKILL":  # who is killed has not written why
        tail = log.read_text(errors="replace").splitlines()[-lines:]
        print(f"\nthe end of {log}:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in tail), file=sys.stderr)
    how = f"was ended by {name}" if name else f"failed with exit code {failure.code}"
    when = f"after step {step}" if step else "before its first step was done"
    advice = ""
    if name:
        killer = "; where nobody sent it, the kernel did, out of memory: see dmesg"
        advice = f"{killer if name == 'SIGKILL' else ''}. The same command goes on from the "
        advice += "newest checkpoint"
    print(f"rank {rank} {how} {when}{advice}", file=sys.stderr)


def prepare_environment(config: Config, process: ProcessEnvironment) -> ProcessEnvironment:
    """Set what torch and megatron-core read when they are imported."""
    if not process.launched:
        process = replace(process, master_port=port.free_port())
    process.export(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // process.local_world_size)
    if config.backend.threads or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(config.backend.threads or share)
    # A store whose host has gone is reported by our own words, not by pages of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # megatron-core overlaps communication by the order in which kernels are queued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # With torch-npu but no CANN, `import torch` would fail; backend=npu imports it explicitly.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return process
