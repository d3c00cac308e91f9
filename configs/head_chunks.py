"""Into how many chunks of rows the projection on a whole vocabulary is cut, with its loss."""

from __future__ import annotations

from typing import TypeVar

Rows = TypeVar("Rows")  # an int, or numpy's array of them

# Fewer rows leave a product's tiles, or a core's cache, half used.
LEAST_ROWS = 256


def head_chunks(rows: Rows, width: int) -> Rows:
    """Of `rows` tokens of `width` elements.

    The gradient of the matrix is read and written once for each chunk: with 2 · width rows a
    chunk's logits, at 16 bits, take as much room as that gradient in float32, and the passes over
    it a tenth of the time of the products.
    """
    return -(-rows // max(LEAST_ROWS, 2 * width))  # type: ignore[operator]
