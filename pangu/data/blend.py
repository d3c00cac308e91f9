"""Several corpora blended by weight, with megatron-core's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.helpers import build_blending_indices

from pangu.data.index_cache import cached_arrays


class Blend(BlendedDataset):
    """megatron-core's blend, whose index is kept by `cached_arrays`: its own cache needs
    torch.distributed, writes on global rank 0 only, and trusts files cut short."""

    def text(self, index: int) -> np.ndarray:
        """Tokens of sequence `index` and its last label, `[seq + 1]` int64."""
        return self.datasets[self.dataset_index[index]].text(self.dataset_sample_index[index])

    def _build_indices(self) -> tuple[np.ndarray, ...]:
        key = ["blend", list(self.weights), self.size]
        return cached_arrays(self.config.index_dir, key, self._interleave)

    def _interleave(self) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset each sequence comes from, and its number there; both `[size]`."""
        chosen, numbers = np.zeros(self.size, np.int16), np.zeros(self.size, np.int64)
        build_blending_indices(chosen, numbers, self.weights, len(self.datasets), self.size, False)
        drawn = np.bincount(chosen, minlength=len(self.datasets))
        for dataset, count in zip(self.datasets, drawn, strict=True):
            if count > len(dataset):
                raise IndexError(
                    f"the blend draws {count} sequences of {dataset.dataset_path}, which holds "
                    f"{len(dataset)}: raise mid_level_dataset_surplus"
                )
        return chosen, numbers


class BlendBuilder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder, making a `Blend` where it would make its own."""

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            Blend if cls is BlendedDataset else cls, is_built_on_rank, synchronize_ranks, *args
        )
