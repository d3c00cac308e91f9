"""One pass of the model over tokens of several sequences: where their keys and values go, and what
each token sees.

Sequences of which a pass has a few tokens attend together, those of about the same length in one
call. How far its keys are filled up for that follows from a sequence's own length: its numbers do
not depend on who else is there.

Shapes: s = tokens of a pass, n = heads, g = KV heads, d = head size; of what attends together, b =
sequences, c = tokens of each in the pass, t = keys of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pangu import backends
from pangu.inference import tree
from pangu.inference.cache import KeyValues
from pangu.ops.attention import attention, attention_of_few, attention_of_one

_FEW = 16  # tokens of a sequence in a pass
_NEAR = 32  # keys are filled up to a multiple of it
_SHORT = 256  # more keys are read where they lie: to copy them takes longer than a call of its own


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

    @property
    def length(self) -> int:
        """Tokens of the sequence, those of the pass among them."""
        return self.start + self.count

    def positions(self) -> list[int]:
        """`[count]`"""
        certain = self.length - len(self.parents)
        guessed = [certain - 1 + depth for depth in tree.depths(self.parents)]
        return [*range(self.start, certain), *guessed]

    def slots(self, page_size: int) -> list[int]:
        """`[count]`: where its tokens lie in the cache."""
        return [
            self.pages[at // page_size] * page_size + at % page_size
            for at in range(self.start, self.length)
        ]

    def place(self, page_size: int) -> slice | torch.Tensor:
        """Where all tokens of its sequence lie: in place if their pages are side by side."""
        pages = np.asarray(self.pages[: -(-self.length // page_size)])
        if len(pages) == 1 or (np.diff(pages) == 1).all():
            start = int(pages[0]) * page_size
            return slice(start, start + self.length)
        slots = pages[:, None] * page_size + np.arange(page_size)
        return torch.from_numpy(slots.ravel()[: self.length])

    def seen(self) -> torch.Tensor | None:
        """What each token sees of its sequence, bool `[count, start + count]`; None: all that
        comes before it."""
        if not self.parents:
            return None
        nodes = len(self.parents)
        mask = torch.ones(self.count, self.length, dtype=torch.bool).tril(self.start)
        mask[-nodes:, -nodes:] = tree.seen(self.parents)
        return mask


class _Together:
    """Segments of one pass that attend in one call: `c` tokens each, over `t` keys. What fills them
    up is a sequence's first key, unseen there: others may have left NaN in its last page."""

    def __init__(self, members: Sequence[tuple[Segment, int]], t: int, page_size: int) -> None:
        """`members`: segments, and where in the pass each begins."""
        device, c = backends.current().device, members[0][0].count
        self.shape = (len(members), t)
        lengths = np.array([each.length for each, _ in members])
        at = np.arange(t) * (np.arange(t) < lengths[:, None])  # its first key fills up
        most = max(len(each.pages) for each, _ in members)
        table = np.array([[*each.pages, *[0] * (most - len(each.pages))] for each, _ in members])
        slots = np.take_along_axis(table, at // page_size, axis=1) * page_size + at % page_size
        self._slots = torch.from_numpy(slots.ravel()).to(device)
        rows = np.array([first for _, first in members])[:, None] + np.arange(c)
        self.rows = torch.from_numpy(rows).to(device)  # [b, c], of the pass
        last = torch.tensor([each.start for each, _ in members])[:, None] + torch.arange(c)
        seen = torch.arange(t) <= last[:, :, None]
        for mask, (segment, _) in zip(seen, members, strict=True):
            if segment.parents:
                mask[:, : segment.length] = segment.seen()
        self._seen = seen[:, None].to(device)
        self._bias: torch.Tensor | None = None

    def bias(self, like: torch.Tensor) -> torch.Tensor:
        """`[b, 1, c, t]`, made once for all layers: 0 for what a query sees, -inf for the rest."""
        if self._bias is None or self._bias.dtype != like.dtype:
            zeros = torch.zeros_like(self._seen, dtype=like.dtype)
            self._bias = zeros.masked_fill_(~self._seen, float("-inf"))
        return self._bias

    def of(self, store: torch.Tensor) -> torch.Tensor:
        """A store `[g, slots, d]` → what these sequences keep in it, `[b, g, t, d]`."""
        return store.index_select(1, self._slots).unflatten(1, self.shape).transpose(0, 1)


class CachedPass:
    """The segments of one pass of the model, which it is given in place of an attention mask."""

    def __init__(
        self, store: KeyValues, page_size: int, segments: Sequence[Segment], rows: Sequence[int]
    ) -> None:
        self._store = store
        device = backends.current().device
        self.hidden: torch.Tensor | None = None
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None

        def joined(lists: Iterable[Sequence[int]]) -> torch.Tensor:
            return torch.tensor([i for each in lists for i in each], dtype=torch.long).to(device)

        self.rows = joined([rows])
        self.positions = joined(each.positions() for each in segments)
        self._written = joined(each.slots(page_size) for each in segments)
        self._alone: list[tuple[int, Segment, slice | torch.Tensor, torch.Tensor | None]] = []
        groups: dict[tuple[int, int], list[tuple[Segment, int]]] = {}
        first = 0
        for each in segments:
            if each.count <= _FEW and each.length <= _SHORT:
                key = (each.count, -(-each.length // _NEAR) * _NEAR)
                groups.setdefault(key, []).append((each, first))
            else:
                place, seen = each.place(page_size), each.seen()
                place = place.to(device) if isinstance(place, torch.Tensor) else place
                seen = seen.to(device) if seen is not None else None
                self._alone.append((first, each, place, seen))
            first += each.count
        self._together = [_Together(group, t, page_size) for (_, t), group in groups.items()]

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
        out = query.new_zeros(*query.shape[:3], values.size(2))
        for group in self._together:
            whole = group.rows.numel() == len(query)
            held = group.of(keys)
            held_values = held if values is keys else group.of(values)
            part = (
                query.reshape(*group.rows.shape, *query.shape[2:])
                if whole
                else query[group.rows, 0]
            )
            part = attention_of_few(part, held, held_values, group.bias(query), scale=scale)
            if whole:
                return part.flatten(0, 1)[:, None]
            out[group.rows, 0] = part
        for first, segment, place, seen in self._alone:
            rows = slice(first, first + segment.count)
            held_keys, held_values = keys[:, place], values[:, place]
            if segment.count == 1:
                out[rows] = attention_of_one(query[rows], held_keys, held_values, scale=scale)
            else:
                seq_first = (
                    held_keys.transpose(0, 1)[:, None],
                    held_values.transpose(0, 1)[:, None],
                )
                out[rows] = attention(query[rows], *seq_first, scale=scale, seen=seen)
        return out


def nothing_cached() -> CachedPass:
    """A pass of no segments: it keeps nothing, and its tokens see nothing."""
    return CachedPass(KeyValues(0), 1, [], [])
