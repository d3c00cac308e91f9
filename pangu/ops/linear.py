"""The product of a linear layer where no gradient is wanted: x·Wᵀ, plus a bias.

Shapes: I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pangu import backends
from pangu.ops import packed_weights


def linear_torch(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """torch's own."""
    return F.linear(x, weight_OI, bias_O)


def linear_onednn(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """oneDNN's, which writes its kernels for the processor at hand. For float32 torch asks MKL,
    which knows Intel's processors: on others these take half the time. Other dtypes, and no rows
    at all, as `linear_torch`."""
    if x.dtype != torch.float32 or not x.numel():
        return F.linear(x, weight_OI, bias_O)
    packed = packed_weights.current()
    copy = packed.of(weight_OI) if packed else None
    weight = weight_OI if copy is None else copy
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")


def linear(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[..., I]` → `[..., O]`; not differentiable."""
    variants = {"torch": linear_torch, "onednn": linear_onednn}
    return variants[backends.current().operators.linear](x, weight_OI, bias_O)
