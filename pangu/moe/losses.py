"""The router's own losses, and gradients of them that do not depend on the parallel layout.

Shapes: S positions and B sequences of this rank's part of a micro-batch, T = S·B tokens, E experts.

**Auxiliary loss** of a micro-batch (arXiv 2505.21411, §2.2): L = α·Σᵢ fᵢ·pᵢ, with pᵢ the mean score
of expert i over the micro-batch's tokens (the *global* softmax; sigmoid scores are normalised to
sum 1) and fᵢ = E·cᵢ/Σⱼcⱼ from the numbers c of choices. It is α at perfect balance. A step's loss
is the mean over the micro-batches of its global batch. The scope says which choices c counts;
p is always the micro-batch's own:

- `micro_batch`: the micro-batch.
- `sequence`: each sequence by itself (p too); L is the mean over sequences.
- `ep_group`: the micro-batches whose tokens meet in this rank's expert-parallel group.
- `dp_group`: the micro-batches that the data-parallel ranks process side by side.
- `global_batch`: this micro-batch and those before it in the global batch, where micro-batch number
  n = step·DP + rank is Megatron's own order. (All of the global batch cannot be had: its later
  micro-batches are routed after the first one's backward.)

A micro-batch's tokens may be spread over the TP (sequence parallel) and CP ranks: c is summed over
them, and p enters as each rank's own addend, so that gradients summed over TP and DP·CP make the
whole. So for `micro_batch`, `sequence` and `global_batch` the gradient is the same for every
TP, CP, PP, DP and number of accumulation steps. `ep_group` and `dp_group` are named after groups:
with the group's size fixed they too are the same for every other split.

**z-loss**: coefficient · mean over tokens of logsumexp(logits)².

The backward needs one number per expert (∂L/∂score is the same for every token); the scores are
computed again from the router's input and weight, which are kept anyway. No `[T, E]` tensor
is kept for the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler


def balance_scores(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores that sum to 1 over all experts, whatever the router chooses by."""
    if score_function == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def balance_gradient(counts: torch.Tensor, coefficient: float, tokens: int) -> torch.Tensor:
    """∂L/∂score of each expert: α·fᵢ/tokens, float32.

    `counts` `[E]` with `tokens` the micro-batch's, or `[B, E]` with those of its B sequences.
    """
    frequency = counts * (counts.size(-1) / counts.sum(dim=-1, keepdim=True))
    return frequency * (coefficient / tokens)


@dataclass(frozen=True)
class Terms:
    """What the backward of the losses needs beside tensors.

    `factor` turns the gradient of a micro-batch's mean into the unit of the main loss. `record`
    is called with this rank's addends of the auxiliary loss and of the z-loss.
    """

    shape: tuple[int, int]  # S, B
    score_function: str
    z_coefficient: float
    tokens: int  # of the whole micro-batch
    factor: float | torch.Tensor
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    record: Callable[[torch.Tensor, torch.Tensor], None]


class _LossGradient(torch.autograd.Function):
    """The identity on the routing weights; its backward adds the losses' gradient to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        weights_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        input_TH: torch.Tensor,
        weight_EH: torch.Tensor,
        score_gradient: torch.Tensor,
        terms: Terms,
    ) -> torch.Tensor:
        ctx.save_for_backward(input_TH, weight_EH, score_gradient)
        ctx.terms = terms
        return weights_TE.view_as(weights_TE)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_TH, weight_EH, score_gradient = ctx.saved_tensors
        terms: Terms = ctx.terms
        logits_TE = terms.logits(input_TH, weight_EH)
        with torch.enable_grad():
            logits_TE.requires_grad_()
            scores = balance_scores(logits_TE, terms.score_function).unflatten(0, terms.shape)
            auxiliary = (scores.sum(dim=0) * score_gradient).sum()
            z = _z_loss(logits_TE, terms)
            (grad,) = torch.autograd.grad(auxiliary + z, logits_TE)
        terms.record(auxiliary.detach(), z.detach())
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        factor = terms.factor if scale is None else scale.to(grad.dtype) * terms.factor
        return grads[0], grad * factor, None, None, None, None


def _z_loss(logits_TE: torch.Tensor, terms: Terms) -> torch.Tensor:
    if not terms.z_coefficient:
        return logits_TE.new_zeros(())
    squares = logits_TE.logsumexp(dim=-1).square()
    return squares.sum() * (terms.z_coefficient / terms.tokens)


def attach(
    weights_TE: torch.Tensor,
    *,
    logits_TE: torch.Tensor,
    input_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    score_gradient: torch.Tensor,
    terms: Terms,
) -> torch.Tensor:
    """The same weights; their backward also sends the losses' gradient to `logits_TE`.

    `terms.logits(input_TH, weight_EH)` must give `logits_TE` again.
    """
    return _LossGradient.apply(
        weights_TE, logits_TE, input_TH.detach(), weight_EH.detach(), score_gradient, terms
    )
