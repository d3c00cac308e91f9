"""torch's matrix products in place of which others stand, wherever they are called: megatron-core's
linears, ours, einsum."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

PLACES = ("mm", "addmm", "bmm")  # what torch's linears, matmul and einsum end in


def _kernels() -> Any:
    return importlib.import_module("pangu.ops.kernels.fixed_matmul")


def mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`[N, I]` and `[I, O]` → `[N, O]`."""
    return _kernels().product(x, w)


def bmm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`[B, N, I]` and `[B, I, O]` → `[B, N, O]`."""
    return _kernels().batched(x, w)


def addmm(
    bias: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """beta·bias + alpha·x·w."""
    return beta * bias + alpha * mm(x, w)


def products_in_one_order(device: torch.device) -> torch.library.Library:
    """From now on, for as long as what is returned is held, every product on devices of that kind
    sums each of its rows in the same order, however many rows there are; without gradients."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it takes another's place
        for name in PLACES:
            library.impl(name, globals()[name], device.type.upper())
    return library
