"""Cross-entropy of each row over the whole vocabulary.

Shapes: N rows, V entries of the vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pangu import backends


def cross_entropy_reference(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """`cross_entropy` in torch's own operation, which keeps three tensors of the logits' size."""
    return F.cross_entropy(logits_NV, labels_N, reduction="none")


def _exponentials(
    exp_NV: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites logits by their exponentials, less each row's highest; losses and sums of rows."""
    losses_N, sums_N = exp_NV.new_empty(2, exp_NV.size(0))
    block = backends.current().block_elements or exp_NV.numel()
    rows = max(1, block // exp_NV.size(1))
    blocks = (tensor.split(rows) for tensor in (exp_NV, labels_N, sums_N, losses_N))
    for exp, labels, sums, losses in zip(*blocks, strict=True):
        exp.sub_(exp.amax(1, keepdim=True))
        own = exp.gather(1, labels[:, None])[:, 0]
        torch.sum(exp.exp_(), 1, out=sums)
        torch.sub(sums.log(), own, out=losses)
    return losses_N, sums_N


def _gradient(
    exp_NV: torch.Tensor, labels_N: torch.Tensor, sums_N: torch.Tensor, grad_N: torch.Tensor
) -> torch.Tensor:
    """Overwrites the exponentials by the gradient of the logits."""
    exp_NV.mul_((grad_N / sums_N)[:, None])
    return exp_NV.scatter_add_(1, labels_N[:, None], -grad_N[:, None])


class _CrossEntropy(torch.autograd.Function):
    """The exponentials overwrite the logits, and the gradient overwrites the exponentials."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        exp_NV = logits_NV.detach()
        losses_N, sums_N = _exponentials(exp_NV, labels_N)
        ctx.save_for_backward(exp_NV, labels_N, sums_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        exp_NV, labels_N, sums_N = ctx.saved_tensors
        return _gradient(exp_NV, labels_N, sums_N, grads[0]), None


def cross_entropy_blocks(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """In float32 or wider, in place."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return _CrossEntropy.apply(wide, labels_N)


def cross_entropy_triton(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """One pass each way over the logits in their own dtype; float64 as `cross_entropy_blocks`.

    With a group its ranks hold equal parts of the vocabulary, in order: collective.
    """
    if logits_NV.dtype == torch.float64 and group is None:
        return cross_entropy_blocks(logits_NV, labels_N)
    kernels = importlib.import_module("pangu.ops.kernels.cross_entropy")
    return kernels.cross_entropy(logits_NV, labels_N, group)


def splits_vocabulary() -> bool:
    """Whether this process's kernel takes a part of the vocabulary (`cross_entropy_triton`)."""
    return backends.current().operators.cross_entropy == "triton"


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Losses `[N]` in nats, at least float32; labels are integers below V.

    Differentiable once, and **the logits are used up**: nobody may read them afterwards.
    """
    variants = {"blocks": cross_entropy_blocks, "triton": cross_entropy_triton}
    return variants[backends.current().operators.cross_entropy](logits_NV, labels_N)


def losses_and_gradient(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `[N]` as `cross_entropy`, and the gradient of their sum, each times its weight, in the
    logits' dtype: in one go, without autograd. The logits are used up."""
    variant = backends.current().operators.cross_entropy
    if variant == "triton" and logits_NV.dtype != torch.float64:
        kernels = importlib.import_module("pangu.ops.kernels.cross_entropy")
        return kernels.losses_and_gradient(logits_NV, labels_N, weights_N)
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    losses_N, sums_N = _exponentials(wide, labels_N)
    return losses_N, _gradient(wide, labels_N, sums_N, weights_N).to(logits_NV.dtype)
