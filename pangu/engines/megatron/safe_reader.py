"""Reading checkpoints that a stranger may have written: no byte of them is executed.

A checkpoint in megatron-core's distributed format holds three kinds of pickles. The tensors, and
the random states, are read by torch.load(weights_only=True), which builds tensors and plain
containers and nothing else. `common.pt` is always empty and never opened. `.metadata`, the list of
all tensors, goes through an unpickler that knows sixteen names, makes plain records of them, and
calls nothing but int, str and tuple; what comes out is checked before torch's own classes are
filled with it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

METADATA = ".metadata"
_FORMAT = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_FORMAT}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    ),
    f"{_FORMAT}.filesystem": ("_StorageInfo",),
    # What each rank had planned to write; nobody reads it.
    f"{_FORMAT}.planner": ("SavePlan", "TensorWriteData", "WriteItem"),
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values()
           if isinstance(dtype, torch.dtype)}  # fmt: skip


class Unreadable(Exception):
    """A file that does not hold what it should; the message says which and why."""


class _Record:
    """An object of the file: its fields as they stand there, and no behaviour."""

    fields: Any = None

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields


def _member(kind: Any, name: str) -> str:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 name an enumeration's member."""
    return name


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        # Made anew for each file: a file can set attributes of the classes that it names.
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (_Record,), {})
            for module, names in _RECORDS.items()
            for name in names
        }
        self._known |= {("torch", name): dtype for name, dtype in _DTYPES.items()}
        self._known |= {
            ("torch", "Size"): tuple,
            ("torch.serialization", "_get_layout"): str,
            (f"{_FORMAT}.metadata", "_MEM_FORMAT_ENCODING"): int,
            (f"{_FORMAT}.planner", "WriteItemType"): int,
            ("builtins", "getattr"): _member,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a list of tensors has no use for"
            )
        return self._known[module, name]


def read_metadata(folder: Path) -> Metadata:
    """The list of all tensors of a checkpoint, and where in its files they are.

    Raises:
        Unreadable: it cannot be read, asks for what has no business there, or names files or
            places that the checkpoint does not have.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            return _metadata(_Unpickler(file).load(), folder)
    except OSError as error:
        raise Unreadable(f"{METADATA} cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever a broken pickle makes of itself
        raise Unreadable(f"{METADATA} is no list of tensors ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """What a library says is wrong, in a piece of a line."""
    text = " ".join(str(error).split("\n")[0].split())[:200]
    if text.startswith("Weights only load failed"):  # torch goes on with how to load it unsafely
        return "it holds something else than tensors"
    return text or type(error).__name__


def shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name."""
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_object(folder: Path, name: str) -> Any:
    """An entry that is no tensor: containers of tensors, numbers and text.

    Raises:
        Unreadable: it is missing, or holds anything else.
    """
    place = read_metadata(folder).storage_data.get(MetadataIndex(name))
    if place is None:
        raise Unreadable(f"{name} is missing")
    try:
        with (folder / place.relative_path).open("rb") as file:
            part = FileSystemReader(folder)._slice_file(file, place)
            return torch.load(part, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken archive makes torch raise
        raise Unreadable(f"{name} cannot be read ({reason(error)})") from None


class SafeReader(FileSystemReader):
    """Reads tensors for megatron-core; in the place of its own, which unpickles."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:  # the planner would unpickle it
                raise pickle.UnpicklingError(f"{item.storage_index.fqn} is no tensor")
        return super().read_data(plan, planner)


class NoCommonState(LoadCommonStrategy):
    """In the place of the engine's reading of `common.pt`, which is empty in our checkpoints."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Never asked for: the engine's strategy for tensors handles what is sharded."""
        raise NotImplementedError

    def check_backend_compatibility(self, loaded_version: Any) -> None:
        """Any: the file is not opened."""

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """Any: the file is not opened."""


def replace_reader(holder: Any, name: str) -> None:
    """Let whatever of megatron-core reads a checkpoint read it through `SafeReader`.

    Raises:
        LookupError: the engine no longer asks the function `name` of `holder` for its reader.
    """
    strategy = holder.TorchDistLoadShardedStrategy
    for method in (strategy.load, strategy.load_tensors_metadata, strategy.load_sharded_metadata):
        if name not in method.__code__.co_names:
            raise LookupError(f"megatron-core's {method.__qualname__} no longer uses {name}")
    setattr(holder, name, lambda folder, cache_metadata=False: SafeReader(folder))


def _metadata(top: _Record, folder: Path) -> Metadata:
    fields = _fields(top, "Metadata")
    entries: dict[str, Any] = {}
    for name, entry in _checked(fields["state_dict_metadata"], dict).items():
        is_tensor = type(entry).__name__ == "TensorStorageMetadata"
        entries[_checked(name, str)] = _tensor(entry) if is_tensor else _object(entry)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    stored = _checked(fields["storage_data"], dict).items()
    places = {_index(index): _place(place, sizes) for index, place in stored}
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise ValueError(f"{type(record).__name__} in the place of {kind}")
    return _checked(record.fields, dict)


def _checked(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} in the place of {kind.__name__}")
    return value


def _size(value: Any) -> torch.Size:
    if any(
        number < 0 or number >= 1 << 48
        for number in (_checked(n, int) for n in _checked(value, tuple))
    ):
        raise ValueError(f"{value} is no shape")
    return torch.Size(value)


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _fields(record, "TensorStorageMetadata")
    size = _size(fields["size"])
    properties = fields["properties"]
    if type(properties).__name__ != "TensorProperties" or not isinstance(properties, _Record):
        raise ValueError("a tensor has no properties")
    dtype, layout, *_ = _checked(properties.fields, tuple)
    if not isinstance(dtype, torch.dtype) or layout != str(torch.strided):
        raise ValueError(f"a tensor of {dtype}, {layout}")
    chunks = []
    for chunk in _checked(fields["chunks"], list):
        of = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(of["offsets"]), _size(of["sizes"])
        if not len(offsets) == len(sizes) == len(size) or any(
            begin + length > whole
            for begin, length, whole in zip(offsets, sizes, size, strict=True)
        ):
            raise ValueError(f"a part at {tuple(offsets)} of {tuple(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _object(record: Any) -> BytesStorageMetadata:
    if not isinstance(record, _Record) or type(record).__name__ != "BytesStorageMetadata":
        raise ValueError(f"{type(record).__name__} in the place of a tensor")
    return BytesStorageMetadata()


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_checked(fields["fqn"], str), None if offset is None else _size(offset))


def _place(record: Any, sizes: dict[str, int]) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    name = _checked(fields["relative_path"], str)
    offset, length = _checked(fields["offset"], int), _checked(fields["length"], int)
    if name not in sizes:
        raise ValueError(f"there is no file {name}")
    if offset < 0 or length < 0 or offset + length > sizes[name]:
        raise ValueError(f"{name} has no bytes {offset} to {offset + length}")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed")
    return _StorageInfo(name, offset, length)
