"""Where stage 3's weights are between their uses with `engine.offload=nvme`: in a file.

DeepSpeed 0.19.8 has a swapper for weights too, which this is in the place of. Each whole weight
holds one of its buffers, and a checkpoint wants all whole. On a host its buffers are bfloat16
whatever the weights are, and a rank that is alone computes with views of them, which the next
weight overwrites before the backward: losses were right, and gradients 2 % off without a word.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from pangu.backends.host_tier import MappedFile


class WeightsFile:
    """A rank's pieces of weights, in a file mapped into memory in the place of the host's memory:
    the kernel reads and writes it, and takes its pages where memory is short."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = MappedFile(folder)
        self._places: list[mmap.mmap] = []
        in_memory = optimizer.param_groups_fp16_flat_cpu_memory
        moved = {flat.data_ptr(): self._moved(flat) for flat in in_memory}
        groups = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        for number, (flat, parameters) in enumerate(groups):
            whole = moved[flat.untyped_storage().data_ptr()]
            start = flat.storage_offset()
            optimizer.fp16_partitioned_groups_flat[number] = whole[start : start + flat.numel()]
            for parameter in parameters:
                end = start + parameter.ds_tensor.ds_numel
                parameter.ds_tensor.data = whole[start:end]
                start = end
        in_memory[:] = moved.values()
        weights: list[Any] = list(model.parameters())
        for parameter in weights:
            if not parameter.requires_grad:  # in no group
                parameter.ds_tensor.data = self._moved(parameter.ds_tensor)

    @property
    def bytes(self) -> int:
        return sum(map(len, self._places))

    def put_away(self) -> None:
        """Let the pages go that this process has used."""
        for place in self._places:
            place.madvise(mmap.MADV_DONTNEED)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._file.place(tensor.nbytes)
        self._places.append(place)
        moved = torch.frombuffer(place, dtype=tensor.dtype)
        return moved.copy_(tensor)
