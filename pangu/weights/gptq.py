"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those not rounded yet make
up for the error as the inputs of the calibration text have it.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch

from pangu.weights.quantize import Grid, Scheme, grid_of, nearest_code, rounded

Tensor = torch.Tensor
_BLOCK = 128


def gptq(
    weight_RC: Tensor,
    hessian_CC: Tensor,
    scheme: Scheme,
    stored: torch.dtype,
    *,
    damp: float = 0.01,
) -> tuple[Tensor, Grid]:
    """Rounded weights `[R, C]`, float32, and their grid.

    `hessian_CC` is the sum of x·xᵀ over calibration tokens. Columns go in order of falling diagonal
    ("act-order"); each group's grid is fixed before, with the clipping of least squared error, so
    that the order leaves no trace in the file. Where no token came by, nearest rounding is left.
    """
    weight = weight_RC.float().clone()
    grid = grid_of(weight, scheme, stored, clip=True)
    hessian = hessian_CC.double().clone()
    diagonal = hessian.diagonal()
    if not diagonal.any():
        return rounded(weight, grid, scheme), grid
    diagonal[diagonal == 0] = diagonal.max()  # inputs that are always 0: any value serves
    diagonal += damp * diagonal.mean()
    order = diagonal.argsort(descending=True)
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    scale, zero = (part[:, order] for part in grid.columns(weight.size(1)))
    weight = weight[:, order]
    out = torch.empty_like(weight)
    for start in range(0, weight.size(1), _BLOCK):
        end = min(start + _BLOCK, weight.size(1))
        errors = torch.empty(weight.size(0), end - start, device=weight.device)
        for column in range(start, end):
            values, step, offset = weight[:, column], scale[:, column], zero[:, column]
            codes = nearest_code(values / step + offset, scheme)
            out[:, column] = (codes - offset) * step
            error = (values - out[:, column]) / upper[column, column]
            weight[:, column:end] -= torch.outer(error, upper[column, column:end])
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return out[:, order.argsort()], grid
