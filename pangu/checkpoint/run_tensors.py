"""The tensors of a run's checkpoint one at a time, in one process, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pangu.checkpoint.contents import OPTIMIZER_PREFIX
from pangu.checkpoint.tensor_files import WeightsError
from pangu.engines.megatron import safe_reader


class RunTensors:
    """Weights and buffers of a checkpoint folder under our names; moments are left out.

    Raises:
        WeightsError: its list of tensors cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = safe_reader.SafeReader(folder)
        try:
            saved = safe_reader.shapes(self._reader.read_metadata())
        except safe_reader.Unreadable as error:
            raise WeightsError(f"{folder}: {error}") from None
        self._shapes = {k: v for k, v in saved.items() if not k.startswith(OPTIMIZER_PREFIX)}

    def names(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, put together from the parts that ranks have written."""
        entry = self._reader.read_metadata().state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), name  # `shapes` lists no other
        whole = torch.empty(self._shapes[name], dtype=entry.properties.dtype)
        try:
            torch_checkpoint.load({name: whole}, storage_reader=self._reader, no_dist=True)
        except Exception as error:  # whatever a broken archive makes torch raise
            why = safe_reader.reason(error)
            raise WeightsError(f"{self.folder}: {name} cannot be read: {why}") from None
        return whole
