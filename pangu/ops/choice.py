"""The highest entries of each row, and the list of the entries chosen.

Shapes: X entries in a row, k of them chosen.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from pangu import backends


def highest_reference(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`highest` by a stable sort."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def highest_torch(scores: torch.Tensor, k: int) -> torch.Tensor:
    """By comparison with the k-th value, since `torch.topk` promises no order among equals."""
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    last = scores.topk(k, dim=-1).values[..., -1:] if k > 1 else scores.amax(-1, keepdim=True)
    above, level = scores > last, scores == last
    missing = k - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return above | (level & (level.cumsum(dim=-1, dtype=torch.int32) <= missing))


def highest_triton(scores: torch.Tensor, k: int) -> torch.Tensor:
    """k searches for a row's highest, in registers; what has no room there, and float64, whose
    neighbours float32 takes for equal, as `highest_torch`."""
    if not _in_registers(scores, k):
        return highest_torch(scores, k)
    return _kernels().highest(scores, k)


def highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Bool mask of exactly k entries in each row (last dimension), the highest; of equal ones the
    lowest index first. NaN counts as lowest: a step gone wrong still has its static shape."""
    variants = {"torch": highest_torch, "triton": highest_triton}
    return variants[backends.current().operators.choice](scores, k)


def choices_torch(
    weights: torch.Tensor, chosen: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the k highest of distinct keys, and a gather."""
    size = chosen.size(-1)
    # Distinct keys, larger for lower indices: the k highest are the chosen ones in order.
    keys = torch.arange(size, 0, -1, dtype=torch.int32, device=chosen.device) * chosen
    indices = size - keys.topk(k, dim=-1).values.long()
    return indices, weights.gather(-1, indices)


def choices_triton(
    weights: torch.Tensor, chosen: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel each way; where it does not fit, as `choices_torch`."""
    if not _in_registers(weights, k):
        return choices_torch(weights, chosen, k)
    return _kernels().choices(weights, chosen, k)


def choices(
    weights: torch.Tensor, chosen: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, ascending, and weights of the k chosen entries of each row: both `[..., k]`.

    `weights` and the bool `chosen` are `[..., X]` with exactly k chosen in each row. Nothing here
    has a shape that depends on values, so the host need not wait for the device.
    """
    variants = {"torch": choices_torch, "triton": choices_triton}
    return variants[backends.current().operators.choice](weights, chosen, k)


def _kernels() -> Any:
    return importlib.import_module("pangu.ops.kernels.choice")


def _in_registers(rows: torch.Tensor, k: int) -> bool:
    kernels = _kernels()
    fits = rows.size(-1) <= kernels.WIDEST and k <= kernels.MOST
    return fits and rows.dtype != torch.float64
