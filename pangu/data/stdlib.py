"""The default corpus: the source of Python's own standard library, on every machine already."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from pangu.data import DataError

HELD_OUT = 0.05
# 30 MB of text teach no more merges than this; larger models leave the rest of their ids unused.
MAX_VOCAB_SIZE = 16384


def standard_library_folder(cache_dir: str | Path, vocab_size: int) -> Path:
    """Where the corpus for a model of `vocab_size` tokens is, or will be."""
    bpe = min(vocab_size, MAX_VOCAB_SIZE)
    return Path(cache_dir) / f"stdlib-python{platform.python_version()}-bpe{bpe}"


def prepare_standard_library(cache_dir: str | Path, vocab_size: int) -> Path:
    """The folder of the prepared corpus, prepared now if it is not there yet (half a minute).

    Files are held out by the hash of their path; the byte-level BPE sees the training part only.
    Of several processes one prepares and the others wait.

    Raises:
        DataError: when this Python came without its source, or preparation failed.
    """
    from filelock import FileLock  # the trainer's, with which the planner alone is not installed

    from pangu.data.corpus import is_complete

    folder = standard_library_folder(cache_dir, vocab_size)
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.first-use.lock"):
        if is_complete(folder):
            return folder
        source = Path(sysconfig.get_path("stdlib"))
        if not (source / "os.py").is_file():
            raise DataError(
                f"this Python has no standard library source in {source}: prepare a corpus with "
                "python -m pangu.data.prepare and train on it with data=indexed"
            )
        command = [sys.executable, "-m", "pangu.data.prepare", str(source), "--pattern", "*.py"]
        bpe = min(vocab_size, MAX_VOCAB_SIZE)
        command += ["--train-tokenizer", str(bpe), "--held-out", str(HELD_OUT)]
        # A process of its own: the preparation starts workers, which must not inherit or import
        # what a training process has loaded.
        done = subprocess.run(
            [*command, "--output", str(folder)],
            stdout=sys.stderr,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            check=False,
        )
        if done.returncode:
            raise DataError(f"the standard library could not be prepared in {folder} (see above)")
    return folder
