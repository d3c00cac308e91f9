"""Seeded random tokens: for benchmarks and for comparing layouts, without any file."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset


class SyntheticDataset(Dataset):
    """`length` sequences of uniformly random tokens; item i depends on the seed and i alone."""

    def __init__(self, length: int, seq_length: int, vocab_size: int, seed: int) -> None:
        self._shape = (length, seq_length)
        self._vocab_size = vocab_size
        self._seed = seed

    def __len__(self) -> int:
        return self._shape[0]

    def text(self, index: int) -> np.ndarray:
        """Tokens of sequence `index` and its last label, `[seq + 1]` int64."""
        random = np.random.default_rng([self._seed, index])
        return random.integers(0, self._vocab_size, self._shape[1] + 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seq_length = self._shape[1]
        text = torch.from_numpy(self.text(index))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(seq_length),
            "position_ids": torch.arange(seq_length),
            "document_ids": torch.zeros(seq_length, dtype=torch.int32),
        }
