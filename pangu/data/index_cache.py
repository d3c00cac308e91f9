"""Arrays that are computed once and mapped into memory by every process after that.

Files are complete or absent, whichever process dies; they may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

_SUMS = "sums.json"
# Larger arrays are mapped unread: they would be read by every process at every start.
CHEAP_BYTES = 1 << 28


def cached_arrays(
    folder: str | Path, key: list[Any], compute: Callable[[], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """What `compute` returns, read-only and memory-mapped from `folder`.

    `key` names everything that the arrays follow from. Of several processes one computes and the
    others wait. What is damaged is computed again.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    home = Path(folder) / digest
    arrays = _read(home)
    if arrays is None:
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{home}.lock"):
            arrays = _read(home)
            if arrays is None:
                shutil.rmtree(home, ignore_errors=True)
                _write(home, compute())
                arrays = _read(home)
    if arrays is None:
        raise OSError(f"{home} does not hold what was written into it")
    return arrays


def _read(home: Path) -> tuple[np.ndarray, ...] | None:
    """None where there is nothing, or not what was written."""
    try:
        sums = json.loads((home / _SUMS).read_bytes())
        cheap = sum((home / name).stat().st_size for name in sums) <= CHEAP_BYTES
        if cheap and any(_sum(home / name) != sums[name] for name in sums):
            return None
        return tuple(np.load(home / name, mmap_mode="r") for name in sorted(sums))
    except (OSError, ValueError, EOFError, TypeError, RecursionError):
        return None


def _sum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _write(home: Path, arrays: tuple[np.ndarray, ...]) -> None:
    partial = Path(tempfile.mkdtemp(dir=home.parent, prefix=".partial-"))
    try:
        sums = {}
        for number, array in enumerate(arrays):
            path = partial / f"{number}.npy"
            np.save(path, array)
            sums[path.name] = _sum(path)
        (partial / _SUMS).write_text(json.dumps(sums))
        partial.chmod(0o755)
        partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
