"""From a router's logits to weights and choices, and back, in one pass each.

Shapes: T tokens, E experts in G groups of X.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 4096


@triton.jit
def _scores(logits: tl.tensor, inside: tl.tensor, softmax: tl.constexpr) -> tl.tensor:
    """Of a tile of tokens × groups × experts."""
    if softmax:
        highest = tl.max(tl.max(tl.where(inside, logits, float("-inf")), axis=2), axis=1)
        scores = tl.where(inside, tl.exp(logits - highest[:, None, None]), 0.0)
        scores /= tl.sum(tl.sum(scores, axis=2), axis=1)[:, None, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    return scores


@triton.jit
def _routing_forward(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    tokens: tl.tensor,
    factor: tl.tensor,
    groups: tl.constexpr,
    size: tl.constexpr,
    picks: tl.constexpr,
    softmax: tl.constexpr,
    renormalize: tl.constexpr,
    biased: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    group, member = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    expert = group * size + member
    known = (group < groups) & (member < size)
    inside = known & (token < tokens)
    place = token.to(tl.int64) * (groups * size) + expert
    scores = _scores(tl.load(logits_ptr + place, mask=inside, other=0.0), inside, softmax)
    ranking = scores
    if biased:
        ranking += tl.load(bias_ptr + expert, mask=known, other=0.0)
    ranking = tl.where(ranking == ranking, ranking, float("-inf"))  # NaN is lowest
    taken = tl.broadcast_to(member >= size, (ROWS, GROUPS, SIZE))
    for _ in tl.static_range(picks):
        best = tl.max(tl.where(taken, float("-inf"), ranking), axis=2)
        level = (ranking == best[:, :, None]) & (taken == 0)
        first = tl.min(tl.where(level, member, SIZE), axis=2)
        taken = taken | (member == first[:, :, None])
    weights = tl.where(taken & known, scores, 0.0)
    if renormalize:
        weights /= (tl.sum(tl.sum(weights, axis=2), axis=1) + 1e-20)[:, None, None]
    tl.store(weights_ptr + place, weights * factor, mask=inside)
    tl.store(chosen_ptr + place, taken.to(tl.int8), mask=inside)


@triton.jit
def _routing_backward(
    logits_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    tokens: tl.tensor,
    factor: tl.tensor,
    experts: tl.constexpr,
    softmax: tl.constexpr,
    renormalize: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """All experts as one group: who was chosen is known."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    expert = tl.arange(0, SIZE)[None, None, :]
    inside = (expert < experts) & (token < tokens)
    place = token.to(tl.int64) * experts + expert
    scores = _scores(tl.load(logits_ptr + place, mask=inside, other=0.0), inside, softmax)
    chosen = tl.load(chosen_ptr + place, mask=inside, other=0) != 0
    grad = factor * tl.load(grad_ptr + place, mask=inside, other=0.0)
    if renormalize:
        total = tl.sum(tl.where(chosen, scores, 0.0), axis=2)[:, :, None] + 1e-20
        mean = tl.sum(tl.where(chosen, grad * scores, 0.0), axis=2)[:, :, None] / total
        grad = (grad - mean) / total
    grad = tl.where(chosen, grad, 0.0)
    if softmax:
        grad = scores * (grad - tl.sum(grad * scores, axis=2)[:, :, None])
    else:
        grad *= scores * (1.0 - scores)
    tl.store(grad_logits_ptr + place, grad, mask=inside)


class _Route(torch.autograd.Function):
    """Keeps the logits and who was chosen."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, experts = logits_TE.shape
        weights_TE = torch.empty_like(logits_TE)
        chosen_TE = torch.empty(logits_TE.shape, dtype=torch.bool, device=logits_TE.device)
        size = experts // rule.num_groups
        widths = triton.next_power_of_2(rule.num_groups), triton.next_power_of_2(size)
        rows = max(1, TILE // (widths[0] * widths[1]))
        if tokens:
            given = (logits_TE, bias_E, weights_TE, chosen_TE.view(torch.int8))
            numbers = (tokens, rule.factor, rule.num_groups, size, rule.k // rule.num_groups)
            flags = (rule.softmax, rule.renormalize, bias_E is not None)
            _routing_forward[(triton.cdiv(tokens, rows),)](*given, *numbers, *flags, rows, *widths)
        ctx.save_for_backward(logits_TE, chosen_TE)
        ctx.mark_non_differentiable(chosen_TE)
        ctx.rule = rule
        return weights_TE, chosen_TE

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_TE, chosen_TE = ctx.saved_tensors
        rule, (tokens, experts) = ctx.rule, logits_TE.shape
        grad_logits = torch.empty_like(logits_TE)
        width = triton.next_power_of_2(experts)
        rows = max(1, TILE // width)
        if tokens:
            given = (logits_TE, chosen_TE.view(torch.int8), grads[0].contiguous(), grad_logits)
            numbers = (tokens, rule.factor, experts, rule.softmax, rule.renormalize, rows, width)
            _routing_backward[(triton.cdiv(tokens, rows),)](*given, *numbers)
        return grad_logits, None, None


def route(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and choices (bool), of float32 logits by a `pangu.ops.routing.Rule`."""
    return _Route.apply(logits_TE.contiguous(), bias_E, rule)
