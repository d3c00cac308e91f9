"""The weight gradient of a grouped product, added to where an engine gathers gradients.

Shapes: N rows, E groups, I input width, O output width. Group e owns `counts[e]` consecutive rows.
"""

from __future__ import annotations

import importlib

import torch

from pangu import backends

HALF = (torch.bfloat16, torch.float16)
# Of npu_grouped_matmul_add_.
NPU_GROUPS = 1024
NPU_WIDTH = 65535


def weight_gradient_reference(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> torch.Tensor:
    """`total` and the sums that are to come to it, in its precision: a tensor of its own."""
    sizes = counts_E.tolist()
    x, y = x_NI.to(total_EIO.dtype).split(sizes), y_NO.to(total_EIO.dtype).split(sizes)
    products = [rows.t() @ gradients for rows, gradients in zip(x, y, strict=True)]
    return total_EIO + torch.stack(products)


def weight_gradient_separate(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> bool:
    """Nothing: what the grouped product makes is written down, then added."""
    return False


def weight_gradient_loop(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> bool:
    """A product per group, of tensors of one dtype. Reads `counts` on the host."""
    if total_EIO.dtype != x_NI.dtype:
        return False
    sizes = counts_E.tolist()
    groups = zip(x_NI.split(sizes), y_NO.split(sizes), total_EIO.unbind(0), sizes, strict=True)
    for x, y, total, size in groups:
        if size:
            total.addmm_(x.t(), y)
    return True


def weight_gradient_npu(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> bool:
    """torch-npu's operator, which takes halves and float32. Not run on an NPU.

    Groups are given by where they end: CANN's first version of the operator, which torch-npu calls
    on most parts, takes no counts, whatever `group_list_type` says.
    """
    groups, *widths = total_EIO.shape
    fits = x_NI.dtype in HALF and total_EIO.dtype == torch.float32
    if not fits or groups > NPU_GROUPS or max(widths) > NPU_WIDTH:
        return False
    if x_NI.size(0):
        counts_E = counts_E.to(device=x_NI.device, dtype=torch.int64, non_blocking=True)
        torch_npu = importlib.import_module("torch_npu")
        torch_npu.npu_grouped_matmul_add_(total_EIO, x_NI, y_NO, counts_E.cumsum(0))
    return True


def weight_gradient_triton(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> bool:
    """One kernel, which finds the groups on the device."""
    if total_EIO.dtype != torch.float32 or x_NI.dtype == torch.float64:
        return False
    kernels = importlib.import_module("pangu.ops.kernels.weight_gradient")
    kernels.add_weight_gradient(total_EIO, x_NI, y_NO, counts_E)
    return True


def add_weight_gradient(
    total_EIO: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor
) -> bool:
    """Add xᵀ·y of each group to `total` (contiguous) in place, in its precision: the gradient of a
    half is not rounded to a half before. False, and nothing is done, where the backend's variant
    does not take these tensors: `grouped_matmul` then makes the gradient, and the engine adds it.

    x and y are of one dtype; `counts_E` holds integers on any device and sums to N at most.
    """
    variants = {
        "separate": weight_gradient_separate,
        "loop": weight_gradient_loop,
        "npu": weight_gradient_npu,
        "triton": weight_gradient_triton,
    }
    variant = variants[backends.current().operators.weight_gradient]
    return variant(total_EIO, x_NI, y_NO, counts_E)
