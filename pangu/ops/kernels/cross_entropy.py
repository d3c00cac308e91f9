"""Cross-entropy of rows of logits in the dtype they come in: they are read once for the losses, and
once more for the gradient, which overwrites them. No other tensor has their size.

Shapes: N rows, V entries of the vocabulary, or of this rank's part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _cross_entropy_forward(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    own_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Of a row the logarithm of the sum of exponentials, found in one pass, and its label's logit:
    0 where another rank has it."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = logits_ptr + row * width + column
        logits = tl.load(place, mask=column < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(logits, axis=0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift), axis=0)
        highest = above
    label = tl.load(labels_ptr + row) - first
    here = (label >= 0) & (label < width)
    own = tl.load(logits_ptr + row * width + label, mask=here, other=0.0).to(tl.float32)
    tl.store(totals_ptr + row + tl.arange(0, 1), highest + tl.log(total))
    tl.store(own_ptr + row, own)


@triton.jit
def _cross_entropy_backward(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    first: tl.tensor,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + row * width + column
    logits = tl.load(place, mask=column < width, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + row) - first
    probability = tl.exp(logits - tl.load(totals_ptr + row))
    gradient = tl.where(column == label, probability - 1.0, probability)
    tl.store(place, gradient * tl.load(grad_ptr + row), mask=column < width)


def _sums(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the logarithm of the sum of exponentials, and its label's logit."""
    rows, width = logits_NV.shape
    totals_N, own_N = logits_NV.new_empty((2, rows), dtype=torch.float32)
    if rows:
        given = (logits_NV, labels_N, totals_N, own_N, first)
        _cross_entropy_forward[(rows,)](*given, width, BLOCK, num_warps=8)
    return totals_N, own_N


def _gradient(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    totals_N: torch.Tensor,
    grad_N: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """Overwrites the logits by their gradient."""
    rows, width = logits_NV.shape
    if rows:
        given = (logits_NV, labels_N, totals_N, grad_N.contiguous(), first)
        grid = (rows, triton.cdiv(width, BLOCK))
        _cross_entropy_backward[grid](*given, width, BLOCK, num_warps=8)
    return logits_NV


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        labels_N: torch.Tensor,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        first = logits_NV.size(1) * group.rank() if group is not None else 0
        totals_N, own_N = _sums(logits_NV, labels_N, first)
        if group is not None:
            highest_N = totals_N.clone()
            dist.all_reduce(highest_N, dist.ReduceOp.MAX, group)
            sums = torch.stack(((totals_N - highest_N).exp(), own_N))
            dist.all_reduce(sums, group=group)
            totals_N, own_N = highest_N + sums[0].log(), sums[1]
        ctx.save_for_backward(logits_NV.detach(), labels_N, totals_N)
        ctx.first = first
        return totals_N - own_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_NV, labels_N, totals_N = ctx.saved_tensors
        return _gradient(logits_NV, labels_N, totals_N, grads[0], ctx.first), None, None


def cross_entropy(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Losses `[N]`, float32. The ranks of `group` hold equal parts of the vocabulary, in order, of
    the same rows: collective."""
    return _CrossEntropy.apply(logits_NV.contiguous(), labels_N.contiguous(), group)


def losses_and_gradient(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `[N]`, float32, of a whole vocabulary, and over the logits the gradient of their sum,
    each times its weight."""
    labels_N = labels_N.contiguous()
    totals_N, own_N = _sums(logits_NV, labels_N, 0)
    return totals_N - own_N, _gradient(logits_NV, labels_N, totals_N, weights_N, 0)
