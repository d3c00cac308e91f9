"""What every test leaves as it found it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Triton, where it is installed: it decides then (tests/in_interpreter.py).
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def random_numbers() -> None:
    """The same for a test whatever ran before it, for those that import torch at all."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """A run inside a test's own process sets MASTER_PORT and more, for itself; another file's runs
    would all want that port."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
