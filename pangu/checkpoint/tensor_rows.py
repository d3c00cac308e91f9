"""Rows of a model's tensors, read without what lies between them; every byte is counted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from pangu.checkpoint.tensor_files import Safetensors, WeightsError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where a tensor's values lie: from byte `start` of a file, row after row."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class TensorRows:
    """The tensors of a folder of safetensors. `bytes_read` counts what came from the disk, the
    files' own lists of tensors included.

    Raises:
        WeightsError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read = folder, 0
        files = {path for path in folder.glob("*.safetensors")}
        listed = list(Safetensors(folder).names())  # it looks whether index and files agree
        places = {name: at for file in sorted(files) for name, at in self._places(file)}
        self._place = {name: places[name] for name in listed}

    def _places(self, file: Path) -> Iterator[tuple[str, _Place]]:
        head = int.from_bytes(self._bytes(file, 0, 8), "little")
        for name, entry in json.loads(self._bytes(file, 8, head)).items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                start = 8 + head + entry["data_offsets"][0]
                yield name, _Place(file, start, tuple(entry["shape"]), _DTYPES[entry["dtype"]])

    def names(self) -> Iterator[str]:
        return iter(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place[name].shape

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in its stored dtype, on the host.

        Raises:
            WeightsError: its file is damaged.
        """
        return self.rows(name, range(self.shape(name)[0]))

    def read_block(self, name: str, block: tuple[slice, ...]) -> torch.Tensor:
        """The part of a tensor that `block` names; whole rows are read."""
        first = block[0].indices(self.shape(name)[0])
        return self.rows(name, range(*first))[(slice(None), *block[1:])]

    def rows(self, name: str, numbers: Sequence[int]) -> torch.Tensor:
        """Some rows of a tensor, `[len(numbers), …]`, in order.

        Raises:
            WeightsError: its file is damaged.
        """
        place = self._place[name]
        found = torch.empty(len(numbers), *place.shape[1:], dtype=place.dtype)
        into = found.view(torch.uint8).view(-1) if found.numel() else found
        cuts = [0, *(n for n in range(1, len(numbers)) if numbers[n] != numbers[n - 1] + 1)]
        for first, end in pairwise([*cuts, len(numbers)]):  # rows that follow each other
            size = (end - first) * place.row_bytes
            start = place.start + numbers[first] * place.row_bytes if size else 0
            piece = self._bytes(place.file, start, size)
            if size:
                at = first * place.row_bytes
                into[at : at + size] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        return found

    def _bytes(self, file: Path, start: int, size: int) -> bytes:
        """Exactly these; nothing is read ahead."""
        found = bytearray()
        try:
            with file.open("rb", buffering=0) as opened:
                while len(found) < size:
                    piece = os.pread(opened.fileno(), size - len(found), start + len(found))
                    if not piece:
                        raise WeightsError(f"{file} ends before its tensors do")
                    found += piece
        except OSError as error:
            raise WeightsError(f"{file} cannot be read: {error.strerror}") from None
        self.bytes_read += size
        return bytes(found)
