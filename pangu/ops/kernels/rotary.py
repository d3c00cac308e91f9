"""Rotary position embedding of queries or keys, as they lie in memory: no copies of halves.

Shapes: s positions, b sequences, n heads, d head size, of which the first r are turned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048


@triton.jit
def _rotary_turn(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    x_step_s: tl.tensor,
    x_step_b: tl.tensor,
    x_step_n: tl.tensor,
    sequences: tl.constexpr,
    heads: tl.constexpr,
    size: tl.constexpr,
    turned: tl.constexpr,
    in_step: tl.constexpr,
    in_gap: tl.constexpr,
    out_step: tl.constexpr,
    out_gap: tl.constexpr,
    back: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """x has any strides but in its last dimension, and `out` none. The two dimensions of a plane
    lie a gap apart, planes a step. `back` turns the other way, as a gradient does."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    head, outer = row % heads, row // heads
    position = (outer // sequences).to(tl.int64)
    x_row = position * x_step_s + (outer % sequences) * x_step_b + head * x_step_n
    source, target = x_ptr + x_row[:, None], out_ptr + row.to(tl.int64)[:, None] * size
    index = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = turned // 2
    inside = present[:, None] & (index < half)
    angle = position[:, None] * turned + index
    cos_first = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    cos_second = tl.load(cos_ptr + angle + half, mask=inside, other=0.0)
    sin_first = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    sin_second = tl.load(sin_ptr + angle + half, mask=inside, other=0.0)
    if back:
        sin_first, sin_second = -sin_second, -sin_first
    place = source + index * in_step
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + in_gap, mask=inside, other=0.0).to(tl.float32)
    place = target + index * out_step
    tl.store(place, first * cos_first - second * sin_first, mask=inside)
    tl.store(place + out_gap, second * cos_second + first * sin_second, mask=inside)
    if turned < size:
        rest = turned + tl.arange(0, REST)[None, :]
        beyond = present[:, None] & (rest < size)
        tl.store(target + rest, tl.load(source + rest, mask=beyond, other=0.0), mask=beyond)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: bool, back: bool
) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _, sequences, heads, size = x.shape
    turned, rows = cos.size(1), x.numel() // size
    half = triton.next_power_of_2(max(1, turned // 2))
    tile = max(1, TILE // half)
    split, paired = (1, turned // 2), (2, 1)
    given, found = (paired if pairs else split), split
    if back:
        given, found = found, given
    if rows:
        shape = (rows, *x.stride()[:3], sequences, heads, size, turned, *given, *found, back)
        rest = triton.next_power_of_2(max(1, size - turned))
        _rotary_turn[(triton.cdiv(rows, tile),)](x, cos, sin, out, *shape, tile, half, rest)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _turned(x, cos, sin, pairs=pairs, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _turned(grads[0], *ctx.saved_tensors, pairs=ctx.pairs, back=True), None, None, None


def rotary(x: torch.Tensor, angles: torch.Tensor, *, pairs: bool, scale: float) -> torch.Tensor:
    """`[s, b, n, d]` and angles `[s, …, r]` in float32 → `[s, b, n, d]` in x's dtype."""
    angles = angles.reshape(angles.size(0), angles.size(-1))
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return _Rotary.apply(x, cos.contiguous(), sin.contiguous(), pairs)
