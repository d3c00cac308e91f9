"""Rows on their way to experts, in fewer bits where `moe.dispatch_dtype` says so. Gradients come
back as they are: what was rounded counts as if it had not been.

Shapes: M rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from configs.schema import DispatchDtype

Travel = Callable[[torch.Tensor], torch.Tensor]
INT8_MAX = 127


def exchange_rows(
    rows_MH: torch.Tensor,
    group: dist.ProcessGroup,
    dtype: DispatchDtype,
    received: list[int],
    sent: list[int],
) -> torch.Tensor:
    """The rows that the ranks sent this one, `received` of them from each."""
    if dtype == "model":
        return all_to_all(group, rows_MH, received, sent)
    there = partial(_exchanged, group, received, sent)
    return _Narrow.apply(rows_MH, dtype, there, partial(_exchanged, group, sent, received))


def gather_rows(
    rows_MH: torch.Tensor, group: dist.ProcessGroup, dtype: DispatchDtype
) -> torch.Tensor:
    """All ranks' rows; as many of each."""
    there = partial(gather_from_sequence_parallel_region, group=group)
    if dtype == "model":
        return there(rows_MH)
    back = partial(reduce_scatter_to_sequence_parallel_region, group=group)
    return _Narrow.apply(rows_MH, dtype, there, back)


def _exchanged(
    group: dist.ProcessGroup, received: list[int], sent: list[int], rows: torch.Tensor
) -> torch.Tensor:
    return all_to_all(group, rows, received, sent)


class _Narrow(torch.autograd.Function):
    """Rows that travel `there` in `dtype`, and their gradient `back` in its own."""

    @staticmethod
    def forward(
        ctx: Any, rows_MH: torch.Tensor, dtype: DispatchDtype, there: Travel, back: Travel
    ) -> torch.Tensor:
        ctx.back = back
        if dtype == "bf16":
            return there(rows_MH.to(torch.bfloat16)).to(rows_MH.dtype)
        values_MH, scales_M1 = quantise(rows_MH)
        return there(values_MH).to(rows_MH.dtype) * there(scales_M1).to(rows_MH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grads[0].contiguous()), None, None, None


def quantise(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and each row's scale (float32, `[M, 1]`): its largest value becomes 127. No value is
    farther from its own than half a scale."""
    wide = rows_MH.to(torch.float32)
    scales_M1 = wide.abs().amax(dim=1, keepdim=True) / INT8_MAX
    return (wide / scales_M1.clamp(min=1e-30)).round().to(torch.int8), scales_M1
