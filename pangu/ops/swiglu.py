"""SwiGLU, optionally times a weight per row: silu(gate)·up·weight.

Shapes: N rows, F width of the gate and of the up projection.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from pangu import backends


def swiglu_reference(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """`swiglu` in plain operations."""
    gate, up = x_NG.chunk(2, dim=-1)
    y_NF = F.silu(gate) * up
    return y_NF if weights_N is None else (y_NF * weights_N[:, None]).to(x_NG.dtype)


class _Swiglu(torch.autograd.Function):
    """Keeps its input alone: silu is computed again in the backward, in place where possible."""

    @staticmethod
    def forward(ctx: Any, x_NG: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_NG, weights_N)
        gate, up = x_NG.chunk(2, dim=-1)
        y_NF = F.silu(gate).mul_(up)
        return y_NF if weights_N is None else y_NF.mul_(weights_N[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_NG, weights_N = ctx.saved_tensors
        gate, up = x_NG.chunk(2, dim=-1)
        grad_x = torch.empty_like(x_NG)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        grad_weights = None
        torch.mul(F.silu(gate), grads[0], out=grad_up)
        grad_silu = grads[0] * up
        if weights_N is not None:
            grad_weights = torch.linalg.vecdot(grad_up, up)
            grad_up.mul_(weights_N[:, None])
            grad_silu.mul_(weights_N[:, None])
        torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_gate)
        return grad_x, grad_weights


def swiglu_cuda(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """The engine's fused kernels."""
    module = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    if weights_N is None:
        return module.bias_swiglu_impl(x_NG, None)
    return module.weighted_bias_swiglu_impl(x_NG, None, weights_N[:, None])


def swiglu_npu(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """torch-npu's operator. Written against its schema; not run on an NPU."""
    y_NF = importlib.import_module("torch_npu").npu_swiglu(x_NG, dim=-1)
    return y_NF if weights_N is None else (y_NF * weights_N[:, None]).to(x_NG.dtype)


def swiglu(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """`[N, 2F]` (gates, then ups) → `[N, F]` in x's dtype; the product with the weights is taken
    in the wider of the two dtypes."""
    name = backends.current().name
    if name == "cuda":
        return swiglu_cuda(x_NG, weights_N)
    if name == "npu":
        return swiglu_npu(x_NG, weights_N)
    if weights_N is not None and weights_N.dtype != x_NG.dtype:
        return swiglu_reference(x_NG, weights_N)
    return _Swiglu.apply(x_NG, weights_N)
