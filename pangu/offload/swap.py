"""What autograd keeps for the backward pass, out to the host and back ahead of it.

A tensor goes where one of the modules that own it is swapped. Owners are what the simulator counts
(`Saved.dropped_by` and `swapped_by`): who made it, or inside which modules it was saved.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pangu.backends.host_tier import HostTier, Parcel

T = TypeVar("T")
LEAST_BYTES = 1 << 14  # of a storage that is worth the way


class _Away:
    """A storage that is on the host, or on its way. Lives as long as a node of the graph needs it,
    and with it its place there."""

    def __init__(self, tier: HostTier, source: torch.Tensor, before: _Away | None) -> None:
        self.size = source.numel()
        self.source: torch.Tensor | None = source
        self.parcel: Parcel = tier.send(source)
        self._before = weakref.ref(before) if before is not None else None
        self.asked = self.used = False

    def previous(self) -> _Away | None:
        """What was sent before it, if that is still needed."""
        return self._before() if self._before is not None else None


class _View(NamedTuple):
    """A saved tensor: a part of a storage that is away."""

    away: _Away
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, data: torch.Tensor) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=data.device)
        return empty.set_(data.untyped_storage(), self.offset, self.shape, self.stride)


class PerThread(threading.local, Generic[T]):
    """What a pass is inside of; there may be another pass beside it, in a thread of its own."""

    def __init__(self) -> None:
        self.entered: list[T] = []


class Swap:
    """Packs and unpacks what a forward pass saves. At most as many bytes as the largest layer
    swaps are on their way out, and as many on their way back."""

    def __init__(
        self,
        tier: HostTier,
        swapped: Iterable[str],
        recomputed: Iterable[str],
        parameters: Iterable[torch.Tensor],
    ) -> None:
        self.tier = tier
        self.swapped, self.recomputed = frozenset(swapped), frozenset(recomputed)
        self._parameters = {each.untyped_storage()._cdata for each in parameters}
        self._inside: PerThread[str] = PerThread()
        # By storage: a weak reference, which keeps its number from being used again, and a value.
        self._owners: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}
        self._away: dict[int, tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self._leaving: deque[_Away] = deque()
        self._last: weakref.ref[_Away] | None = None
        self._layer = self._window = self._leaving_bytes = self._ahead_bytes = 0

    def begin_layer(self) -> None:
        """From here on bytes are of another layer."""
        self._layer = 0
        for table in (self._owners, self._away):
            for key in [key for key, (storage, _) in table.items() if storage.expired()]:
                del table[key]

    def own(self, tensor: torch.Tensor, *owners: str) -> None:
        """Say whose a tensor is, if nobody has said so before."""
        storage = tensor.untyped_storage()
        known = self._owners.get(storage._cdata)
        if known is None or known[0].expired():
            self._owners[storage._cdata] = StorageWeakRef(storage), frozenset(owners)

    def inside(self, module: str) -> AbstractContextManager[None]:
        """While entered, what is saved is `module`'s ("": nobody's), and others' around it."""
        return _Inside(self, module)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        """What autograd keeps in place of a tensor."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        # A graph that is made within a backward pass, of what is recomputed, is used at once.
        if torch._C._current_graph_task_id() != -1 or number in self._parameters:
            return tensor
        known = self._owners.get(number)
        owners = known[1] if known and not known[0].expired() else frozenset(self._inside.entered)
        small = storage.nbytes() < LEAST_BYTES
        # What is recomputed gives up its storage by itself.
        if small or owners & self.recomputed or not owners & self.swapped:
            return tensor
        away = self._find(number) or self._send(tensor)
        offset = int(tensor.storage_offset())
        return _View(away, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def unpack(self, kept: torch.Tensor | _View) -> torch.Tensor:
        """The tensor; those that were saved before it begin their way back."""
        if isinstance(kept, torch.Tensor):
            return kept
        away = kept.away
        source = away.source
        if source is not None and not away.asked:  # not let go yet
            return kept.of(source)
        while self._leaving and self._leaving[0].parcel.has_left():
            self._let_go(self._leaving.popleft())
        self._ask(away)
        data = away.parcel.arrived()
        if not away.used:
            away.used = True
            self._ahead_bytes -= away.size
        self._ask_ahead(away)
        return kept.of(data)

    def _find(self, number: int) -> _Away | None:
        found = self._away.get(number)
        return found[1]() if found and not found[0].expired() else None

    def _send(self, tensor: torch.Tensor) -> _Away:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._layer += size
        self._window = max(self._window, self._layer)
        while self._leaving and (
            self._leaving[0].parcel.has_left() or self._leaving_bytes + size > self._window
        ):
            self._let_go(self._leaving.popleft())
        everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        before = self._last() if self._last is not None else None
        away = _Away(self.tier, everything.set_(storage), before)
        self._leaving.append(away)
        self._leaving_bytes += size
        self._last = weakref.ref(away)
        self._away[storage._cdata] = StorageWeakRef(storage), self._last
        return away

    def _let_go(self, away: _Away) -> None:
        away.parcel.wait_until_sent()
        away.source = None
        self._leaving_bytes -= away.size

    def _ask(self, away: _Away) -> None:
        if not away.asked:
            away.asked = True
            self._ahead_bytes += away.size
            away.parcel.fetch()

    def _ask_ahead(self, away: _Away) -> None:
        before = away.previous()
        while before is not None and self._ahead_bytes + before.size <= self._window:
            self._ask(before)
            before = before.previous()


class _Inside:
    def __init__(self, swap: Swap, module: str) -> None:
        self.swap, self.module = swap, module
        self.hooks = torch.autograd.graph.saved_tensors_hooks(swap.pack, swap.unpack)

    def __enter__(self) -> None:
        self.swap._inside.entered.append(self.module)
        self.hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self.swap._inside.entered.pop()
