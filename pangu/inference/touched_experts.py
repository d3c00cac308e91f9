"""How many experts a pass of the model wakes, counted at its routers."""

from __future__ import annotations

from typing import Any

import torch

from pangu.moe.router import ExpertRouter


class TouchedExperts:
    """Watches the routers of a model; `take` gives the mean over MoE layers of the experts that
    any token chose since it was last called."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._counts: list[float] = []
        for module in model.modules():
            if isinstance(module, ExpertRouter):
                module.register_forward_hook(self._saw)

    def _saw(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        chosen_TE = output[1]
        self._counts.append(float(chosen_TE.any(dim=0).sum()))

    def take(self) -> float | None:
        counts, self._counts = self._counts, []
        return sum(counts) / len(counts) if counts else None
