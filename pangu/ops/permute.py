"""Rows of tokens, copied and sorted by expert, and the way back.

Shapes: T tokens, H hidden, K choices per token, E experts, N rows: T·K where every token has as
many choices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pangu import backends

NPU_KEYS = 2**24 - 1  # of npu_moe_token_permute


class Permutation(NamedTuple):
    """Where each choice of each token went.

    `order_N`: for each sorted row its choice, counted through the table that was planned from.
    `tokens_N`: its token. `slots_N`: the sorted rows in the order of tokens; token t's begin at
    `starts_T[t]`. `counts_E`: rows per expert. All int64 on the tokens' device.
    """

    order_N: torch.Tensor
    tokens_N: torch.Tensor
    slots_N: torch.Tensor
    starts_T: torch.Tensor
    counts_E: torch.Tensor
    num_choices: int | None  # K; None where tokens differ in it


def plan(experts_TK: torch.Tensor, num_experts: int) -> Permutation:
    """Sort the choices by expert, then by token (stable). `experts_TK` holds integers; a choice is
    token·K + k. No shape depends on values, so nothing here waits for the device."""
    num_choices = experts_TK.size(1)
    if backends.current().operators.permute == "triton":
        starts_T = torch.arange(0, experts_TK.numel(), num_choices, device=experts_TK.device)
        order_N, tokens_N, slots_N, counts_E = _kernels().sort_choices(experts_TK, num_experts)
        return Permutation(order_N, tokens_N, slots_N, starts_T, counts_E, num_choices)
    experts_N, order_N = experts_TK.flatten().sort(stable=True)
    slots_N = _inverse(order_N)
    starts_T = torch.arange(0, order_N.numel(), num_choices, device=order_N.device)
    bounds = torch.arange(num_experts + 1, device=order_N.device, dtype=experts_N.dtype)
    counts_E = torch.searchsorted(experts_N, bounds).diff()
    tokens_N = order_N // num_choices
    return Permutation(order_N, tokens_N, slots_N, starts_T, counts_E, num_choices)


def plan_map(chosen_TE: torch.Tensor) -> Permutation:
    """The same from a bool map, of any number of choices per token; a choice is token·E + expert.
    The host waits for the device to learn how many there are."""
    experts_N, tokens_N = chosen_TE.t().nonzero(as_tuple=True)
    order_N = tokens_N * chosen_TE.size(1) + experts_N
    counts_T = chosen_TE.sum(dim=1)
    starts_T = counts_T.cumsum(0) - counts_T
    slots_N = order_N.argsort()
    return Permutation(order_N, tokens_N, slots_N, starts_T, chosen_TE.sum(dim=0), None)


def plan_rows(
    experts_N: torch.Tensor, rows_N: torch.Tensor, num_rows: int, num_experts: int
) -> Permutation:
    """The same from a list of choices in the order of their rows: choice i is of expert
    `experts_N[i]` for row `rows_N[i]`, and every row has at least one. What is called token in a
    `Permutation` is the row here, of which there are `num_rows`."""
    sorted_N, order_N = experts_N.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=order_N.device, dtype=sorted_N.dtype)
    counts_E = torch.searchsorted(sorted_N, bounds).diff()
    starts_T = torch.searchsorted(rows_N, torch.arange(num_rows, device=rows_N.device))
    return Permutation(order_N, rows_N[order_N], _inverse(order_N), starts_T, counts_E, None)


def _inverse(order_N: torch.Tensor) -> torch.Tensor:
    places_N = torch.arange(order_N.numel(), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, places_N)


def permute_reference(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`permute` by indexing."""
    return tokens_TH[permutation.tokens_N]


