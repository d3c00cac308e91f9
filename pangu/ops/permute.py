"""Rows of tokens, copied and sorted by expert, and the way back.

Shapes: T tokens, H hidden, K choices per token, E experts, N = T·K rows.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from pangu import backends


class Permutation(NamedTuple):
    """Where each choice of each token went.

    `order_N`: for each sorted row its choice, as token·K + k. `slots_N`: for each choice its
    sorted row. `counts_E`: rows per expert. All int64 on the tokens' device; their shapes do not
    depend on their values, so nothing here waits for the device.
    """

    order_N: torch.Tensor
    slots_N: torch.Tensor
    counts_E: torch.Tensor
    num_choices: int  # K


def plan(experts_TK: torch.Tensor, num_experts: int) -> Permutation:
    """Sort the choices by expert, then by token (stable). `experts_TK` holds integers."""
    experts_N, order_N = experts_TK.flatten().sort(stable=True)
    slots_N = torch.empty_like(order_N).scatter_(
        0, order_N, torch.arange(order_N.numel(), device=order_N.device)
    )
    bounds = torch.arange(num_experts + 1, device=order_N.device, dtype=experts_N.dtype)
    counts_E = torch.searchsorted(experts_N, bounds).diff()
    return Permutation(order_N, slots_N, counts_E, experts_TK.size(1))


def permute_reference(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`permute` by indexing."""
    return tokens_TH[permutation.order_N // permutation.num_choices]


def unpermute_reference(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`unpermute` by indexing."""
    return rows_NH[permutation.slots_N].unflatten(0, (-1, permutation.num_choices)).sum(1)


def _copy(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    return tokens_TH.index_select(0, permutation.order_N // permutation.num_choices)


def _gather_sum(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Each token's K rows, read and summed in one pass; unlike an indexed addition it writes
    every token once and in a fixed order."""
    slots_N, choices = permutation.slots_N, permutation.num_choices
    starts_T = torch.arange(0, slots_N.numel(), choices, device=slots_N.device)
    return torch.embedding_bag(rows_NH, slots_N, starts_T, False, 0, False)[0]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        ctx.permutation = permutation
        return _copy(tokens_TH, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gather_sum(grads[0].contiguous(), ctx.permutation), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        ctx.permutation = permutation
        return _gather_sum(rows_NH.contiguous(), permutation)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _copy(grads[0], ctx.permutation), None


def permute_npu(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """torch-npu's operator sorts by itself: given each choice's row as its key, it puts choice i
    where `plan` did. Written against its schema; not run on an NPU."""
    torch_npu = importlib.import_module("torch_npu")
    keys_TK = permutation.slots_N.unflatten(0, (-1, permutation.num_choices))
    return torch_npu.npu_moe_token_permute(tokens_TH, keys_TK.to(torch.int32))[0]


def unpermute_npu(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Sums of the K rows of each token. Without probabilities the operator copies one row per
    token, hence the ones. Not run on an NPU."""
    torch_npu = importlib.import_module("torch_npu")
    ones_TK = rows_NH.new_ones(
        permutation.slots_N.numel() // permutation.num_choices, permutation.num_choices
    )
    slots_N = permutation.slots_N.to(torch.int32)
    return torch_npu.npu_moe_token_unpermute(rows_NH, slots_N, ones_TK)


def permute(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`[N, H]`: a copy of its token for every choice, sorted by expert."""
    if backends.current().name == "npu":
        return permute_npu(tokens_TH, permutation)
    return _Permute.apply(tokens_TH, permutation)


def unpermute(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`[T, H]`: the sum of each token's K rows."""
    if backends.current().name == "npu":
        return unpermute_npu(rows_NH, permutation)
    return _Unpermute.apply(rows_NH, permutation)
