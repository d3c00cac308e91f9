"""Root-mean-square norm over the last dimension."""

from __future__ import annotations

import importlib
from typing import Any

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


def _normed(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """And one over each row's root mean square, `[..., 1]`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.size(-1)).add_(epsilon).rsqrt_()
    return (wide * inverse).mul_(weight).to(x.dtype), inverse


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and a number per row; torch's own, where it is not one kernel, keeps the
    normalised input beside them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        normed, inverse = _normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = (x.to(inverse.dtype) * inverse).flatten(0, -2)
        grad = grads[0].to(inverse.dtype).flatten(0, -2)
        grad_weight = torch.linalg.vecdot(grad, normed, dim=0)
        grad_x = grad * weight
        mean = torch.linalg.vecdot(grad_x, normed)[:, None] / x.size(-1)
        grad_x.sub_(normed.mul_(mean)).mul_(inverse.flatten(0, -2))
        return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm_lean(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`rms_norm` that keeps little for the backward pass."""
    if not torch.is_grad_enabled():
        return _normed(x, weight, epsilon)[0]
    return _RmsNorm.apply(x, weight, epsilon)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """torch's own operator."""
    return F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), epsilon)


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One kernel each way, the residual's addition within; float64, and rows too wide for a
    kernel's registers, in plain operations."""
    kernels = importlib.import_module("pangu.ops.kernels.rms_norm")
    if x.dtype == torch.float64 or x.size(-1) > kernels.WIDEST:
        normed = rms_norm_lean(x, weight, epsilon)
        return normed if residual is None else normed + residual
    return kernels.rms_norm(x, weight, epsilon, residual)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`[..., hidden]` → the same shape and dtype; `weight` is `[hidden]`."""
    variants = {
        "lean": rms_norm_lean,
        "torch": rms_norm_torch,
        "npu": rms_norm_npu,
        "triton": rms_norm_triton,
    }
    return variants[backends.current().operators.rms_norm](x, weight, epsilon)


def adds_residuals() -> bool:
    """Whether this process's kernel adds a residual in the same pass (`rms_norm_triton`)."""
    return backends.current().operators.rms_norm == "triton"
