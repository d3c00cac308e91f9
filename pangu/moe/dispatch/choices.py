"""From the routing map to the list of choices, in shapes known beforehand where they can be."""

from __future__ import annotations

import torch

from configs.schema import MoEConfig
from pangu.ops.choice import choices
from pangu.ops.permute import Permutation, plan, plan_map


def choices_per_token(moe: MoEConfig) -> int | None:
    """How many experts every token has; None where tokens differ in it."""
    return moe.top_k if moe.fixed_choices else None


def pack(weights_TE: torch.Tensor, chosen_TE: torch.Tensor, k: int | None) -> torch.Tensor:
    """What another rank must know of the choices: `[T, 2k]`, experts and then weights. Expert
    numbers ride as floats, which hold them exactly. `k` is the number of every token's choices;
    where tokens differ in it (None), `[T, E]`: the weights, and -0.0, which no chosen expert has,
    for those not chosen."""
    if k is None:
        return torch.where(chosen_TE, weights_TE + 0.0, -0.0)
    experts_TK, weights_TK = choices(weights_TE, chosen_TE, k)
    return torch.cat([experts_TK.to(weights_TE.dtype), weights_TK], dim=-1)


def unpack(
    packed: torch.Tensor, k: int | None, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bool choices `[T, count]` of the experts from `first` on, of what was packed.
    No shape depends on values."""
    if k is None:
        weights = packed[:, first : first + count]
        return weights, ~((weights == 0) & weights.signbit())
    experts_TK, weights_TK = packed.split(k, dim=-1)
    places = experts_TK.detach().long() - first
    # Other experts' weights end in a column of their own, which is left out.
    places = torch.where((places >= 0) & (places < count), places, count)
    wide = (packed.size(0), count + 1)
    weights = weights_TK.new_zeros(wide).scatter(1, places, weights_TK)
    chosen = torch.zeros(wide, dtype=torch.bool, device=packed.device).scatter(1, places, True)
    return weights[:, :count], chosen[:, :count]


def sort_by_expert(
    weights_TE: torch.Tensor, chosen_TE: torch.Tensor, k: int | None
) -> tuple[Permutation, torch.Tensor]:
    """The rows of all choices sorted by expert, and their weights `[N]`. `k` is the number of
    every token's choices; None where tokens differ in it."""
    if k is None:
        permutation = plan_map(chosen_TE)
        return permutation, weights_TE.flatten().index_select(0, permutation.order_N)
    experts_TK, weights_TK = choices(weights_TE, chosen_TE, k)
    permutation = plan(experts_TK, chosen_TE.size(1))
    return permutation, weights_TK.flatten().index_select(0, permutation.order_N)
