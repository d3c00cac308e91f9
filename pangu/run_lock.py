"""One run at a time in a run folder: who has it is written in a lock file there.

The lock is `flock`, which the kernel gives up with the last process that has the file open: the one
that took it and those that it has started or forked, however they end. On NFS (version 4, or with a
lock daemon), CephFS, GPFS and Lustre (mounted with `flock`) it reaches all hosts. Elsewhere it
reaches one host, or does not exist; so whoever has the folder also counts up in the file every
`BEAT` seconds. A host that finds another host's name there, although it may have the lock, watches
for `PATIENCE` seconds whether the count goes on. Two hosts that start within the same second on a
file system without locks between hosts are not told apart.

`filelock` has locks that die with their process too, but they name nobody, and are not handed on to
child processes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs.violation import ConfigError, Violation
from pangu.plain_file import read_plain

RUN, SWEEP = ".run.lock", ".sweep.lock"
BEAT, PATIENCE = 10.0, 45.0  # seconds
# Seconds in which the processes of a killed run, large ones perhaps, are torn down.
STRAGGLERS = 30.0
_SIZE = 512  # bytes of the file, always: a full disk has room for it once it is there
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of a host


@dataclass(frozen=True)
class Holder:
    """Who has the folder. `started` tells a process from a later one with its number."""

    host: str
    boot: str
    pid: int
    started: str
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host."""
        return (self.host, self.boot) == _host()

    @property
    def lives(self) -> bool:
        """Whether it runs, for one of this host."""
        return _start_of(self.pid) == self.started

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Who the file names; None for nobody, or for what cannot be read."""
        try:
            return cls(**json.loads(read_plain(path)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None


@contextlib.contextmanager
def hold(folder: Path, name: str = RUN, key: str = "run_dir") -> Iterator[int]:
    """Have a folder alone; yields the file's descriptor, to be handed on to child processes.

    Raises:
        ConfigError: under `key`, naming who has it, or why the lock file cannot be opened.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = f"{path} cannot be opened: {error.strerror}"
        raise ConfigError([Violation(key, folder, reason, "another folder")]) from None
    try:
        _take(descriptor, path, key)
        try:
            with _beating(descriptor):
                yield descriptor
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)  # this process has not been killed
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, key: str) -> None:
    locks = _lock(descriptor, path, key)
    before = Holder.read(path)
    if before is None:
        return
    if before.is_here:
        if not locks and before.lives:
            raise _in_use(path, before, key)
    elif _beats(path, before):
        raise _in_use(path, before, key)
    print(
        f"the run that had {path.parent} before ({before}) was killed, or its host went down",
        file=sys.stderr,
    )


def _lock(descriptor: int, path: Path, key: str) -> bool:
    """Lock the file; False where the file system cannot."""
    deadline = time.monotonic() + STRAGGLERS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
        holder = Holder.read(path)
        ending = holder is not None and holder.is_here and not holder.lives
        if not ending or time.monotonic() > deadline:
            raise _in_use(path, holder, key)
        time.sleep(0.1)


def _beats(path: Path, before: Holder) -> bool:
    """Whether a process of another host counts on."""
    question = f"{path.parent} was last used by {before}: looking whether it still is"
    print(question, file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE / 10))
        # Opened anew each time, which is when NFS asks its server.
        if (now := Holder.read(path)) is not None and now != before:
            return True
    return False


def _in_use(path: Path, holder: Holder | None, key: str) -> ConfigError:
    who = str(holder) if holder else "another process"
    hint = f"wait for it or stop it; or another {key}"
    return ConfigError([Violation(key, path.parent, f"is in use by {who}", hint)])


@contextlib.contextmanager
def _beating(descriptor: int) -> Iterator[None]:
    host, boot = _host()
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
    holder = Holder(host, boot, pid, _start_of(pid), since)
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(BEAT):
            count += 1
            _write(descriptor, replace(holder, beat=count))

    _write(descriptor, holder)
    thread = threading.Thread(target=beat, daemon=True, name="run lock")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _write(descriptor: int, holder: Holder) -> None:
    # Where the disk is full the lock alone must do.
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode().ljust(_SIZE), 0)
        os.fsync(descriptor)  # seen by other hosts


def _host() -> tuple[str, str]:
    return socket.gethostname(), _BOOT.read_text().strip() if _BOOT.exists() else ""


def _start_of(pid: int) -> str:
    """When a process has started, in the kernel's own time; "" where there is none, or it has
    ended and was not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
