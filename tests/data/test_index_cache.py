"""Computed once, complete or absent."""

from __future__ import annotations

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
