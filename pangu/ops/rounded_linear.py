"""Linears whose input is rounded to a few bits, token by token: the activations of W8A8 and W4A4 as
their values, in floating point, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def round_tokens(
    x: torch.Tensor, bits: int, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Each token of `[..., channels]` to the nearest of 2^bits - 1 even steps around 0 that its
    largest |x| spans; `bits` 0 leaves it.

    Backward passes gradients through as if nothing was rounded. Where ranks of `group` hold parts
    of the channels, all take the largest of the whole token.
    """
    if not bits:
        return x
    with torch.no_grad():
        largest = x.abs().amax(-1, keepdim=True)
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        # As vLLM's kernels have it; by 2^(bits - 1) - 0.5 the largest would lie on a tie.
        step = largest.float() / (2 ** (bits - 1) - 1)
        step = torch.where(step > 0, step, torch.ones_like(step))
        nearest = (x.float() / step).round() * step
    return x + (nearest.to(x.dtype) - x).detach()


class RoundedColumn(ColumnParallelLinear):
    """Every rank sees whole tokens."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(round_tokens(input_, self.config.activation_bits), *args, **kwargs)


class RoundedRow(RowParallelLinear):
    """Every rank sees its part of each token's channels."""

    def forward(self, input_: torch.Tensor) -> Any:
        return super().forward(round_tokens(input_, self.config.activation_bits, self.tp_group))
