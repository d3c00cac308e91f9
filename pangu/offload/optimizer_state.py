"""The optimizer's moments and main weights in a file between steps."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

import torch

from pangu.backends.host_tier import MappedFile


class StateFile:
    """Optimizer state that lies in a file mapped into memory: a step reads and writes it there, as
    does whoever saves or loads it, and its pages leave the process when the step is over.

    Only where the device is the host.
    """

    def __init__(self, folder: Path) -> None:
        self._file = MappedFile(folder)
        self._places: dict[int, mmap.mmap] = {}  # by address of the tensor in it

    def put_away(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Move what is not in the file yet, and free its pages."""
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.dim() > 0:
                        state[name] = self._moved(value)
        for place in self._places.values():
            place.madvise(mmap.MADV_DONTNEED)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        if value.data_ptr() in self._places or not value.numel():
            return value
        place = self._file.place(value.nbytes)
        moved = torch.frombuffer(place, dtype=value.dtype).view(value.shape)
        moved.copy_(value)
        self._places[moved.data_ptr()] = place
        return moved
