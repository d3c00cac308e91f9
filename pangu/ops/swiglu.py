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
    """Keeps its input alone: silu is computed again in the backward, block by block."""

    @staticmethod
    def forward(ctx: Any, x_NG: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_NG, weights_N)
        gate, up = x_NG.chunk(2, dim=-1)
        y_NF = F.silu(gate).mul_(up)
        return y_NF if weights_N is None else y_NF.mul_(weights_N[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_NG, weights_N = ctx.saved_tensors
        grad_x = torch.empty_like(x_NG)
        grad_weights = None if weights_N is None else torch.empty_like(weights_N)
        # The temporaries of one block stay in a core's cache.
        block = backends.current().block_elements or x_NG.numel()
        rows = max(1, block // grads[0].size(-1))
        for start in range(0, x_NG.size(0), rows):
            part = slice(start, start + rows)
            weights = None if weights_N is None else weights_N[part]
            gradients = None if grad_weights is None else grad_weights[part]
            _block_gradient(x_NG[part], weights, grads[0][part], grad_x[part], gradients)
        return grad_x, grad_weights


def _block_gradient(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    grad: torch.Tensor,
    grad_x: torch.Tensor,
    grad_weights: torch.Tensor | None,
) -> None:
    """Fill `grad_x` and `grad_weights` for some rows."""
    gate, up = x.chunk(2, dim=-1)
    grad_gate, grad_up = grad_x.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=grad_up)
    grad_silu = grad * up
    if weights is not None:
        torch.linalg.vecdot(grad_up, up, out=grad_weights)
        grad_up.mul_(weights[:, None])
        grad_silu.mul_(weights[:, None])
    torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_gate)


def swiglu_blocks(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """Without a copy of the activation, where all is of one dtype."""
    if weights_N is not None and weights_N.dtype != x_NG.dtype:
        return swiglu_reference(x_NG, weights_N)
    return _Swiglu.apply(x_NG, weights_N)


def swiglu_megatron(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """The engine's fused kernels."""
    module = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    if weights_N is None:
        return module.bias_swiglu_impl(x_NG, None)
    return module.weighted_bias_swiglu_impl(x_NG, None, weights_N[:, None])


def swiglu_npu(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """torch-npu's operator. Written against its schema; not run on an NPU."""
    y_NF = importlib.import_module("torch_npu").npu_swiglu(x_NG, dim=-1)
    return y_NF if weights_N is None else (y_NF * weights_N[:, None]).to(x_NG.dtype)


def swiglu_triton(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """One kernel each way; float64, which it would round, in plain operations."""
    if x_NG.dtype == torch.float64:
        return swiglu_reference(x_NG, weights_N)
    return importlib.import_module("pangu.ops.kernels.swiglu").swiglu(x_NG, weights_N)


def swiglu(x_NG: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """`[N, 2F]` (gates, then ups) → `[N, F]` in x's dtype; the product with the weights is taken
    in the wider of the two dtypes."""
    variants = {
        "blocks": swiglu_blocks,
        "megatron": swiglu_megatron,
        "npu": swiglu_npu,
        "triton": swiglu_triton,
    }
    return variants[backends.current().operators.swiglu](x_NG, weights_N)
