"""Keys and values of many sequences, in pages; a page may belong to several that begin alike.

Pages of one sequence are handed out side by side where that is possible: attention then reads them
where they lie. Shapes: s = tokens of a pass, n = heads, g = KV heads, d = head size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pangu import backends
from pangu.inference import tree
from pangu.ops.attention import attention, attention_of_one

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
class Segment:
    """Tokens of one sequence in a pass: positions `start` to `start + count`, in `pages`.

    With `parents`, the last of them are a tree of guesses (`pangu.inference.tree`), which lie in
    the cache one after the other and stand at the positions of their depths.
    """

    start: int
    count: int
    pages: Sequence[int]
    parents: Sequence[int] = ()

    def positions(self) -> torch.Tensor:
        """`[count]`"""
        found = torch.arange(self.start, self.start + self.count)
        if self.parents:
            root = self.start + self.count - len(self.parents) - 1
            found[-len(self.parents) :] = root + torch.tensor(tree.depths(self.parents))
        return found

    def seen(self) -> torch.Tensor | None:
        """What each token sees of its sequence, bool `[count, start + count]`; None: all that
        comes before it."""
        if not self.parents:
            return None
        nodes, length = len(self.parents), self.start + self.count
        mask = torch.ones(self.count, length, dtype=torch.bool).tril(self.start)
        mask[-nodes:, -nodes:] = tree.seen(self.parents)
        return mask


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


class CachedPass:
    """The segments of one pass of the model, which it is given in place of an attention mask."""

    def __init__(
        self, store: KeyValues, page_size: int, segments: Sequence[Segment], rows: Sequence[int]
    ) -> None:
        self._store = store
        self._segments = segments
        device = backends.current().device
        self.hidden: torch.Tensor | None = None
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        none = torch.empty(0, dtype=torch.long)
        self.positions = torch.cat([none, *(each.positions() for each in segments)]).to(device)
        masks = [segment.seen() for segment in segments]
        self._seen = [mask.to(device) if mask is not None else None for mask in masks]
        places = [_places(segment, page_size) for segment in segments]
        written = [
            place[-segment.count :]
            if isinstance(place, torch.Tensor)
            else torch.arange(place.stop - segment.count, place.stop)
            for segment, place in zip(segments, places, strict=True)
        ]
        self._written = torch.cat([none, *written]).to(device)
        self._places = [p.to(device) if isinstance(p, torch.Tensor) else p for p in places]

    def turns(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines whose first half is negative, `[s, 1, 1, 1, d]`, of rotary angles
        `[s, 1, 1, d]`; the same for all layers."""
        if self._turns is None or len(self._turns[0]) != len(angles):
            half = angles.size(-1) // 2
            sin = angles.sin()
            sin[..., :half].neg_()
            self._turns = (angles.cos().to(dtype)[:, None], sin.to(dtype)[:, None])
        return self._turns

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """query `[s, 1, n, d]`, key `[s, 1, g, d]`, value `[s, 1, g, dv]` → `[s, 1, n, dv]`; what
        fills the pass up behind its segments is not kept and attends to nothing."""
        keys, values = self._kept(layer, key, value)
        return self._attended(query, keys, values, scale)

    def attend_latents(
        self, layer: int, query: torch.Tensor, latents: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The same for MLA: query `[s, 1, n, d]`; latents `[s, 1, 1, d]`, which are kept alone, are
        the keys and the values of all heads → `[s, 1, n, d]`."""
        (store,) = self._kept(layer, latents)
        return self._attended(query, store, store, scale)

    def _kept(self, layer: int, *made: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A layer's stores, once they have what the pass has made of its tokens."""
        stores = self._store.of(layer, *made)
        for store, new in zip(stores, made, strict=True):
            tokens = self._written.numel()
            store.index_copy_(1, self._written, new[:tokens, 0].transpose(0, 1))
        return stores

    def _attended(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        filling = query.size(0) - self._written.numel()
        parts, first = [], 0
        for segment, place, seen in zip(self._segments, self._places, self._seen, strict=True):
            held_keys, held_values = keys[:, place], values[:, place]
            part = query[first : first + segment.count]
            if segment.count == 1:
                parts.append(attention_of_one(part, held_keys, held_values, scale=scale))
            else:
                seq_first = (
                    held_keys.transpose(0, 1)[:, None],
                    held_values.transpose(0, 1)[:, None],
                )
                parts.append(attention(part, *seq_first, scale=scale, seen=seen))
            first += segment.count
        if filling:
            parts.append(query.new_zeros(filling, *query.shape[1:3], values.size(2)))
        return torch.cat(parts)


def nothing_cached() -> CachedPass:
    """A pass of no segments: it keeps nothing, and its tokens see nothing."""
    return CachedPass(KeyValues(0), 1, [], [])


def _places(segment: Segment, page_size: int) -> slice | torch.Tensor:
    """Where all tokens of the segment's sequence lie: in place if their pages are side by side."""
    length = segment.start + segment.count
    pages = np.asarray(segment.pages[: -(-length // page_size)])
    if len(pages) == 1 or (np.diff(pages) == 1).all():
        start = int(pages[0]) * page_size
        return slice(start, start + length)
    slots = pages[:, None] * page_size + np.arange(page_size)
    return torch.from_numpy(slots.ravel()[:length])
