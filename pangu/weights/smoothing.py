"""Channels scaled up in a weight and down before it: AWQ (arXiv 2306.00978) chooses the scales that
rounding errors suffer least from, SmoothQuant (arXiv 2211.10438) those that make activations easy
to round. Both leave the float model as it is.

Shapes: R rows, C columns (channels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pangu.weights.quantize import Scheme, grid_of, output_error

Tensor = torch.Tensor


def awq_scales(
    products: Sequence[tuple[Tensor, Tensor]],
    size_C: Tensor,
    scheme: Scheme,
    stored: torch.dtype,
    steps: int = 20,
) -> Tensor:
    """Of s = size^a, a in 0, 1/20, … 19/20, the one that leaves the outputs of `products` nearest
    to those of the float weights: `[C]`, all ones where a = 0 does.

    `size_C` is the mean |x| of every channel over calibration tokens; each product is a weight
    `[R, C]` and the sum of x·xᵀ `[C, C]` over the inputs that it saw.
    """
    size = size_C.float().clamp(min=1e-6)
    best, least = torch.ones_like(size), float("inf")
    for step in range(steps):
        scales = size ** (step / steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight, gram in products:
            scaled, across = weight.float() * scales, gram / torch.outer(scales, scales)
            grid = grid_of(scaled, scheme, stored)
            error += float(output_error(scaled, grid, scheme, across).sum())
        if error < least:
            best, least = scales, error
    return best


def smooth_scales(weights: Sequence[Tensor], largest_C: Tensor, alpha: float = 0.85) -> Tensor:
    """max|x|^α / max|w|^(1-α) by channel, `[C]`: one vector for all matrices that read the same
    input. `largest_C` is the largest |x| of every channel over calibration tokens."""
    widest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    scales = largest_C.float().clamp(min=1e-5) ** alpha / widest.clamp(min=1e-5) ** (1 - alpha)
    return scales.clamp(min=1e-5)
