"""Copies of weights in the order in which oneDNN reads them, for a model that decodes.

Where a product has a few rows, half of its time goes into bringing the weight into that order.

Shapes: I input width, O output width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PAYS = 24  # uses; of a product of a few rows, about as many save what a copy takes to make
_ROWS = 32  # oneDNN chooses the order for products of about so many


class PackedWeights:
    """At most `room` bytes of copies, each made when its weight has been used a few times: a short
    answer waits for none. A weight that is changed in place is copied anew; `forget` those that
    were changed behind torch's back (`.data`)."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._uses: dict[tuple[int, torch.Size], int] = {}
        self._copies: dict[tuple[int, torch.Size], tuple[int, torch.Tensor]] = {}

    def of(self, weight_OI: torch.Tensor) -> torch.Tensor | None:
        """The weight's copy; None where there is none (yet)."""
        name, size = (weight_OI.data_ptr(), weight_OI.shape), 4 * weight_OI.numel()
        version, copy = self._copies.get(name, (0, None))
        if copy is not None and version == weight_OI._version:
            return copy
        if copy is not None:
            del self._copies[name], self._uses[name]
            self._room += size
        uses = self._uses[name] = self._uses.get(name, 0) + 1
        if uses < PAYS or size > self._room or weight_OI.dtype != torch.float32:
            return None
        copy = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS)
        self._copies[name] = weight_OI._version, copy
        self._room -= size
        return copy

    def forget(self) -> None:
        """Keep no copy: weights have changed."""
        self._room += sum(4 * shape.numel() for _, shape in self._copies)
        self._uses.clear()
        self._copies.clear()


_current: PackedWeights | None = None


def current() -> PackedWeights | None:
    """Those of the pass under way."""
    return _current


@contextlib.contextmanager
def using(packed: PackedWeights) -> Iterator[None]:
    """Products in here take these copies."""
    global _current
    before, _current = _current, packed
    try:
        yield
    finally:
        _current = before
