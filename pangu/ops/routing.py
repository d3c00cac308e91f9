"""Routing in one pass, where a rule of a few numbers says how.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from pangu import backends
from pangu.ops.choice import highest_reference


@dataclass(frozen=True)
class Rule:
    """The k / num_groups experts of each group (equal and contiguous) that score highest; the
    chosen scores, divided by their sum or not, times a factor. `softmax` over all experts, or else
    sigmoid."""

    num_groups: int
    k: int
    softmax: bool
    renormalize: bool
    factor: float


def route_reference(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[T, E]`, 0 where unchosen, and choices, bool `[T, E]`, in plain operations. The
    bias moves the choice only."""
    scores = logits_TE.softmax(-1) if rule.softmax else logits_TE.sigmoid()
    ranking = scores.detach() if bias_E is None else scores.detach() + bias_E
    groups = ranking.unflatten(-1, (rule.num_groups, -1))
    chosen = highest_reference(groups, rule.k // rule.num_groups).flatten(-2)
    weights = scores.masked_fill(~chosen, 0.0)
    if rule.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.factor, chosen


def route_triton(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel each way, of float32 logits; other ones in plain operations."""
    kernels: Any = importlib.import_module("pangu.ops.kernels.routing")
    if logits_TE.dtype != torch.float32 or logits_TE.size(1) > kernels.TILE:
        return route_reference(logits_TE, bias_E, rule)
    return kernels.route(logits_TE, bias_E, rule)


def in_one_pass() -> bool:
    """Whether this process routes by `route_triton`."""
    return backends.current().operators.routing == "triton"
