"""From the routing map to the list of choices, in shapes known beforehand where they can be."""

from __future__ import annotations

import torch

from pangu.ops.permute import Permutation, plan, plan_map


def choices(
    weights: torch.Tensor, chosen: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, ascending, and weights of the k chosen entries of each row: both `[..., k]`.

    `weights` and the bool `chosen` are `[..., E]` with exactly k chosen in each row. Nothing here
    has a shape that depends on values, so the host need not wait for the device.
    """
    size = chosen.size(-1)
    # Distinct keys, larger for lower indices: the k highest are the chosen ones in order.
    keys = torch.arange(size, 0, -1, dtype=torch.int32, device=chosen.device) * chosen
    indices = size - keys.topk(k, dim=-1).values.long()
    return indices, weights.gather(-1, indices)


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
