"""Sequences drawn from Megatron indexed datasets (`.bin` + `.idx`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers import build_sample_idx

from pangu.data.files import check_range
from pangu.data.index_cache import cached_arrays


@dataclass
class SequenceConfig(GPTDatasetConfig):
    """megatron-core's configuration and where the order of sequences is kept."""

    index_dir: str = ""
    vocab_size: int = 0  # of the model
    documents: bool = False  # whether samples say which document each token belongs to


class SequenceDataset(GPTDataset):
    """megatron-core's GPT dataset with an order that depends on the seed alone.

    Each epoch permutes the documents, cuts them into sequences and permutes those, from the seed
    and its own number. megatron-core's order depends on the number of samples asked for too, so
    that training longer would not continue through the same data. Its index files are also keyed
    by path only, and trusted when half written; these follow the corpus' size and age.

    With `reset_attention_mask`, samples carry `document_ids` `[seq]` int32: positions attend to
    each other only where these are equal. The end-of-document token belongs to its document. With
    `documents`, samples carry them under this name, `[seq + 1]`, with that of the last label.
    """

    config: SequenceConfig

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        ends = sample["tokens"] == self.config.tokenizer.eod
        documents = torch.nn.functional.pad(ends.cumsum(0), (1, 0)).to(torch.int32)
        if self.config.reset_attention_mask:
            sample["document_ids"] = documents[:-1]
        if self.config.documents:
            sample["documents"] = documents
        return sample

    def text(self, index: int) -> np.ndarray:
        """Tokens of sequence `index` and its last label, `[seq + 1]` int64."""
        return self._query_document_sample_shuffle_indices(index)[0]

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        text, documents = super()._query_document_sample_shuffle_indices(idx)
        check_range(self.dataset_path, int(text.min()), int(text.max()), self.config.vocab_size)
        return text, documents

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
