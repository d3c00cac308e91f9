"""Computed once, complete or absent."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from pangu.data.index_cache import cached_arrays


def test_computed_once_for_each_key(tmp_path: Path) -> None:
    calls = []

    def compute() -> tuple[np.ndarray, ...]:
        calls.append(1)
        return np.arange(3) + len(calls), np.array([[1.5]])

    for _ in range(2):
        first, second = cached_arrays(tmp_path, ["a", 1], compute)
        assert first.tolist() == [1, 2, 3]
        assert second.tolist() == [[1.5]]
        assert isinstance(first, np.memmap)
    assert cached_arrays(tmp_path, ["a", 2], compute)[0].tolist() == [2, 3, 4]
    assert len(calls) == 2


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def compute() -> tuple[np.ndarray, ...]:
        raise MemoryError

    with pytest.raises(MemoryError):
        cached_arrays(tmp_path, ["a"], compute)

    def disk_full() -> tuple[np.ndarray, ...]:
        return np.arange(3), np.array([lambda: 0])  # the second cannot be written

    with pytest.raises(Exception, match="pickle"):
        cached_arrays(tmp_path, ["a"], disk_full)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert cached_arrays(tmp_path, ["a"], lambda: (np.arange(2),))[0].tolist() == [0, 1]


def test_what_is_damaged_is_computed_again(tmp_path: Path) -> None:
    """A flipped bit anywhere, a file cut short, one that is gone: never read as it is."""
    calls = []

    def compute() -> tuple[np.ndarray, ...]:
        calls.append(1)
        return np.arange(40), np.arange(3.0)

    def read() -> list[list[float]]:
        return [array.tolist() for array in cached_arrays(tmp_path, ["a"], compute)]

    expected = [list(range(40)), [0.0, 1.0, 2.0]]
    assert read() == expected
    (home,) = (path for path in tmp_path.iterdir() if path.is_dir())
    draw = random.Random(0)
    for number in range(30):
        path = home / ("0.npy", "1.npy", "sums.json")[number % 3]
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert read() == expected
        assert len(calls) == number + 2
    (home / "1.npy").write_bytes((home / "1.npy").read_bytes()[:-1])
    assert read() == expected
    (home / "0.npy").unlink()
    assert read() == expected
    assert len(calls) == 33
    read()
    assert len(calls) == 33
