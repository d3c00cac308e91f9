"""Experts of several parts: CMoE (arXiv 2502.04416) inside every expert of an MoE layer.

Shapes: T tokens, E whole experts, P parts of each, of which the first are shared and R are chosen
from.
"""

from __future__ import annotations

from typing import Any

import torch

from pangu.moe.config import MoETransformerConfig
from pangu.moe.routing import softmax
from pangu.ops.choice import highest


class ExpertParts(torch.nn.Module):
    """From choices among experts to choices among their parts. `weight` and `up_weight` `[E·R, H]`
    are the rows of the neurons that speak for a part; `scale` `[E·R]` is learned, from 0 on.

    The paper says that its carving works inside experts, and no more: that the outer choice and its
    weight stay, and that scores of parts are compared inside their expert, is our reading.
    """

    def __init__(self, config: MoETransformerConfig) -> None:
        super().__init__()
        moe, count = config.moe, config.num_moe_experts
        assert count is not None
        self.shared, self.active = moe.shared_parts, moe.active_parts
        self.chosen_from = moe.expert_parts - moe.shared_parts
        rows = count // moe.expert_parts * self.chosen_from

        def zeros(*shape: int) -> torch.nn.Parameter:
            parameter: Any = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
            parameter.sequence_parallel = config.sequence_parallel
            return parameter

        self.weight = zeros(rows, config.hidden_size)
        self.up_weight = zeros(rows, config.hidden_size)
        self.scale = zeros(rows)

    def forward(
        self, logits: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gated logits of parts `[T, E·R]`, weights and choices of experts `[T, E]` → weights and
        choices of parts `[T, E·P]`: an expert's weight, for a part of choice times 1 + s'·u."""
        scores_TER = softmax(logits.unflatten(-1, (-1, self.chosen_from)))
        with torch.no_grad():
            on_TER = highest(scores_TER, self.active)
        factor_TER = 1 + scores_TER * self.scale.view(-1, self.chosen_from).to(scores_TER.dtype)
        always = (self.shared, 0)  # the shared parts come first
        on_TEP = torch.nn.functional.pad(on_TER, always, value=True) & chosen_TE[..., None]
        factor_TEP = torch.nn.functional.pad(factor_TER, always, value=1.0)
        weights_TEP = (weights_TE[..., None] * factor_TEP).masked_fill(~on_TEP, 0.0)
        return weights_TEP.flatten(1), on_TEP.flatten(1)
