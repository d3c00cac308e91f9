"""Rows of a model's tensors, read without what lies between them; every byte is counted."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from pangu.checkpoint.contents import OPTIMIZER_PREFIX
from pangu.checkpoint.model_files import holds_model
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.engines.megatron import safe_reader

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A part of a tensor, from `offsets` on, whose rows lie one after the other from byte `start`
    of a file."""

    file: Path
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor, and where it lies."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[Block]


class Bytes:
    """Reads exactly what it is asked for, and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, file: Path, start: int, size: int) -> bytearray:
        """Raises:
        WeightsError: the file cannot be read, or ends before.
        """
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
        self.count += size
        return found


class TensorRows:
    """The tensors of an imported model, or of a run's checkpoint without the optimizer's.

    Raises:
        WeightsError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._bytes = folder, Bytes()
        stored = _of_model if holds_model(folder) else _of_run
        self._stored = dict(stored(folder, self._bytes))

    @property
    def bytes_read(self) -> int:
        """From the disk so far, the files' own lists of tensors included."""
        return self._bytes.count

    def names(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

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
        stored = self._stored[name]
        found = torch.empty(len(numbers), *stored.shape[1:], dtype=stored.dtype)
        for block in stored.blocks:
            low, high = block.offsets[0], block.offsets[0] + block.sizes[0]
            inside = [at for at, number in enumerate(numbers) if low <= number < high]
            ends = zip(block.offsets[1:], block.sizes[1:], strict=True)
            columns = tuple(slice(begin, begin + size) for begin, size in ends)
            for run in _runs(inside, numbers):
                piece = self._piece(block, numbers[run[0]] - low, len(run), stored.dtype)
                found[(slice(run[0], run[-1] + 1), *columns)] = piece
        return found

    def _piece(self, block: Block, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` rows of a block that follow each other."""
        shape = (count, *block.sizes[1:])
        row = math.prod(block.sizes[1:]) * dtype.itemsize
        if not row:
            return torch.empty(shape, dtype=dtype)
        found = self._bytes.read(block.file, block.start + first * row, count * row)
        return torch.frombuffer(found, dtype=dtype).view(shape)


def _runs(places: list[int], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Places whose numbers follow each other, as they do themselves."""
    cuts = [
        at
        for at, (one, other) in enumerate(pairwise(places), 1)
        if (other, numbers[other]) != (one + 1, numbers[one] + 1)
    ]
    for begin, end in pairwise([0, *cuts, len(places)]):
        if begin < end:
            yield places[begin:end]


def _of_model(folder: Path, source: Bytes) -> Iterator[tuple[str, Stored]]:
    """By the head of each file of safetensors: its length in 8 bytes, then JSON."""
    for file in sorted(Safetensors(folder).files()):  # it looks whether index and files agree
        size = int.from_bytes(source.read(file, 0, 8), "little")
        for name, entry in json.loads(source.read(file, 8, size)).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise WeightsError(f"{file} holds {name} in {entry['dtype']}, which is unknown")
            start, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
            block = Block(file, start, (0,) * len(shape), shape)
            yield name, Stored(shape, _DTYPES[entry["dtype"]], [block])


def _of_run(folder: Path, source: Bytes) -> Iterator[tuple[str, Stored]]:
    """By the list of tensors: a part that a rank wrote is an archive of its own in the rank's
    file, which keeps the values uncompressed."""
    try:
        listed = safe_reader.read_metadata(folder)
    except safe_reader.Unreadable as error:
        raise WeightsError(f"{folder}: {error}") from None
    source.count += (folder / safe_reader.METADATA).stat().st_size
    for name, entry in listed.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or name.startswith(OPTIMIZER_PREFIX):
            continue
        blocks, dtype = [], entry.properties.dtype
        for chunk in entry.chunks:
            place = listed.storage_data[MetadataIndex(name, chunk.offsets)]
            part = _Part(source, folder / place.relative_path, place.offset, place.length)
            start = place.offset + _values(part, math.prod(chunk.sizes) * dtype.itemsize)
            blocks.append(Block(part.file, start, tuple(chunk.offsets), tuple(chunk.sizes)))
        yield name, Stored(tuple(entry.size), dtype, blocks)


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file of its own."""

    def __init__(self, source: Bytes, file: Path, offset: int, length: int) -> None:
        self._source, self.file, self._offset, self._length = source, file, offset, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        wanted = left if size < 0 else min(size, left)
        found = self._source.read(self.file, self._offset + self._at, wanted)
        self._at += wanted
        return bytes(found)


def _values(part: _Part, size: int) -> int:
    """Where the values of the one tensor of an archive that `torch.save` wrote begin.

    Raises:
        WeightsError: it is none, or does not hold so many bytes of values.
    """
    try:
        with zipfile.ZipFile(part) as archive:
            entries = [e for e in archive.infolist() if e.filename.endswith("/data/0")]
    except (zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{part.file} holds something else than tensors: {error}") from None
    if len(entries) != 1 or entries[0].compress_type or entries[0].file_size != size:
        raise WeightsError(f"{part.file} holds a part of a tensor in another form than it should")
    part.seek(entries[0].header_offset)
    header = part.read(30)  # its own: two lengths at the end, of the name and of what fills up
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return entries[0].header_offset + 30 + sum(lengths)
