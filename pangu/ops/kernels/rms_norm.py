"""Root-mean-square norm, with a residual added to it, and its gradients in one pass over its input.

Shapes: N rows, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pangu import backends

TILE = 4096
WIDEST = 16384  # a row is in registers as a whole


@triton.jit
def _rms_norm_forward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    rows: tl.tensor,
    epsilon: tl.tensor,
    width: tl.constexpr,
    added: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = row < rows
    inside = present[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + epsilon)
    y = x * inverse[:, None] * weight[None, :]
    if added:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y, mask=inside)
    tl.store(inverse_ptr + row, inverse, mask=present)


@triton.jit
def _rms_norm_backward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Every program goes through rows of its own and leaves the sum of their part in the gain's
    gradient: `[programs, H]`."""
    column = tl.arange(0, COLUMNS)
    within = column < width
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    part = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        present = row < rows
        inside = present[:, None] & within[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=present, other=0.0)[:, None]
        normed = x * inverse
        part += grad * normed
        grad *= weight[None, :]
        mean = tl.sum(grad * normed, axis=1) / width
        tl.store(grad_x_ptr + place, (grad - normed * mean[:, None]) * inverse, mask=inside)
    place = tl.program_id(0) * width + column
    tl.store(parts_ptr + place, tl.sum(part, axis=0), mask=within)


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps."""
    columns = triton.next_power_of_2(width)
    return max(1, TILE // columns), columns, 8 if columns <= TILE else 16


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and a number per row."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: torch.Tensor,
        weight_H: torch.Tensor,
        epsilon: float,
        residual_NH: torch.Tensor | None,
    ) -> torch.Tensor:
        rows, width = x_NH.shape
        y_NH = torch.empty_like(x_NH)
        inverse_N = x_NH.new_empty(rows, dtype=torch.float32)
        size, columns, warps = _tile(width)
        if x_NH.numel():
            sizes = (rows, epsilon, width, residual_NH is not None, size, columns)
            given = (x_NH, weight_H, residual_NH, y_NH, inverse_N)
            _rms_norm_forward[(triton.cdiv(rows, size),)](*given, *sizes, num_warps=warps)
        ctx.save_for_backward(x_NH, weight_H, inverse_N)
        ctx.added = residual_NH is not None
        return y_NH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, weight_H, inverse_N = ctx.saved_tensors
        grad_NH = grads[0].contiguous()
        rows, width = x_NH.shape
        grad_x = torch.empty_like(x_NH)
        size, columns, warps = _tile(width)
        programs = min(triton.cdiv(rows, size), 4 * backends.current().matrix_units)
        parts_PH = x_NH.new_zeros(max(1, programs), width, dtype=torch.float32)
        if x_NH.numel():
            given = (x_NH, weight_H, inverse_N, grad_NH, grad_x, parts_PH)
            _rms_norm_backward[(programs,)](*given, rows, width, size, columns, num_warps=warps)
        grad_weight = parts_PH.sum(dim=0).to(weight_H.dtype)
        return grad_x, grad_weight, None, grads[0] if ctx.added else None


def rms_norm(
    x: torch.Tensor, weight_H: torch.Tensor, epsilon: float, residual: torch.Tensor | None
) -> torch.Tensor:
    """`[..., H]` → the same shape and dtype, plus a residual of that shape and dtype: in float32,
    rounded once."""
    given = None if residual is None else residual.reshape(-1, x.size(-1)).contiguous()
    rows = x.reshape(-1, x.size(-1)).contiguous()
    return _RmsNorm.apply(rows, weight_H.contiguous(), epsilon, given).view(x.shape)
