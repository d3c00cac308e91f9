"""The highest entries of each row, and the list of entries chosen, without a scan over them.

Shapes: R rows, X entries, k chosen in each row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 4096
LISTED = 1024  # a scan along rows needs more registers
WIDEST = 1024
MOST = 32  # choices; the search is unrolled


@triton.jit
def _choice_highest(
    scores_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    k: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    place = row.to(tl.int64)[:, None] * width + column
    scores = tl.load(scores_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scores = tl.where(scores == scores, scores, float("-inf"))  # NaN is lowest
    taken = tl.broadcast_to(column >= width, (ROWS, COLUMNS))
    for _ in tl.static_range(k):
        best = tl.max(tl.where(taken, float("-inf"), scores), axis=1)
        level = (scores == best[:, None]) & (taken == 0)
        first = tl.min(tl.where(level, column, COLUMNS), axis=1)
        taken = taken | (column == first[:, None])
    tl.store(chosen_ptr + place, taken.to(tl.int8), mask=inside)


@triton.jit
def _choice_list(
    weights_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    listed_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    k: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    place = row.to(tl.int64)[:, None] * width + column
    chosen = tl.load(chosen_ptr + place, mask=inside, other=0).to(tl.int32)
    weights = tl.load(weights_ptr + place, mask=inside, other=0.0)
    slot = tl.cumsum(chosen, axis=1) - 1
    target = row.to(tl.int64)[:, None] * k + slot
    given = (chosen != 0) & (slot < k)
    tl.store(
        indices_ptr + target, tl.broadcast_to(column, (ROWS, COLUMNS)).to(tl.int64), mask=given
    )
    tl.store(listed_ptr + target, weights, mask=given)


@triton.jit
def _choice_spread(
    grad_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    grad_weights_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    k: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradient of the list, where its entries came from, and 0 elsewhere."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in tl.static_range(k):
        place = row.to(tl.int64) * k + slot
        index = tl.load(indices_ptr + place, mask=present, other=-1)
        grad = tl.load(grad_ptr + place, mask=present, other=0.0).to(tl.float32)
        found = tl.where(column == index[:, None], grad[:, None], found)
    place = row.to(tl.int64)[:, None] * width + column
    tl.store(grad_weights_ptr + place, found, mask=present[:, None] & (column < width))


def _tile(width: int, elements: int = TILE) -> tuple[int, int]:
    columns = triton.next_power_of_2(width)
    return max(1, elements // columns), columns


def highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`[..., X]` → bool of that shape."""
    scores = scores.contiguous()
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    width = scores.size(-1)
    if scores.numel():
        rows = scores.numel() // width
        size, columns = _tile(width)
        grid = (triton.cdiv(rows, size),)
        _choice_highest[grid](scores, chosen.view(torch.int8), rows, width, k, size, columns)
    return chosen


class _Choices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights_RX: torch.Tensor, chosen_RX: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = chosen_RX.shape
        indices_RK = torch.empty((rows, k), dtype=torch.int64, device=chosen_RX.device)
        listed_RK = weights_RX.new_empty((rows, k))
        if listed_RK.numel():
            size, columns = _tile(width, LISTED)
            given = (weights_RX, chosen_RX.view(torch.int8), indices_RK, listed_RK)
            _choice_list[(triton.cdiv(rows, size),)](*given, rows, width, k, size, columns)
        ctx.save_for_backward(indices_RK)
        ctx.mark_non_differentiable(indices_RK)
        ctx.width = width
        return indices_RK, listed_RK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (indices_RK,) = ctx.saved_tensors
        grad_RK = grads[1].contiguous()
        rows, k = indices_RK.shape
        grad_weights = grad_RK.new_empty((rows, ctx.width))
        if grad_weights.numel():
            size, columns = _tile(ctx.width)
            given = (grad_RK, indices_RK, grad_weights)
            _choice_spread[(triton.cdiv(rows, size),)](*given, rows, ctx.width, k, size, columns)
        return grad_weights, None, None


def choices(
    weights: torch.Tensor, chosen: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[..., X]`, k chosen in each row: their indices, ascending, and weights, `[..., k]`."""
    shape = chosen.shape
    flat = (each.reshape(-1, shape[-1]).contiguous() for each in (weights, chosen))
    indices, listed = _Choices.apply(*flat, k)
    return indices.view(*shape[:-1], k), listed.view(*shape[:-1], k)
