"""Writes a model's tensors in shards as they come.

What is held in memory is one shard. The folder has its final name only when all of it is on the
disk: a conversion that is killed, or runs out of room, leaves nothing that looks like a model.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.violation import ConfigError
from pangu.checkpoint.tensor_files import INDEX, WeightsError
from pangu.new_folder import NEW, workplace
from pangu.plain_file import publish

SHARD_BYTES = 2**30


class ModelFolder:
    """A new folder `path` under its final name after a `with` block that did not fail.

    Raises:
        WeightsError: there is something at `path` already, or comes there meanwhile, somebody else
            writes it, or the disk is full.
    """

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = path
        self._held = contextlib.ExitStack()
        self._shard_bytes = shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._size = 0
        self._total = 0
        self._file_of: dict[str, int] = {}
        self._shards = 0

    def __enter__(self) -> ModelFolder:
        try:
            self.partial = self._held.enter_context(workplace(self.path)) / NEW
            self.partial.mkdir()
        except (ConfigError, OSError) as error:
            self._held.close()
            raise WeightsError(str(error)) from None
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor."""
        if name in self._file_of:
            raise WeightsError(f"{name} is written twice")
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._size + size > self._shard_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._file_of[name] = self._shards
        self._size += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._shard, self.partial / _part(self._shards), metadata={"format": "pt"})
        self._shard, self._size = {}, 0
        self._shards += 1

    def finish(self) -> None:
        """Write the last shard and the index; other files may be added after it."""
        self._flush()
        count = self._shards
        for number in range(count):
            os.rename(self.partial / _part(number), self.partial / _shard_name(number, count))
        table = {name: _shard_name(number, count) for name, number in self._file_of.items()}
        index = {"metadata": {"total_size": self._total}, "weight_map": table}
        (self.partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                publish(self.partial, self.path)
                return
        except OSError as late:
            error = late
        finally:
            self._held.close()
        if isinstance(error, OSError | SafetensorError):  # the latter of a full disk
            raise WeightsError(f"{self.path} could not be written: {error}") from None


def finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself.

    Raises:
        WeightsError: it holds infinities or what is no number.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise WeightsError(f"{name} holds numbers that are not finite")
    return tensor


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
