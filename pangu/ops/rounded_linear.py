"""Linears whose input is rounded to a few bits, token by token: the activations of W8A8 and W4A4 as
their values, in floating point, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from pangu.ops.input_transform import InputTransform


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


class TokenRounding(torch.nn.Module):
    """`round_tokens`, as a module."""

    def __init__(self, bits: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.bits, self.group = bits, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_tokens(x, self.bits, self.group)


def input_rounding(
    config: Any, size: int, group: dist.ProcessGroup | None = None
) -> TokenRounding | InputTransform:
    """What a model of `config` does to `[..., size]` before a matrix; ranks of `group` hold parts
    of the channels. A plain configuration of megatron-core asks for nothing."""
    bits = getattr(config, "activation_bits", 0)
    if getattr(config, "input_transforms", False):
        return InputTransform(size, bits, group)
    return TokenRounding(bits, group)


class RoundedColumn(ColumnParallelLinear):
    """Every rank sees whole tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_rounding = input_rounding(self.config, self.input_size)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.input_rounding(input_), *args, **kwargs)


class RoundedRow(RowParallelLinear):
    """Every rank sees its part of each token's channels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_rounding = input_rounding(self.config, self.input_size, self.tp_group)

    def forward(self, input_: torch.Tensor) -> Any:
        return super().forward(self.input_rounding(input_))
