"""Files as a run wants them: to be read, never waited for; and on the disk, not in its cache."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read it.

    Raises:
        OSError: it cannot be read, or is no file: a folder, a device, a pipe (which never ends).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path) -> bytes:
    """The content of a file; see `open_plain`."""
    with open_plain(path) as file:
        return file.read()


def taken(path: Path) -> bool:
    """Whether no new folder can have this name: there is something, a link too, and no empty
    folder, which `publish` puts one in the place of."""
    return path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))


def publish(partial: Path, final: Path) -> None:
    """Bring a finished folder to the disk, then give it its name, in one rename.

    Raises:
        OSError: somebody else has made `final` meanwhile.
    """
    for path in sorted(partial.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(partial)
    partial.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
