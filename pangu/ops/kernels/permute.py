"""Sorting choices by expert, and a token's rows gathered, or gathered and added up.

Shapes: T tokens, H hidden, K choices per token, E experts, N rows.

Choices are sorted by counting: blocks of them count their experts, the counts are added up before
each, and every choice takes its place. What a token receives, its own program sums up in float32,
in the order of its choices: nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
BLOCK = 128  # choices that a program places: it compares each with each
SOME = 32  # experts whose choices it counts at a time


@triton.jit
def _permute_gather(
    source_ptr: tl.tensor,
    index_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    source = tl.load(index_ptr + row, mask=row < rows, other=0)
    values = tl.load(source_ptr + source[:, None] * width + column[None, :], mask=inside)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * width + column[None, :], values, mask=inside)


@triton.jit
def _permute_gather_sum(
    source_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    width: tl.constexpr,
    choices: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """`choices` is K; 0 where tokens differ in it, which then follows from where they start."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = token < tokens
    inside = present[:, None] & (column < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if choices > 0:
        for choice in tl.static_range(choices):
            slot = tl.load(slots_ptr + token * choices + choice, mask=present, other=0)
            place = slot[:, None] * width + column[None, :]
            total += tl.load(source_ptr + place, mask=inside, other=0.0).to(tl.float32)
    else:
        start = tl.load(starts_ptr + token, mask=present, other=0)
        end = tl.load(starts_ptr + token + 1, mask=token + 1 < tokens, other=slots)
        count = tl.where(present, end - start, 0)
        for choice in range(0, tl.max(count, axis=0)):
            some = choice < count
            slot = tl.load(slots_ptr + start + choice, mask=some, other=0)
            place = slot[:, None] * width + column[None, :]
            given = inside & some[:, None]
            total += tl.load(source_ptr + place, mask=given, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * width + column[None, :], total, mask=inside)


@triton.jit
def _permute_count(
    experts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    choices: tl.tensor,
    blocks: tl.tensor,
    experts: tl.constexpr,
    BLOCK: tl.constexpr,
    SOME: tl.constexpr,
) -> None:
    """Choices of each expert in each block, `[E, blocks]`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts_ptr + place, mask=place < choices, other=-1).to(tl.int32)
    for first in range(0, experts, SOME):
        expert = first + tl.arange(0, SOME)
        found = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + expert * blocks + tl.program_id(0), found, mask=expert < experts)


@triton.jit
def _permute_place(
    experts_ptr: tl.tensor,
    before_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    choices: tl.tensor,
    blocks: tl.tensor,
    per_token: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each choice's place: behind those of its expert in blocks before, and in its own block."""
    index = tl.arange(0, BLOCK)
    place = tl.program_id(0) * BLOCK + index
    present = place < choices
    chosen = tl.load(experts_ptr + place, mask=present, other=-1).to(tl.int32)
    same = (chosen[:, None] == chosen[None, :]) & (index[None, :] < index[:, None])
    ahead = tl.sum(same.to(tl.int32), axis=1)
    # The rows that end with this block's, without them.
    before = tl.load(before_ptr + chosen * blocks + tl.program_id(0), mask=present, other=0)
    slot = before + ahead
    tl.store(slots_ptr + place, slot, mask=present)
    tl.store(order_ptr + slot, place.to(tl.int64), mask=present)
    tl.store(tokens_ptr + slot, (place // per_token).to(tl.int64), mask=present)


def _tile(width: int) -> tuple[int, int]:
    columns = min(triton.next_power_of_2(width), 1024)
    return max(1, TILE // columns), columns


def gather(source: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """Rows of `[…, H]`: `[N, H]`. The index is int64."""
    source, index_N = source.contiguous(), index_N.contiguous()
    rows, width = index_N.numel(), source.size(1)
    out = source.new_empty(rows, width)
    size, columns = _tile(width)
    if out.numel():
        grid = (triton.cdiv(rows, size), triton.cdiv(width, columns))
        _permute_gather[grid](source, index_N, out, rows, width, size, columns)
    return out


def gather_sum(
    source: torch.Tensor, slots_N: torch.Tensor, starts_T: torch.Tensor, choices: int | None
) -> torch.Tensor:
    """`[T, H]`: the sum of each token's rows in the order of `slots_N`, 0 where it has none."""
    source, slots_N, starts_T = (each.contiguous() for each in (source, slots_N, starts_T))
    tokens, width = starts_T.numel(), source.size(1)
    out = source.new_empty(tokens, width)
    size, columns = _tile(width)
    if out.numel():
        grid = (triton.cdiv(tokens, size), triton.cdiv(width, columns))
        sizes = (tokens, slots_N.numel(), width, choices or 0, size, columns)
        _permute_gather_sum[grid](source, slots_N, starts_T, out, *sizes)
    return out


def sort_choices(
    experts_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices sorted by expert, then by token: their numbers, their tokens and, in the order of the
    choices, their places, all `[T·K]`; choices of each expert `[E]`. int64."""
    experts_TK = experts_TK.contiguous()
    choices = experts_TK.numel()
    blocks = triton.cdiv(choices, BLOCK)
    order_N, tokens_N, slots_N = experts_TK.new_empty((3, choices), dtype=torch.int64)
    counts_EB = experts_TK.new_zeros((num_experts, max(1, blocks)), dtype=torch.int32)
    if choices:
        _permute_count[(blocks,)](experts_TK, counts_EB, choices, blocks, num_experts, BLOCK, SOME)
        ends = counts_EB.flatten().cumsum(0)  # int64
        before = ends - counts_EB.flatten()
        per_token = experts_TK.size(1)
        places = (order_N, tokens_N, slots_N)
        sizes = (choices, blocks, per_token, BLOCK)
        _permute_place[(blocks,)](experts_TK, before, *places, *sizes, num_warps=8)
    return order_N, tokens_N, slots_N, counts_EB.sum(dim=1)
