"""Weights in safetensors under our names, read into any layout: each rank reads its own slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from safetensors import SafetensorError, safe_open

from pangu.checkpoint.tensor_files import INDEX, SINGLE, Rows, Safetensors, WeightsError

CODES = "quantization.safetensors"  # of a quantised model, beside its weights


def scheme(folder: Path) -> str:
    """What a model's folder is quantised by, as `W4A16`; "" where it is not.

    Raises:
        WeightsError: the file that says so is damaged.
    """
    if not (folder / CODES).is_file():
        return ""
    try:
        with safe_open(folder / CODES, framework="pt") as file:
            return str((file.metadata() or {}).get("name", "by no known scheme"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder / CODES} is damaged or incomplete: {error}") from None


def holds_model(folder: Path) -> bool:
    """Whether a folder is an imported model and not the checkpoint of a run."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The global shape of every tensor.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    source = Safetensors(folder)
    return {name: source.shape(name) for name in source.names()}


def read(
    source: Rows, entries: dict[str, ShardedTensor | ShardedTensorFactory]
) -> Iterator[tuple[str, torch.Tensor]]:
    """For each entry, this rank's part in the entry's dtype."""

    def part(tensor: ShardedTensor) -> torch.Tensor:
        ends = zip(tensor.global_offset, tensor.local_shape, strict=True)
        block = tuple(slice(start, start + size) for start, size in ends)
        return source.read_block(tensor.key, block).to(tensor.data.dtype)

    for name, entry in entries.items():
        if isinstance(entry, ShardedTensorFactory):  # gate and up, each cut by itself
            yield name, entry.merge_fn(dict_list_map_outplace(part, entry.build()))
        else:
            yield name, part(entry)
