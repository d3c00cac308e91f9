"""Matrix products whose every row is summed up in one order, however many rows there are: tiles of
one size, and no splitting of the depth among programs.

Shapes: N rows, E groups of consecutive rows, I input width, O output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, DEPTH = 16, 64, 32


@triton.jit
def _rows_product(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    row_ends_ptr: tl.tensor,
    tile_ends_ptr: tl.tensor,
    groups: tl.tensor,
    depth: tl.tensor,
    columns: tl.tensor,
    x_row: tl.tensor,
    x_depth: tl.tensor,
    w_group: tl.tensor,
    w_depth: tl.tensor,
    w_column: tl.tensor,
    wide: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A program has up to `ROWS` rows of one group: which, follows from how many tiles the groups
    before it have."""
    tile = tl.program_id(0)
    every = tl.arange(0, GROUPS)
    tile_ends = tl.load(tile_ends_ptr + every, mask=every < groups, other=0)
    group = tl.sum(((tile_ends <= tile) & (every < groups)).to(tl.int32))
    if group < groups:
        before = tl.maximum(group - 1, 0)
        first_tile = tl.where(group > 0, tl.load(tile_ends_ptr + before), 0)
        first_row = tl.where(group > 0, tl.load(row_ends_ptr + before), 0)
        row = first_row + (tile - first_tile) * ROWS + tl.arange(0, ROWS)
        row, present = row.to(tl.int64), row < tl.load(row_ends_ptr + group)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        w_ptr += group.to(tl.int64) * w_group
        total = tl.zeros((ROWS, COLUMNS), tl.float64 if wide else tl.float32)
        for first in range(0, depth, DEPTH):
            at = first + tl.arange(0, DEPTH)
            x = tl.load(
                x_ptr + row[:, None] * x_row + at[None, :] * x_depth,
                mask=present[:, None] & (at < depth)[None, :],
                other=0.0,
            )
            w = tl.load(
                w_ptr + at.to(tl.int64)[:, None] * w_depth + column[None, :] * w_column,
                mask=(at < depth)[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            total = tl.dot(x, w, total, input_precision="ieee", out_dtype=total.dtype)
        inside = present[:, None] & (column < columns)[None, :]
        tl.store(y_ptr + row[:, None] * columns + column[None, :], total, mask=inside)


def grouped(x_NI: torch.Tensor, w_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """`[N, O]`: each row times its group's weight, in x's dtype, summed in float32 (float64 in
    float64). `counts_E` stay where they are."""
    counts = counts_E.to(device=x_NI.device, dtype=torch.int32)
    tiles = (counts + ROWS - 1) // ROWS
    return _product(x_NI, w_EIO, counts.cumsum(0), tiles.cumsum(0))


def product(x_NI: torch.Tensor, w_IO: torch.Tensor) -> torch.Tensor:
    """`[N, O]`."""
    rows = x_NI.size(0)
    ends = (x_NI.new_full((1,), n, dtype=torch.int32) for n in (rows, triton.cdiv(rows, ROWS)))
    return _product(x_NI, w_IO[None], *ends)


def batched(x_ENI: torch.Tensor, w_EIO: torch.Tensor) -> torch.Tensor:
    """`[E, N, O]`."""
    groups, rows = x_ENI.shape[:2]
    number = torch.arange(1, groups + 1, device=x_ENI.device, dtype=torch.int32)
    ends = (number * rows, number * triton.cdiv(rows, ROWS))
    return _product(x_ENI.flatten(0, 1), w_EIO, *ends).view(groups, rows, w_EIO.size(2))


def _product(
    x_NI: torch.Tensor, w_EIO: torch.Tensor, row_ends_E: torch.Tensor, tile_ends_E: torch.Tensor
) -> torch.Tensor:
    """Ends of every group's rows, and of their tiles; integers."""
    rows, groups = x_NI.size(0), w_EIO.size(0)
    y_NO = x_NI.new_empty(rows, w_EIO.size(2))
    if not y_NO.numel():
        return y_NO
    # At most so many tiles: every group may leave one partly empty.
    tiles = triton.cdiv(rows, ROWS) + min(groups, rows) - 1
    _rows_product[(tiles, triton.cdiv(w_EIO.size(2), COLUMNS))](
        x_NI,
        w_EIO,
        y_NO,
        row_ends_E.to(torch.int32),
        tile_ends_E.to(torch.int32),
        groups,
        w_EIO.size(1),
        w_EIO.size(2),
        *x_NI.stride(),
        *w_EIO.stride(),
        x_NI.dtype == torch.float64,
        triton.next_power_of_2(groups),
        ROWS,
        COLUMNS,
        DEPTH,
    )
    return y_NO