def unpermute_reference(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`unpermute` by indexing."""
    sums_TH = rows_NH.new_zeros(permutation.starts_T.numel(), rows_NH.size(1))
    return sums_TH.index_add(0, permutation.tokens_N, rows_NH)


def _copy(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    return tokens_TH.index_select(0, permutation.tokens_N)


def _kernels() -> Any:
    return importlib.import_module("pangu.ops.kernels.permute")


def _copy_triton(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    return _kernels().gather(tokens_TH, permutation.tokens_N)


def _gather_sum_triton(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    _, _, slots_N, starts_T, _, num_choices = permutation
    return _kernels().gather_sum(rows_NH, slots_N, starts_T, num_choices)


def _gather_sum(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Each token's rows, read and summed in one pass; unlike an indexed addition it writes every
    token once and in a fixed order."""
    slots_N, starts_T = permutation.slots_N, permutation.starts_T
    return torch.embedding_bag(rows_NH, slots_N, starts_T, False, 0, False)[0]


Move = Callable[[torch.Tensor, Permutation], torch.Tensor]


class _Move(torch.autograd.Function):
    """One way `there`; the gradient goes the other way `back`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, permutation: Permutation, there: Move, back: Move
    ) -> torch.Tensor:
        ctx.permutation, ctx.back = permutation, back
        return there(x.contiguous(), permutation)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grads[0].contiguous(), ctx.permutation), None, None, None


def _npu_choices(permutation: Permutation) -> int:
    """Of every token; 0 where they are not as many, or more in all than the operator's sort can
    tell apart."""
    return (permutation.num_choices or 0) if permutation.slots_N.numel() < NPU_KEYS else 0


def permute_npu(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """torch-npu's operator sorts by itself: given each choice's row as its key, it puts choice i
    where `plan` did. Written against its schema; not run on an NPU."""
    if not (choices := _npu_choices(permutation)):
        return permute_torch(tokens_TH, permutation)
    torch_npu = importlib.import_module("torch_npu")
    keys_TK = permutation.slots_N.unflatten(0, (-1, choices))
    return torch_npu.npu_moe_token_permute(tokens_TH, keys_TK.to(torch.int32))[0]


def unpermute_npu(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Sums of the K rows of each token. Without probabilities the operator copies one row per
    token, hence the ones. Not run on an NPU."""
    if not (choices := _npu_choices(permutation)):
        return unpermute_torch(rows_NH, permutation)
    torch_npu = importlib.import_module("torch_npu")
    ones_TK = rows_NH.new_ones(permutation.starts_T.numel(), choices)
    slots_N = permutation.slots_N.to(torch.int32)
    return torch_npu.npu_moe_token_unpermute(rows_NH, slots_N, ones_TK)


def permute_torch(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`permute` whose gradient is a sum in one pass."""
    if not torch.is_grad_enabled():
        return _copy(tokens_TH.contiguous(), permutation)
    return _Move.apply(tokens_TH, permutation, _copy, _gather_sum)


def unpermute_torch(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`unpermute` in one pass."""
    if not torch.is_grad_enabled():
        return _gather_sum(rows_NH.contiguous(), permutation)
    return _Move.apply(rows_NH, permutation, _gather_sum, _copy)


def permute_triton(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """A gather; its gradient, a gather and sum in float32. float64 in torch's operators."""
    if tokens_TH.dtype == torch.float64:
        return permute_torch(tokens_TH, permutation)
    return _Move.apply(tokens_TH, permutation, _copy_triton, _gather_sum_triton)


def unpermute_triton(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """A gather and sum in float32; its gradient, a gather. float64 in torch's operators."""
    if rows_NH.dtype == torch.float64:
        return unpermute_torch(rows_NH, permutation)
    return _Move.apply(rows_NH, permutation, _gather_sum_triton, _copy_triton)


def permute(tokens_TH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`[N, H]`: a copy of its token for every choice, sorted by expert."""
    variants = {"torch": permute_torch, "npu": permute_npu, "triton": permute_triton}
    return variants[backends.current().operators.permute](tokens_TH, permutation)


def unpermute(rows_NH: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`[T, H]`: the sum of each token's rows, 0 where it has none."""
    variants = {"torch": unpermute_torch, "npu": unpermute_npu, "triton": unpermute_triton}
    return variants[backends.current().operators.permute](rows_NH, permutation)
