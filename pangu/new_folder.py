"""A new folder that has its name when all of it is there.

What is on the way stands beside it, in a hidden folder with a lock (`run_lock`): whoever was killed
has left it there, and the next command that writes the same folder takes it over and clears it.
Whoever comes while the lock is held is refused.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from configs.violation import ConfigError, Violation
from pangu.plain_file import taken
from pangu.run_lock import hold

NEW = "model"  # in the hidden folder: what gets the name
LOCK = ".lock"


@contextlib.contextmanager
def workplace(out: Path, key: str = "--out") -> Iterator[Path]:
    """A hidden folder beside `out`, empty but for its lock, and gone after the block.

    Raises:
        ConfigError: under `key`: there is something at `out` already, no room for it, or somebody
            else is at it.
    """
    whole = out.absolute()
    work = whole.parent / f".{whole.name}.partial"
    try:
        if taken(out):
            raise ConfigError([Violation(key, out, "exists: name a new folder")])
        work.mkdir(parents=True, exist_ok=True)
        strange = work.is_symlink() or (any(work.iterdir()) and not (work / LOCK).is_file())
    except OSError as error:
        raise ConfigError([Violation(key, out, f"cannot be made: {error.strerror}")]) from None
    if strange:
        raise ConfigError([Violation(key, out, f"{work} is in the way, which is none of ours")])
    with contextlib.ExitStack() as held:
        try:
            descriptor = held.enter_context(hold(work, LOCK, key))
        except ConfigError as error:  # of the folder that the user has named
            raise ConfigError([replace(one, value=out) for one in error.violations]) from None
        if not _is_of(descriptor, work / LOCK) or taken(out):  # somebody has just finished
            raise ConfigError([Violation(key, out, "has just been written by another process")])
        _clear(work)
        try:
            yield work
        finally:
            _clear(work)
            with contextlib.suppress(OSError):
                (work / LOCK).unlink()
                work.rmdir()


def _is_of(descriptor: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clear(work: Path) -> None:
    """All but the lock, which goes last: without it nobody may clear the rest."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
