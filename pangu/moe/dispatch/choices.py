"""From the routing map to the list of choices, in shapes known beforehand."""

from __future__ import annotations

import torch


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
