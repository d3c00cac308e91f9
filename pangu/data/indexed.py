"""Sequences drawn from Megatron indexed datasets (`.bin` + `.idx`)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers import build_sample_idx

from pangu.data import DataError
from pangu.data.index_cache import cached_arrays

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # bytes per token, by megatron-core's code


def count_tokens(prefix: str | Path) -> int:
    """Tokens in `prefix.bin`, checked against `prefix.idx`.

    Raises:
        DataError: when a file is missing, is not what it should be, or was cut short.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
    index = np.memmap(idx_path, np.uint8, "r") if idx_path.stat().st_size else np.empty(0, np.uint8)
    header = index[: _HEADER.size].tobytes()
    if len(header) < _HEADER.size or not header.startswith(b"MMIDIDX\0\0"):
        raise DataError(f"{idx_path} is not a Megatron index, or was cut short")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _ITEM_SIZES:
        raise DataError(f"{idx_path} has version {version} and token type {code}: not readable")
    pointers = _HEADER.size + sequences * 4
    expected = pointers + (sequences + documents) * 8
    if len(index) < expected:
        raise DataError(f"{idx_path} was cut short: {len(index)} bytes instead of {expected}")
    # The last sequence ends where the file does; the others need not be read.
    expected = 0
    if sequences:
        length = index[pointers - 4 : pointers].view(np.int32).item()
        pointer = index[pointers + 8 * (sequences - 1) :][:8].view(np.int64).item()
        expected = pointer + length * _ITEM_SIZES[code]
    if bin_path.stat().st_size != expected:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes where its index counts {expected}: "
            "cut short, or the two files do not belong together"
        )
    return expected // _ITEM_SIZES[code]


@dataclass
class SequenceConfig(GPTDatasetConfig):
    """megatron-core's configuration and where the order of sequences is kept."""

    index_dir: str = ""
    vocab_size: int = 0  # of the model


class SequenceDataset(GPTDataset):
    """megatron-core's GPT dataset with an order that depends on the seed alone.

    Each epoch permutes the documents, cuts them into sequences and permutes those, from the seed
    and its own number. megatron-core's order depends on the number of samples asked for too, so
    that training longer would not continue through the same data. Its index files are also keyed
    by path only, and trusted when half written; these follow the corpus' size and age.

    With `reset_attention_mask`, samples carry `document_ids` `[seq]` int32: positions attend to
    each other only where these are equal. The end-of-document token belongs to its document.
    """

    config: SequenceConfig

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        tokens = sample["tokens"]
        largest = int(max(tokens.max(), sample["labels"].max()))
        if largest >= self.config.vocab_size:
            raise DataError(
                f"{self.dataset_path}.bin holds token {largest}, but model.vocab_size is "
                f"{self.config.vocab_size}: it was written with another tokenizer"
            )
        if self.config.reset_attention_mask:
            ends = tokens == self.config.tokenizer.eod
            sample["document_ids"] = (ends.cumsum(0) - ends.long()).to(torch.int32)
        return sample

    def text(self, index: int) -> np.ndarray:
        """Tokens of sequence `index` and its last label, `[seq + 1]` int64."""
        return self._query_document_sample_shuffle_indices(index)[0]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        tokens = self._get_num_tokens_per_epoch()
        per_epoch = (tokens - 1) // self.config.sequence_length
        epochs = 1 if self.num_samples is None else max(1, -(-self.num_samples // per_epoch))
        path = Path(f"{self.dataset_path}.idx").resolve()
        stat = path.stat()
        key = ["sequences", str(path), stat.st_size, stat.st_mtime_ns, len(self.indices), epochs]
        key += [self.config.sequence_length, self.config.random_seed]
        return cached_arrays(self.config.index_dir, key, lambda: self._orders(epochs, tokens))

    def _orders(self, epochs: int, tokens: int) -> tuple[np.ndarray, ...]:
        """Documents in order `[epochs * documents]`; where each sequence starts, as position in
        that order and offset `[epochs * (sequences + 1), 2]`; and the sequences in order, as rows
        of the latter `[epochs * sequences]`."""
        lengths = np.array(self.dataset.sequence_lengths)
        documents, samples, shuffle = [], [], []
        for epoch in range(epochs):
            random = np.random.default_rng([self.config.random_seed, epoch])
            order = random.permutation(self.indices).astype(np.int32)
            starts = build_sample_idx(lengths, order, self.config.sequence_length, 1, tokens)
            starts = starts.astype(np.int64)
            starts[:, 0] += epoch * len(order)
            documents.append(order)
            samples.append(starts)
            shuffle.append(random.permutation(len(starts) - 1) + epoch * len(starts))
        return np.concatenate(documents), np.concatenate(samples), np.concatenate(shuffle)
