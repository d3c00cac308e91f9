"""The weight gradients of a grouped product, added to float32 sums.

Shapes: N rows, E groups, I input width, O output width.

A program owns a block of one group's matrix: it goes through the rows of its group, whose ends it
reads on the device, and adds what comes out once, so that no order of programs changes a sum. The
grid follows from the widths and the number of groups alone: nothing waits for the counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

BLOCK = 128  # of the matrix, each way
WIDENED = knobs.runtime.interpret  # Triton's interpreter multiplies the bits of a bfloat16


@triton.jit
def _weight_gradient_add(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    total_ptr: tl.tensor,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    widened: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    group = tl.program_id(1)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    if start < end:
        across = tl.cdiv(outputs, BLOCK)
        i = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
        o = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in range(start, end, ROWS):
            row = first + tl.arange(0, ROWS)
            present = (row < end)[:, None]
            place = row.to(tl.int64)[:, None]
            taken = present & (i < inputs)[None, :]
            x = tl.load(x_ptr + place * inputs + i[None, :], mask=taken, other=0.0)
            taken = present & (o < outputs)[None, :]
            y = tl.load(y_ptr + place * outputs + o[None, :], mask=taken, other=0.0)
            if widened:
                x, y = x.to(tl.float32), y.to(tl.float32)
            sums = tl.dot(tl.trans(x), y, sums, input_precision="ieee")
        inside = (i < inputs)[:, None] & (o < outputs)[None, :]
        place = group.to(tl.int64) * inputs * outputs + i[:, None] * outputs + o[None, :]
        sums += tl.load(total_ptr + place, mask=inside, other=0.0)
        tl.store(total_ptr + place, sums, mask=inside)


def add_weight_gradient(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> None:
    """xᵀ·y of each group, added to `total` (float32, contiguous). x and y: float32 or halves."""
    groups, inputs, outputs = total_EIO.shape
    if not total_EIO.numel() or not x_NI.size(0):
        return
    ends_E = counts_E.to(total_EIO.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    rows = 128 // x_NI.element_size()  # as many bytes of each
    grid = (triton.cdiv(inputs, BLOCK) * triton.cdiv(outputs, BLOCK), groups)
    given = (x_NI.contiguous(), y_NO.contiguous(), ends_E, total_EIO)
    sizes = (inputs, outputs, WIDENED, rows, BLOCK)
    _weight_gradient_add[grid](*given, *sizes, num_warps=8, num_stages=3)
