"""The projection on the vocabulary and its cross-entropy in one, without the logits of all rows: of
a chunk of rows they are made, used up and forgotten (Liger Kernel, arXiv 2410.10989, section 3.2).

Shapes: N rows, H width of a row, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from configs.head_chunks import head_chunks
from pangu import backends
from pangu.ops.cross_entropy import cross_entropy, cross_entropy_reference, losses_and_gradient


def linear_cross_entropy_reference(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """`linear_cross_entropy` in torch's own operations, with all logits."""
    return cross_entropy_reference(F.linear(hidden_NH, weight_VH), labels_N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are made in the forward pass, where a chunk's logits are at hand, but for a
    factor that all rows have in common."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
    ) -> torch.Tensor:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        count = max(1, head_chunks(*hidden_NH.shape))
        grad_NH = torch.empty_like(hidden_NH) if of_hidden else None
        grad_VH = None
        losses = []
        start = 0
        parts = (tensor.chunk(count) for tensor in (hidden_NH, labels_N, weights_N))
        for hidden, labels, weights in zip(*parts, strict=True):
            found, grad = losses_and_gradient(F.linear(hidden, weight_VH), labels, weights)
            losses.append(found)
            if grad_NH is not None:
                torch.mm(grad, weight_VH, out=grad_NH[start : start + hidden.size(0)])
            if of_weight:
                grad_VH = _added(grad_VH, grad, hidden, alone=count == 1)
            start += hidden.size(0)
            del grad  # before the next chunk's logits are made
        ctx.gradients = (grad_NH, None if grad_VH is None else grad_VH.to(weight_VH.dtype))
        ctx.save_for_backward(weights_N)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weights_N,) = ctx.saved_tensors
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy is differentiable once")
        (grad_NH, grad_VH), ctx.gradients = ctx.gradients, None
        if weights_N.numel():
            scale = _common_factor(grads[0], weights_N)
            for gradient in (grad_NH, grad_VH):
                if gradient is not None:
                    gradient.mul_(scale.to(gradient.dtype))
        return grad_NH, grad_VH, None, None


def _added(
    total_VH: torch.Tensor | None, grad_NV: torch.Tensor, hidden_NH: torch.Tensor, *, alone: bool
) -> torch.Tensor:
    """The matrix's gradient so far with a chunk's, in float32 or wider where there are several."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    if total_VH is None:
        product = grad_NV.t() @ hidden_NH
        return product if alone else product.to(wide)
    if wide == hidden_NH.dtype:
        return total_VH.addmm_(grad_NV.t(), hidden_NH)
    return total_VH.add_(grad_NV.t() @ hidden_NH)


def _common_factor(grad_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """What the weights must be multiplied by to be the gradient; NaN where no number does it, so
    that a step which breaks the promise is skipped as not finite. The host is not asked."""
    largest = weights_N.abs().argmax(keepdim=True)
    weight = weights_N.take(largest)
    scale = torch.where(weight != 0, grad_N.take(largest) / weight, 0.0)
    off = (grad_N - scale * weights_N).abs().amax()
    promised = off <= 1e-5 * (scale * weight).abs()
    return torch.where(promised, scale, torch.nan)


def linear_cross_entropy_chunks(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """Never more than a chunk's logits, in their own dtype where the cross-entropy takes it."""
    weights_N = weights_N.to(torch.promote_types(hidden_NH.dtype, torch.float32))
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N, weights_N)
    count = max(1, head_chunks(*hidden_NH.shape))
    parts = zip(hidden_NH.chunk(count), labels_N.chunk(count), strict=True)
    return torch.cat([cross_entropy(F.linear(h, weight_VH), labels) for h, labels in parts])


def linear_cross_entropy_plain(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """The product, then the backend's cross-entropy over all logits."""
    return cross_entropy(F.linear(hidden_NH, weight_VH), labels_N)


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """Losses `[N]` in nats, at least float32, of rows times a whole head; labels are integers below
    V.

    `weights_N` is a promise: each loss will be weighed by its own, all by one more factor that need
    not be known yet. A gradient that is no multiple of them makes NaN of both gradients.
    Differentiable once, in the rows and in the matrix.
    """
    variants = {"plain": linear_cross_entropy_plain, "chunks": linear_cross_entropy_chunks}
    variant = variants[backends.current().operators.linear_cross_entropy]
    return variant(hidden_NH, weight_VH, labels_N, weights_N)
