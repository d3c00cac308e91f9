"""What comes into a linear, turned by a learned matrix and rounded within a learned part of its
largest (FlatQuant, arXiv 2410.09426, sections 3.1 and 3.2); the inverse is in the linear's weight.

The matrix is the Kronecker product of two, P = left ⊗ right: a token of a·b channels is a matrix
X `[a, b]`, and x·P is leftᵀ·X·right.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)

from pangu import backends


def factors(size: int) -> tuple[int, int]:
    """The two whole factors that are nearest to each other, the smaller one first."""
    small = next(each for each in range(math.isqrt(size), 0, -1) if size % each == 0)
    return small, size // small


def kronecker(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x·(left ⊗ right) for `[..., a·b]`, `[a, a]`, `[b, b]`, in the dtype of all three."""
    matrices = x.unflatten(-1, (len(left), len(right)))
    return ((matrices @ right).transpose(-1, -2) @ left).transpose(-1, -2).flatten(-2)


def round_within(x: torch.Tensor, bits: int, part: torch.Tensor) -> torch.Tensor:
    """Each token of `[..., channels]` to the nearest of 2^bits - 1 even steps around 0 that `part`
    `[]` of its largest |x| spans; `bits` 0 leaves it. Gradients pass the rounding alone as if it
    was not there, so that `part` has one too."""
    if not bits:
        return x
    most = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) * part / most
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = (x / step).clamp(-most, most)
    return (codes + (codes.round() - codes).detach()) * step


class InputTransform(torch.nn.Module):
    """`[..., size]` to the same shape, rounded to `bits` bits (0: not).

    `left`, `right` and `clip` `[]` are float32 and whole on every rank; they are learned by
    `pangu.compress quantize` and by nothing else, hence buffers. Where ranks of `group` hold parts
    of the channels, they are gathered first: a transform of parts would be another one.
    """

    left: torch.Tensor
    right: torch.Tensor
    clip: torch.Tensor

    def __init__(self, size: int, bits: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.bits = bits
        self.group = group if group is not None and group.size() > 1 else None
        device = backends.current().device
        for name, width in zip(("left", "right"), factors(size), strict=True):
            self.register_buffer(name, torch.eye(width, device=device))
        self.register_buffer("clip", torch.ones((), device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.group:
            x = gather_from_tensor_model_parallel_region(x, self.group)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turned = kronecker(wide, self.left.to(wide.dtype), self.right.to(wide.dtype))
        turned = round_within(turned, self.bits, self.clip).to(x.dtype)
        return scatter_to_tensor_model_parallel_region(turned, self.group) if self.group else turned
