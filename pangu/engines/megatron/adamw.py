"""AdamW that is told on the device what to do, in the place of the one that megatron-core makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pangu import backends
from pangu.ops.adamw import Rule, State, Verdict, adamw


class AdamW(torch.optim.AdamW):
    """`clip` and `bad`, each float32 `[1]` on the device, are set before every step: the factor of
    the gradients, and 1 where nothing is to change. The host waits for neither.

    Updates are counted on the device too, by `step` of each parameter group. `moments` is their
    dtype, or None for the main copies' own; `weights` are those in 16 bits by main copy.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        moments: torch.dtype | None,
        weights: Mapping[torch.Tensor, torch.Tensor],
    ) -> None:
        device = backends.current().device
        # torch takes no views, which pieces of weights are; the engine puts them in place so too.
        super().__init__([torch.zeros(1, device=device)])
        self.param_groups = groups
        self.moments, self.weights = moments, weights
        self.clip = torch.ones(1, device=device)
        self.bad = torch.zeros(1, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update everything that has a gradient."""
        for group in self.param_groups:
            counted = group.get("step", 0)
            if not isinstance(counted, torch.Tensor):
                counted = torch.full_like(self.bad, counted)
            group["step"] = counted = counted + (1 - self.bad)
            beta1, beta2 = group["betas"]
            rule = Rule(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            states = [self._state(main) for main in group["params"] if main.grad is not None]
            adamw(states, rule, Verdict(counted, self.clip, self.bad))

    def _state(self, main: torch.Tensor) -> State:
        kept = self.state[main]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in kept:
                kept[name] = self.zeros(main)
        assert main.grad is not None
        return State(main, main.grad, kept["exp_avg"], kept["exp_avg_sq"], self.weights.get(main))

    def zeros(self, main: torch.Tensor) -> torch.Tensor:
        """A moment before the first step."""
        return torch.zeros_like(main, dtype=self.moments, memory_format=torch.contiguous_format)
