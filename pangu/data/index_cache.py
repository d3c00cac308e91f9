"""Arrays that are computed once and mapped into memory by every process after that.

Files are complete or absent, whichever process dies; they may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock


def cached_arrays(
    folder: str | Path, key: list[Any], compute: Callable[[], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """What `compute` returns, read-only and memory-mapped from `folder`.

    `key` names everything that the arrays follow from. Of several processes one computes and the
    others wait.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    home = Path(folder) / digest
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{home}.lock"):
            if not home.is_dir():
                _write(home, compute())
    return tuple(np.load(path, mmap_mode="r") for path in sorted(home.glob("*.npy")))


def _write(home: Path, arrays: tuple[np.ndarray, ...]) -> None:
    partial = Path(tempfile.mkdtemp(dir=home.parent, prefix=".partial-"))
    try:
        for number, array in enumerate(arrays):
            np.save(partial / f"{number}.npy", array)
        partial.chmod(0o755)
        partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
