"""Whether the bytes of a corpus are those that were written.

`SHA256SUMS` in a corpus' folder lists its files as `sha256sum` writes and checks them. What was
read and found right is remembered by the file's size, age and inode, and read once.

No torch here: a damaged file is named before a process starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu.data import DataError
from pangu.data.index_file import IndexedFiles

SUMS_FILE = "SHA256SUMS"
# A few seconds of reading; larger files are read through on request.
CHEAP_BYTES = 2 << 30
_BLOCK = 1 << 23


def write_checksums(folder: Path) -> None:
    """List every file of `folder`."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE)
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    (folder / SUMS_FILE).write_text("".join(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """Digest of each listed file, by name; empty where there is no list.

    Raises:
        DataError: when the list is not one.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    sums = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        digest, _, name = line.decode("utf-8", "replace").partition(" ")
        if len(digest) != 64 or digest.strip("0123456789abcdef") or name[:1] not in (" ", "*"):
            raise DataError(f"{path}, line {number}, is not a checksum as sha256sum writes it")
        sums[name[1:]] = digest
    return sums


def expected_digest(path: Path) -> str:
    """The listed digest of `path`; empty where its folder has no list.

    Raises:
        DataError: when the folder's list leaves it out.
    """
    sums = read_checksums(path.parent)
    if sums and path.name not in sums:
        raise DataError(f"{path.parent / SUMS_FILE} is damaged: it does not list {path.name}")
    return sums.get(path.name, "")


@dataclass(frozen=True)
class Content:
    """What a file was found to hold, when, and which file it was."""

    identity: list[Any]  # size, age, inode, expected digest
    smallest: int  # token; both 0 in a file without tokens
    largest: int
    read_at: float


def verify(
    path: Path, digest: str, tokens: IndexedFiles | None, memory: Path, not_before: float = 0.0
) -> Content:
    """Read `path` through, or remember that it was.

    Of several processes one reads and the others wait.

    Args:
        digest: what its bytes must come to; empty for any.
        tokens: its structure where it is a `.bin`.
        memory: folder of what was read before. A folder that cannot be written is done without.
        not_before: remembered only from this time on.

    Raises:
        DataError: when the bytes are not those that were written.
    """
    stat = path.stat()
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino, digest]
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    note = memory / f"{name}.json"
    with _one_at_a_time(memory / f"{name}.lock"):
        known = _recall(note)
        if known and known.identity == identity and known.read_at >= not_before:
            return known
        found, smallest, largest = _read(path, tokens)
        if digest and found != digest:
            raise DataError(
                f"{path} is damaged: its content is not what {path.parent / SUMS_FILE} says"
            )
        content = Content(identity, smallest, largest, time.time())
        with suppress(OSError):
            _remember(note, content)
        return content


def _read(path: Path, tokens: IndexedFiles | None) -> tuple[str, int, int]:
    """Digest, smallest and largest token."""
    from tqdm import tqdm  # the trainer's, which a doctor of the planner alone asks for

    hasher, smallest, largest = hashlib.sha256(), [0], [0]
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"verifying {path}", delay=2) as bar,
    ):
        while block := file.read(_BLOCK):
            hasher.update(block)
            if tokens:
                values = np.frombuffer(block, tokens.token_type)
                smallest.append(int(values.min()))
                largest.append(int(values.max()))
            bar.update(len(block))
    return hasher.hexdigest(), min(smallest), max(largest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recall(note: Path) -> Content | None:
    try:
        return Content(**json.loads(note.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _remember(note: Path, content: Content) -> None:
    handle, name = tempfile.mkstemp(dir=note.parent, prefix=".partial-")
    with open(handle, "w") as file:
        json.dump(asdict(content), file)
    os.replace(name, note)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    from filelock import FileLock  # the trainer's too

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    except (OSError, NotImplementedError):  # a folder that is read-only, or knows no locks
        yield
        return
    try:
        yield
    finally:
        held.release()
