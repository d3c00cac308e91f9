"""Starts the processes of one machine when no launcher did."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launch.environment import STARTED_BY, ProcessEnvironment

if TYPE_CHECKING:
    from configs.schema import Config

# After one process failed: how long the others may take to report their own end, and then to
# follow SIGTERM, in seconds.
GRACE_SECONDS = 5.0


def start_local(command: Sequence[str], processes: int, log_dir: Path) -> int:
    """Run `command` once per rank and wait for all.

    Rank 0 keeps the terminal; rank N writes `log_dir/rank_N.log`. SIGINT and SIGTERM are passed
    on, for every rank to save and leave. When a process fails the others are ended.

    Returns:
        The exit code of the first process that failed, 128 + N for signal N, or 0.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children: list[subprocess.Popen[bytes]] = []
    for rank in range(processes):
        environ = dict(os.environ)
        ProcessEnvironment("local", rank, processes, rank, processes, "127.0.0.1", port).export(
            environ
        )
        environ[STARTED_BY] = "local"
        output = None if rank == 0 else (log_dir / f"rank_{rank}.log").open("wb")
        # A session of its own: Ctrl-C reaches the children once, through us.
        children.append(
            subprocess.Popen(
                command,
                env=environ,
                stdout=output,
                stderr=None if rank == 0 else subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        if output is not None:
            output.close()
    _pass_on_signals(children)
    rank, code = _wait(children)
    # A user's mistake, or wish to stop, is the same on every rank, and rank 0 has the terminal.
    wished = code in (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    if code and rank and not (wished and children[0].returncode in (code, 128 - code)):
        _show(log_dir / f"rank_{rank}.log", rank, code)
    return code


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone (Linux only), so that
    a killed run leaves no rank behind that still writes into its folder."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _pass_on_signals(children: Sequence[subprocess.Popen[bytes]]) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        _signal(children, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)


def _signal(children: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """The first rank that failed and its exit code; (0, 0) when none did."""
    while True:
        codes = [child.poll() for child in children]
        for rank, code in enumerate(codes):
            if code:
                _end(children)
                return rank, code if code > 0 else 128 - code
        if None not in codes:
            return 0, 0
        time.sleep(0.05)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the other ranks report, then end them."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            _signal(children, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if all(child.poll() is not None for child in children):
                return
            time.sleep(0.05)


def _show(log: Path, rank: int, code: int, lines: int = 40) -> None:
    tail = log.read_text(errors="replace").splitlines()[-lines:]
    print(f"\nrank {rank} failed with exit code {code}; the end of {log}:", file=sys.stderr)
    print("\n".join(f"  {line}" for line in tail), file=sys.stderr)


def prepare_environment(config: Config, process: ProcessEnvironment) -> ProcessEnvironment:
    """Set what torch and megatron-core read when they are imported."""
    if not process.launched:
        process = replace(process, master_port=free_port())
    process.export(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // process.local_world_size)
    if config.backend.threads or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(config.backend.threads or share)
    # megatron-core overlaps communication by the order in which kernels are queued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # With torch-npu but no CANN, `import torch` would fail; backend=npu imports it explicitly.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return process
