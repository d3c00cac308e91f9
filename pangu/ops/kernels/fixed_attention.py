"""Attention whose every query goes through its keys in blocks of one size, from the first on: its
sums do not depend on what else is computed, nor on how many queries there are.

Shapes: s queries, t keys, n heads, g KV heads, d head size of query and key, e of value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KEYS = 32
WIDEST = 256  # a head is in registers as a whole


@triton.jit
def _with_block(
    scores: tl.tensor,
    value: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A head's highest score so far, the sum of weights relative to it, and of weighted values."""
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp(scores - higher[:, None])
    kept = tl.exp(highest - higher)
    more = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total * kept + tl.sum(weights, axis=1), sums * kept[:, None] + more


@triton.jit
def _attention(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    seen_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.tensor,
    behind: tl.tensor,
    keys: tl.tensor,
    seen_row: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    heads: tl.constexpr,
    width: tl.constexpr,
    value_width: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """A program has one query, and of it the heads that share a key's: the query in row i sees up
    to i + `behind` keys."""
    row, group = tl.program_id(0), tl.program_id(1)
    head, at = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    value_at = tl.arange(0, VALUE_WIDTH)
    present = head < heads
    head += group * heads
    place = row.to(tl.int64) * query_row + head[:, None] * query_head + at[None, :]
    wanted = present[:, None] & (at < width)[None, :]
    query = tl.load(query_ptr + place, mask=wanted, other=0.0)
    visible = tl.minimum(keys, row + behind)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, VALUE_WIDTH), tl.float32)
    for first in range(0, visible, KEYS):
        position = first + tl.arange(0, KEYS)
        inside = position < visible
        seen = tl.load(seen_ptr + row.to(tl.int64) * seen_row + position, mask=inside, other=0)
        inside = inside & (seen != 0)
        position = position.to(tl.int64)
        key = tl.load(
            key_ptr + position[None, :] * key_row + group * key_head + at[:, None],
            mask=inside[None, :] & (at < width)[:, None],
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        value = tl.load(
            value_ptr + position[:, None] * value_row + group * value_head + value_at[None, :],
            mask=inside[:, None] & (value_at < value_width)[None, :],
            other=0.0,
        )
        highest, total, sums = _with_block(scores, value, highest, total, sums)
    out = (row.to(tl.int64) * tl.num_programs(1) * heads + head)[:, None] * value_width
    wanted = present[:, None] & (value_at < value_width)[None, :]
    tl.store(out_ptr + out + value_at[None, :], sums / total[:, None], mask=wanted)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """query `[s, n, d]`, key `[t, g, d]`, value `[t, g, e]` → `[s, n, e]`; query i sees keys up to
    t - s + i, or what `seen` bool `[s, t]` says, the first key in any case."""
    query, key, value = (
        each if each.stride(2) == 1 else each.contiguous() for each in (query, key, value)
    )
    queries, keys, heads = query.size(0), key.size(0), query.size(1) // key.size(1)
    out = query.new_empty(queries, query.size(1), value.size(2))
    # One kernel for both: another might add up otherwise.
    behind = keys - queries + 1 if seen is None else keys
    whole = torch.ones(1, keys, dtype=torch.int8, device=key.device) if seen is None else seen
    _attention[(query.size(0), key.size(1))](
        query,
        key,
        value,
        whole.contiguous().to(torch.int8),
        out,
        float(scale),
        behind,
        keys,
        0 if seen is None else keys,
        *(stride for each in (query, key, value) for stride in each.stride()[:2]),
        heads,
        query.size(2),
        value.size(2),
        max(16, triton.next_power_of_2(heads)),
        max(16, triton.next_power_of_2(query.size(2))),
        max(16, triton.next_power_of_2(value.size(2))),
        KEYS,
    )
    return out
