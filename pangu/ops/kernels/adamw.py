"""AdamW over all tensors of a parameter group in one launch: gradient, main copy and moments are
read once, main copy, moments and 16-bit weights written once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from pangu.ops.adamw import Rule, State, Verdict

CHUNK = 65_536  # elements of a program
BLOCK = 1024  # of them at a time: 8 for each of 128 threads
UNIT = 16  # bytes, or elements: where all divide by it, a thread reads so many at once
COLUMNS = tl.constexpr(6)  # of the table: five addresses and a size


@triton.jit
def _base(
    table_ptr: tl.tensor, column: tl.constexpr, kind: tl.constexpr, unit: tl.constexpr
) -> tl.tensor:
    return (tl.load(table_ptr + column) * unit).to(tl.pointer_type(kind))


@triton.jit
def _places(base_ptr: tl.tensor, place: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    # Said of the sum: where an address comes from memory the compiler knows nothing of it.
    return tl.multiple_of(base_ptr + place, unit)


@triton.jit
def _adamw(
    table_ptr: tl.tensor,
    work_ptr: tl.tensor,
    verdict_ptr: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    epsilon: tl.tensor,
    keep: tl.tensor,
    moment: tl.constexpr,
    weight: tl.constexpr,
    unit: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`table`: of each tensor five addresses and its size, in units. `work`: for each program a
    tensor's number, and which of its chunks. `verdict`: clipping, rate over the first moment's
    correction, root of the second's, and whether nothing is to change."""
    table_ptr += tl.load(work_ptr + 2 * tl.program_id(0)) * COLUMNS
    first = tl.load(work_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    main_ptr = _base(table_ptr, 0, tl.float32, unit)
    gradient_ptr = _base(table_ptr, 1, tl.float32, unit)
    mean_ptr = _base(table_ptr, 2, moment, unit)
    square_ptr = _base(table_ptr, 3, moment, unit)
    clip, rate = tl.load(verdict_ptr), tl.load(verdict_ptr + 1)
    root, bad = tl.load(verdict_ptr + 2), tl.load(verdict_ptr + 3)
    size = tl.load(table_ptr + 5) * unit
    length = tl.where(bad != 0, 0, tl.minimum(size - first, CHUNK))
    for start in range(0, length, BLOCK):
        place = first + start + tl.arange(0, BLOCK)
        inside = place < size
        main_at, mean_at = _places(main_ptr, place, unit), _places(mean_ptr, place, unit)
        square_at = _places(square_ptr, place, unit)
        gradient_at = _places(gradient_ptr, place, unit)
        gradient = tl.load(gradient_at, mask=inside, other=0.0) * clip
        mean = tl.load(mean_at, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(square_at, mask=inside, other=0.0).to(tl.float32)
        main = tl.load(main_at, mask=inside, other=0.0)
        mean += (1.0 - beta1) * (gradient - mean)
        square = beta2 * square + (1.0 - beta2) * gradient * gradient
        main = main * keep - rate * mean / (tl.sqrt(square) / root + epsilon)
        tl.store(mean_at, mean, mask=inside)
        tl.store(square_at, square, mask=inside)
        tl.store(main_at, main, mask=inside)
        if weight is not None:
            weights_at = _places(_base(table_ptr, 4, weight, unit), place, unit)
            tl.store(weights_at, main, mask=inside)


KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(maxsize=64)
def _tables(
    rows: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Addresses and sizes on the device, in units; what each program is to do; and the unit."""
    unit = UNIT if all(number % UNIT == 0 for row in rows for number in row) else 1
    units = [[number // unit for number in row] for row in rows]
    work = [
        (number, chunk)
        for number, row in enumerate(rows)
        for chunk in range(triton.cdiv(row[-1], CHUNK))
    ]
    table, what = (torch.tensor(each, dtype=torch.int64, device=device) for each in (units, work))
    return table, what, unit


def adamw(states: Sequence[State], rule: Rule, verdict: Verdict) -> None:
    """Of tensors that lie contiguously, main copies and gradients in float32; those with and
    without weights, or of other dtypes, in a launch each."""
    step = verdict.step.to(torch.float64)
    rate = rule.lr / (1 - rule.beta1**step)
    root = (1 - rule.beta2**step).sqrt()
    numbers = torch.cat([verdict.clip, rate.float(), root.float(), verdict.bad])
    alike: dict[tuple[torch.dtype, torch.dtype | None], list[State]] = {}
    for state in states:
        kinds = state.exp_avg.dtype, None if state.weights is None else state.weights.dtype
        alike.setdefault(kinds, []).append(state)
    for (moment, weight), some in alike.items():
        rows = tuple(
            (*(0 if tensor is None else tensor.data_ptr() for tensor in state), state.main.numel())
            for state in some
        )
        table, work, unit = _tables(rows, numbers.device)
        if work.numel():
            given = (rule.beta1, rule.beta2, rule.epsilon, 1 - rule.lr * rule.weight_decay)
            kinds = KINDS[moment], None if weight is None else KINDS[weight]
            sizes = (*kinds, unit, CHUNK, BLOCK)
            _adamw[(work.size(0),)](table, work, numbers, *given, *sizes, num_warps=4)
