"""Where tensors are read from, one at a time: safetensors files and their index.

Reading needs the memory of one tensor, whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pangu.checkpoint import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Source(Protocol):
    """Named tensors, read when asked for."""

    def names(self) -> Iterable[str]:
        """The name of every tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in its stored dtype, on the host.

        Raises:
            WeightsError: its file is damaged.
        """


class Rows(Source, Protocol):
    """Tensors of which parts can be read."""

    folder: Path

    def read_block(self, name: str, block: tuple[slice, ...]) -> torch.Tensor:
        """The part of a tensor that `block` names, without reading the rest.

        Raises:
            WeightsError: its file is damaged.
        """


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        WeightsError: it is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return value


class Safetensors:
    """A folder with `model.safetensors`, or with shards and their index.

    Raises:
        WeightsError: a shard is missing or damaged, or the index and the shards disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            self._file_of = _read_index(folder)
        elif (folder / SINGLE).is_file():
            with _open(folder / SINGLE) as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}")
        self._check_shards()

    def _check_shards(self) -> None:
        for name in sorted(set(self._file_of.values())):
            if not (self.folder / name).is_file():
                raise WeightsError(f"{self.folder / INDEX} names {name}, which is missing")
            with _open(self.folder / name) as file:
                held = set(file.keys())
            listed = {key for key, where in self._file_of.items() if where == name}
            if held != listed:
                odd = sorted(held ^ listed)[0]
                raise WeightsError(f"{self.folder / name} and the index disagree about {odd}")

    def names(self) -> Iterator[str]:
        """In the order of the index."""
        return iter(self._file_of)

    def files(self) -> set[Path]:
        """Those that hold the tensors."""
        return {self.folder / name for name in self._file_of.values()}

    def shape(self, name: str) -> tuple[int, ...]:
        with _open(self.folder / self._file_of[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        path = self.folder / self._file_of[name]
        with _open(path) as file:
            return file.get_tensor(name)

    def read_block(self, name: str, block: tuple[slice, ...]) -> torch.Tensor:
        """The part of a tensor that `block` names, without reading the rest."""
        with _open(self.folder / self._file_of[name]) as file:
            return file.get_slice(name)[block]


def _read_index(folder: Path) -> dict[str, str]:
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise WeightsError(f"{folder / INDEX} has no weight_map")
    for key, name in table.items():
        # A shard lies in the folder itself: an index may come from a stranger.
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{folder / INDEX} names {name!r} for {key}, which is no file name")
    return table


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is damaged or incomplete: {error}") from None
