"""Files of `engine.offload=nvme`: what DeepSpeed reads and writes them with, behind its back.

DeepSpeed's own operator for that is C++, which every installation would compile for minutes and
with libaio's headers, each rank waiting for the first. Here threads wait for the drive, each in a
system call that leaves the interpreter to others, and past the page cache where the file system
takes that: memory is what is to be saved.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch

from pangu import backends

# Memory that begins with a page, as direct transfers want it, by its address.
_rooms: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


class Handle:
    """DeepSpeed's `aio_handle`: whole tensors on their way to files and back.

    `block_size` bytes go at a time, `queue_depth` of them at once; the other two are libaio's.
    """

    def __init__(
        self,
        block_size: int = 2**20,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        intra_op_parallelism: int = 1,
    ) -> None:
        self.block_size = block_size
        self.threads = ThreadPoolExecutor(queue_depth, "files")
        self.under_way: list[list[Future[None]]] = []

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        """Begin to fill a contiguous tensor from a file; 0."""
        return self._begin(os.preadv, os.O_RDONLY, buffer, path, offset)

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        """Begin to write one; 0."""
        return self._begin(os.pwritev, os.O_WRONLY | os.O_CREAT, buffer, path, offset)

    def wait(self) -> int:
        """How many tensors have arrived since the last time; all that were begun.

        Raises:
            OSError: one has not.
        """
        under_way, self.under_way = self.under_way, []
        for tensor in under_way:
            for piece in tensor:
                piece.result()
        return len(under_way)

    def new_cpu_locked_tensor(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        """`[elements]` of the type of `like`, from and to which tensors may be transferred."""
        if backends.current().asynchronous:  # pinned, for the device's own transfers
            return torch.empty(elements, dtype=like.dtype, pin_memory=True)
        size = max(1, elements) * like.element_size()
        room = mmap.mmap(-1, size)
        tensor = torch.frombuffer(room, dtype=torch.uint8).view(like.dtype)[:elements]
        _rooms[tensor.untyped_storage().data_ptr()] = room
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Nothing to do: it goes with its last view."""
        return self.is_pinned(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether it is, or is a part of, what `new_cpu_locked_tensor` gave."""
        return tensor.is_pinned() or tensor.untyped_storage().data_ptr() in _rooms

    def _begin(
        self, call: Callable[..., int], flags: int, buffer: torch.Tensor, path: str, offset: int
    ) -> int:
        whole = buffer.detach().view(-1).view(torch.uint8).numpy().data
        starts = range(0, len(whole), self.block_size)
        pieces = ((whole[start : start + self.block_size], offset + start) for start in starts)
        self.under_way.append(
            [self.threads.submit(_transfer, call, flags, path, *piece) for piece in pieces]
        )
        return 0


def _transfer(
    call: Callable[..., int], flags: int, path: str, piece: memoryview, offset: int
) -> None:
    """All of a piece; past the page cache first, which tmpfs and odd sizes do not allow."""
    for direct in (getattr(os, "O_DIRECT", 0), 0):
        try:
            descriptor = os.open(path, flags | direct, 0o600)
            try:
                done = 0
                while done < len(piece):
                    moved = call(descriptor, [piece[done:]], offset + done)
                    if not moved:
                        raise OSError(errno.EIO, "the file ends too early", path)
                    done += moved
            finally:
                os.close(descriptor)
            return
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise OSError(error.errno, error.strerror, path) from None


def install() -> None:
    """Give this to DeepSpeed in the place of what it would compile."""
    from deepspeed.ops.op_builder import builder, pin_memory_load

    ours: dict[str, Any] = {"async_io": SimpleNamespace(aio_handle=Handle)}
    ours["pin_memory"] = SimpleNamespace()  # that the other would ask for pages
    builder.OpBuilder._loaded_ops |= ours
    setattr(sys, pin_memory_load._SYS_CACHE_ATTR, ours["pin_memory"])
