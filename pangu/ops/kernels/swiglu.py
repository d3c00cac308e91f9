"""SwiGLU times a weight per row, and its gradient with the weights' own, each in one pass.

Shapes: N rows, F width of the gate and of the up projection.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 4096  # elements that a program has in flight: 32 for each of 128 threads


@triton.jit
def _swiglu_forward(
    x_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    weighted: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    row = row.to(tl.int64)
    place = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + place + width, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if weighted:
        weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        y *= weight[:, None]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y, mask=inside)


@triton.jit
def _swiglu_backward(
    x_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_weights_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    weighted: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Whole rows, so that the sum over a row, the gradient of its weight, stays in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    row = row.to(tl.int64)
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if weighted:
        weight = tl.load(weights_ptr + row, mask=present, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = present[:, None] & (column < width)[None, :]
        place = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + place + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        if weighted:
            grad_weight += tl.sum(grad * silu * up, axis=1)
            grad *= weight[:, None]
        grad_gate = grad * up * sigmoid * (1.0 + gate - silu)
        tl.store(grad_x_ptr + place, grad_gate, mask=inside)
        tl.store(grad_x_ptr + place + width, grad * silu, mask=inside)
    if weighted:
        tl.store(grad_weights_ptr + row, grad_weight, mask=present)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    columns = min(triton.next_power_of_2(width), 1024)
    return max(1, TILE // columns), columns


class _Swiglu(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x_NG: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_NG, weights_N)
        rows, width = x_NG.size(0), x_NG.size(1) // 2
        y_NF = x_NG.new_empty(rows, width)
        size, columns = _tile(width)
        grid = (triton.cdiv(rows, size), triton.cdiv(width, columns))
        if rows:
            weighted = weights_N is not None
            _swiglu_forward[grid](x_NG, weights_N, y_NF, rows, width, weighted, size, columns)
        return y_NF

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_NG, weights_N = ctx.saved_tensors
        grad_NF, rows = grads[0].contiguous(), x_NG.size(0)
        width = x_NG.size(1) // 2
        grad_x = torch.empty_like(x_NG)
        grad_weights = None if weights_N is None else torch.empty_like(weights_N)
        size, columns = _tile(width)
        grid = (triton.cdiv(rows, size),)
        if rows:
            given = (x_NG, weights_N, grad_NF, grad_x, grad_weights)
            _swiglu_backward[grid](*given, rows, width, weights_N is not None, size, columns)
        return grad_x, grad_weights


def swiglu(x_NG: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    """`[N, 2F]` and `[N]` → `[N, F]` in x's dtype, computed in float32 and rounded once; without
    weights of any shape `[..., 2F]`."""
    weights_N = None if weights_N is None else weights_N.contiguous()
    rows = x_NG.reshape(-1, x_NG.size(-1)).contiguous()
    return _Swiglu.apply(rows, weights_N).view(*x_NG.shape[:-1], x_NG.size(-1) // 2)
