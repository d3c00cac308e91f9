"""The bias that balances experts without a loss (arXiv 2408.15664, section 3): it joins the scores
for the choice alone, and moves by a fixed rate towards an even load after each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def balance(chunks: list[Any], update_rate: float, *, skipped: torch.Tensor | bool) -> None:
    """After a step: b_i += rate * sign(mean count - count of i) in every router that has a bias,
    and counting starts anew. A step that was `skipped`, on a device 1 `[1]`, moves nothing.
    Collective over the ranks that see different tokens."""
    modules: Iterable[Any] = (module for chunk in chunks for module in chunk.modules())
    routers = [m for m in modules if getattr(m, "local_tokens_per_expert", None) is not None]
    if not routers:
        return
    with torch.no_grad():
        counts_LE = torch.stack([router.local_tokens_per_expert for router in routers])
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(counts_LE, group=group)
        rate = update_rate * (1.0 - skipped)
        moves = torch.sign(counts_LE.mean(dim=-1, keepdim=True) - counts_LE) * rate
        for router, move_E in zip(routers, moves, strict=True):
            router.expert_bias += move_E
        for router in routers:
            router.local_tokens_per_expert.zero_()
