"""Keys and values of many sequences, in pages; a page may belong to several that begin alike.

Pages of one sequence are handed out side by side where that is possible: attention then reads them
where they lie. Shapes: s = tokens of a pass, g = KV heads, d = head size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

_EVICTED_AT_ONCE = 16  # free pages that lie side by side are worth more than single ones


class OutOfPages(Exception):
    """Every page is in use."""


class PagePool:
    """Which pages are in use, free, or kept for a sequence that begins as an earlier one did."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.count, self.page_size = pages, page_size
        self._users = np.zeros(pages, dtype=np.int32)
        self._free = np.ones(pages, dtype=bool)
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # named, unused; the oldest first

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return int(self._free.sum()) + len(self._kept)

    @property
    def used(self) -> int:
        return self.count - self.available

    def take(self, after: int | None) -> int:
        """A page of its own for a sequence whose last page is `after`.

        Raises:
            OutOfPages
        """
        if not self._free.any():
            self._evict()
        beside = -1 if after is None else after + 1
        page = beside if 0 <= beside < self.count and self._free[beside] else self._in_widest_gap()
        self._free[page] = False
        self._users[page] = 1
        return page

    def _evict(self) -> None:
        if not self._kept:
            raise OutOfPages
        for _ in range(min(_EVICTED_AT_ONCE, len(self._kept))):
            page, _ = self._kept.popitem(last=False)
            self._unname(page)
            self._free[page] = True

    def _unname(self, page: int) -> None:
        del self._page_of[self._name_of.pop(page)]

    def _in_widest_gap(self) -> int:
        """The middle of the widest gap: the sequence before it can grow, and so can the new one."""
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        widest = int((ends - starts).argmax())
        start, end = int(starts[widest]), int(ends[widest])
        return start if start == 0 else (start + end) // 2

    def release(self, pages: Sequence[int]) -> None:
        """A sequence's pages, in its order. Named ones are kept until their room is needed, the
        last first: a page is of no use without those before it."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._name_of:
                    self._kept[page] = None
                else:
                    self._free[page] = True

    def name(self, page: int, name: bytes) -> None:
        """Let later sequences find a full page."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name], self._name_of[page] = page, name

    def share(self, name: bytes) -> int | None:
        """The page of that name for one more user, if there is one."""
        page = self._page_of.get(name)
        if page is not None:
            self._users[page] += 1
            self._kept.pop(page, None)
        return page

    def forget(self) -> None:
        """Let nothing be found any more: the model's weights have changed."""
        for page in list(self._name_of):
            self._unname(page)
        for page in self._kept:
            self._free[page] = True
        self._kept.clear()


def page_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page: of its tokens and all before them."""
    return hashlib.sha256(before + np.asarray(tokens, dtype=np.int64).tobytes()).digest()


@dataclass
class KeyValues:
    """What every layer keeps of a token: keys and values, or the latents that both are made of,
    `[g, slots, d]` each, made when a layer first writes."""

    slots: int
    layers: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def of(self, layer: int, *made: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A layer's stores for tensors `[s, 1, g, d]` such as these."""
        if layer not in self.layers:
            self.layers[layer] = tuple(
                each.new_zeros(each.size(2), self.slots, each.size(3)) for each in made
            )
        return self.layers[layer]

    @property
    def bytes_per_token(self) -> int:
        """In all layers that have written, on this rank."""
        stores = [store for layer in self.layers.values() for store in layer]
        return sum(store[:, 0].numel() * store.element_size() for store in stores)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy what lies in some slots to others, in every layer."""
        for stores in self.layers.values():
            for store in stores:
                store[:, targets] = store[:, sources]
