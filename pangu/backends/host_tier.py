"""Where a device puts what it will need again later: pinned memory of its host, or, where the
device is the host itself, a file."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from pangu.backends.timeline import timeline


class Parcel(Protocol):
    """Bytes on their way out or back. Both ways begin when they are asked for and run beside
    computing; what is dropped before it is fetched frees its place."""

    def has_left(self) -> bool:
        """Whether the source may be freed."""

    def wait_until_sent(self) -> None: ...

    def fetch(self) -> None:
        """Begin the way back."""

    def arrived(self) -> torch.Tensor:
        """The bytes (uint8 `[n]`) on the device, waited for."""


class HostTier(Protocol):
    """`send` begins to copy a contiguous uint8 tensor `[n]`, which the caller keeps until it has
    left."""

    def send(self, source: torch.Tensor) -> Parcel: ...


class MappedFile:
    """A file without a name in `folder`, mapped into memory part by part."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder if folder.is_dir() else None)  # noqa: SIM115
        self._end = 0

    def place(self, size: int) -> mmap.mmap:
        """`size` bytes more of the file.

        Raises:
            OSError: there is no room for them; who wrote to them would be killed.
        """
        start, unit = self._end, mmap.ALLOCATIONGRANULARITY
        self._end += -(-size // unit) * unit
        os.posix_fallocate(self._file.fileno(), start, self._end - start)
        return mmap.mmap(self._file.fileno(), size, offset=start)


class FileTier(MappedFile):
    """A file whose places are used again; a thread of its own copies. Pages that were written or
    read leave this process's memory at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._worker = ThreadPoolExecutor(1, "swap")

    def place(self, size: int) -> mmap.mmap:
        """`size` bytes of the file."""
        return self._free[size].pop() if self._free[size] else super().place(size)

    def give_back(self, place: mmap.mmap) -> None:
        self._free[len(place)].append(place)

    def send(self, source: torch.Tensor) -> Parcel:
        return _FileParcel(self, source)

    def submit(self, *call: Any) -> Future[Any]:
        return self._worker.submit(*call)


class _FileParcel:
    def __init__(self, tier: FileTier, source: torch.Tensor) -> None:
        self._tier, self._place = tier, tier.place(source.numel())
        self._leaving = tier.submit(_write, self._place, source)
        self._coming: Future[torch.Tensor] | None = None

    def has_left(self) -> bool:
        return self._leaving.done()

    def wait_until_sent(self) -> None:
        self._leaving.result()

    def fetch(self) -> None:
        if self._coming is None:
            self._coming = self._tier.submit(_read, self._place)

    def arrived(self) -> torch.Tensor:
        self.fetch()
        assert self._coming is not None
        return self._coming.result()

    def __del__(self) -> None:  # later copies into the same place queue behind this one's
        self._tier.give_back(self._place)


def _write(place: mmap.mmap, source: torch.Tensor) -> None:
    with timeline.swapping("out"):
        torch.frombuffer(place, dtype=torch.uint8).copy_(source)
        place.madvise(mmap.MADV_DONTNEED)  # the file keeps them


def _read(place: mmap.mmap) -> torch.Tensor:
    with timeline.swapping("back"):
        found = torch.frombuffer(place, dtype=torch.uint8).clone()
        place.madvise(mmap.MADV_DONTNEED)
        return found


class PinnedTier:
    """Pinned memory of the host, and a stream of its own. `namespace` is `torch.cuda` or
    `torch.npu`. Has run on neither."""

    def __init__(self, namespace: Any) -> None:
        self.namespace = namespace
        self.stream = namespace.Stream()
        self.free: dict[int, list[torch.Tensor]] = defaultdict(list)

    def send(self, source: torch.Tensor) -> Parcel:
        return _PinnedParcel(self, source)

    def place(self, size: int) -> torch.Tensor:
        if self.free[size]:
            return self.free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy, after what the device has to do until now; the event of its end."""
        self.stream.wait_stream(self.namespace.current_stream())
        with self.namespace.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()


class _PinnedParcel:
    def __init__(self, tier: PinnedTier, source: torch.Tensor) -> None:
        self._tier, self._device = tier, source.device
        self._place = tier.place(source.numel())
        self._left = tier.copy(self._place, source)
        self._coming: tuple[torch.Tensor, Any] | None = None

    def has_left(self) -> bool:
        return bool(self._left.query())

    def wait_until_sent(self) -> None:
        self._left.synchronize()

    def fetch(self) -> None:
        if self._coming is None:
            target = torch.empty(self._place.numel(), dtype=torch.uint8, device=self._device)
            self._coming = target, self._tier.copy(target, self._place)

    def arrived(self) -> torch.Tensor:
        self.fetch()
        assert self._coming is not None
        target, event = self._coming
        self._tier.namespace.current_stream().wait_event(event)
        return target

    def __del__(self) -> None:  # copies of one stream keep their order
        self._tier.free[self._place.numel()].append(self._place)
