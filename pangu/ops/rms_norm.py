"""Root-mean-square norm over the last dimension."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from pangu import backends


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) · weight, with the statistics in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normed * weight).to(x.dtype)


def rms_norm_npu(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """torch-npu's operator. Written against its schema; not run on an NPU."""
    return importlib.import_module("torch_npu").npu_rms_norm(x, weight, epsilon)[0]


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """torch's own operator."""
    return F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`[..., hidden]` → the same shape and dtype; `weight` is `[hidden]`."""
    variants = {"torch": rms_norm_torch, "npu": rms_norm_npu}
    return variants[backends.current().operators.rms_norm](x, weight, epsilon)
