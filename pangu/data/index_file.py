"""The structure of Megatron indexed datasets: what `PREFIX.idx` says about `PREFIX.bin`.

No torch here: a damaged file is named before a process starts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu.data import DataError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# megatron-core's codes of types that tokens have; 6 and 7 are its floating-point numbers.
_TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_BLOCK = 1 << 20  # sequences that are checked at a time


@dataclass(frozen=True)
class IndexedFiles:
    """An index and its tokens, found to fit each other."""

    tokens: int
    token_type: np.dtype
    lengths: np.ndarray  # of each sequence, `[sequences]` int32
    documents: np.ndarray  # first sequence of each, and the last one's end: `[documents + 1]` int64


def read_structure(prefix: str | Path) -> IndexedFiles:
    """What `prefix.idx` says, after all that it says was checked: magic, version and token type,
    its size against its counts, lengths, pointers, the order of documents, and the size of
    `prefix.bin`.

    Raises:
        DataError: when a file is missing, is not what it should be, was cut short or changed.
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
    if version != 1 or code not in _TOKEN_TYPES:
        raise DataError(f"{idx_path} has version {version} and token type {code}: not readable")
    pointers = _HEADER.size + sequences * 4
    order = pointers + sequences * 8
    expected = order + documents * 8
    if len(index) < expected:
        raise DataError(f"{idx_path} was cut short: {len(index)} bytes instead of {expected}")
    # Behind the documents there may be one byte for each sequence: its modality.
    if len(index) not in (expected, expected + sequences):
        raise DataError(f"{idx_path} has {len(index)} bytes where its counts make {expected}")
    token_type = np.dtype(_TOKEN_TYPES[code])
    lengths = index[_HEADER.size : pointers].view(np.int32)
    starts, first = index[pointers:order].view(np.int64), index[order:expected].view(np.int64)
    size = _check_sequences(idx_path, lengths, starts, token_type.itemsize)
    _check_documents(idx_path, first, sequences)
    if bin_path.stat().st_size != size:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes where its index counts {size}: "
            "cut short, or the two files do not belong together"
        )
    return IndexedFiles(size // token_type.itemsize, token_type, lengths, first)


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, item_size: int) -> int:
    """Bytes of all sequences. `lengths` `[sequences]` int32 in tokens, `pointers` int64 in bytes:
    each sequence starts where the one before it ends."""
    end = 0
    for first in range(0, len(lengths), _BLOCK):
        block = lengths[first : first + _BLOCK].astype(np.int64)
        if (block < 0).any():
            number = first + int(np.argmax(block < 0))
            raise DataError(f"{path} is damaged: sequence {number} has length {lengths[number]}")
        ends = end + np.cumsum(block * item_size)
        starts = np.concatenate(([end], ends[:-1]))
        wrong = pointers[first : first + _BLOCK] != starts
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{path} is damaged: sequence {first + at} starts at byte {pointers[first + at]}, "
                f"not at {starts[at]} where the one before it ends"
            )
        end = int(ends[-1])
    return end


def _check_documents(path: Path, order: np.ndarray, sequences: int) -> None:
    """`order` `[documents + 1]` int64: the first sequence of each document, and the last's end."""
    if not len(order) or order[0] != 0 or order[-1] != sequences:
        ends = f"from {order[0]} to {order[-1]}" if len(order) else "nowhere"
        raise DataError(f"{path} is damaged: its documents go {ends}, not from 0 to {sequences}")
    for first in range(0, len(order) - 1, _BLOCK):
        backwards = np.diff(order[first : first + _BLOCK + 1]) < 0
        if backwards.any():
            number = first + int(np.argmax(backwards))
            raise DataError(
                f"{path} is damaged: document {number} ends before it starts, at sequence "
                f"{order[number + 1]} after {order[number]}"
            )
