"""AdamW (arXiv 1711.05101) over many tensors, told on the device whether and how: by what factor to
clip, and whether anything is to change at all."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw as foreach_adamw

from pangu import backends


class State(NamedTuple):
    """Of one tensor: its main copy in float32 or wider, gradient, moments (in float32 or bfloat16),
    and the weights in 16 bits that follow the main copy; None where it is the weights itself."""

    main: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    weights: torch.Tensor | None


class Rule(NamedTuple):
    """What the host knows."""

    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


class Verdict(NamedTuple):
    """What the device knows, each `[1]` in float32: the `step`, from 1, that this update is if it
    is one; the factor of all gradients; and 1 in `bad` where nothing is to change, else 0."""

    step: torch.Tensor
    clip: torch.Tensor
    bad: torch.Tensor


def adamw_reference(states: Sequence[State], rule: Rule, verdict: Verdict) -> None:
    """`adamw` tensor by tensor, in plain operations, in the main copy's precision."""
    lr, beta1, beta2, epsilon, decay = rule
    number, clip, bad = (told[0] for told in verdict)
    for main, gradient, exp_avg, exp_avg_sq, weights in states:
        step = number.to(torch.float64)
        first, second = (1 - beta1**step).to(main.dtype), (1 - beta2**step).to(main.dtype)
        grad = gradient * clip
        mean = exp_avg.to(main.dtype).lerp(grad, 1 - beta1)
        square = (beta2 * exp_avg_sq.to(main.dtype)).addcmul(grad, grad, value=1 - beta2)
        size = square.sqrt() / second.sqrt() + epsilon
        new = main * (1 - lr * decay) - lr / first * mean / size
        for old, found in ((main, new), (exp_avg, mean), (exp_avg_sq, square)):
            old.copy_(torch.where(bad == 0, found, old))
        if weights is not None:
            weights.copy_(main)


def adamw_torch(states: Sequence[State], rule: Rule, verdict: Verdict) -> None:
    """torch's own step over lists of tensors, which the host alone can leave out: it asks once."""
    if any(state.exp_avg.dtype != state.main.dtype for state in states):
        return adamw_reference(states, rule, verdict)
    if verdict.bad.item():
        return None
    main, gradients, exp_avg, exp_avg_sq, _ = (list(each) for each in zip(*states, strict=True))
    torch._foreach_mul_(gradients, verdict.clip[0].to(main[0].dtype))
    before = verdict.step.cpu() - 1
    foreach_adamw(
        main,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        [before.clone() for _ in states],
        foreach=True,
        amsgrad=False,
        beta1=rule.beta1,
        beta2=rule.beta2,
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        eps=rule.epsilon,
        maximize=False,
    )
    return _follow(states)


def _follow(states: Sequence[State]) -> None:
    """Write weights in 16 bits as their main copies are."""
    weights = [state.weights for state in states if state.weights is not None]
    if weights:
        torch._foreach_copy_(weights, [s.main for s in states if s.weights is not None])


def adamw_fused(states: Sequence[State], rule: Rule, verdict: Verdict) -> None:
    """torch's fused step, whose moments have the main copy's dtype; it scales the gradients where
    they lie. Then the weights."""
    if any(state.exp_avg.dtype != state.main.dtype for state in states):
        return adamw_reference(states, rule, verdict)
    main, gradients, exp_avg, exp_avg_sq, _ = (list(each) for each in zip(*states, strict=True))
    torch._fused_adamw_(
        main,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        [verdict.step] * len(states),
        lr=rule.lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=rule.weight_decay,
        eps=rule.epsilon,
        amsgrad=False,
        maximize=False,
        grad_scale=1 / verdict.clip,
        found_inf=verdict.bad,
    )
    return _follow(states)


def adamw_triton(states: Sequence[State], rule: Rule, verdict: Verdict) -> None:
    """One kernel for all tensors, everything read and written once; float64 as `adamw_fused`."""
    if any(state.main.dtype == torch.float64 for state in states):
        return adamw_fused(states, rule, verdict)
    return importlib.import_module("pangu.ops.kernels.adamw").adamw(states, rule, verdict)


def adamw(states: Sequence[State], rule: Rule, verdict: Verdict) -> None:
    """Update main copies, moments and weights in place; the host is not asked. Nothing is asked of
    gradients that are not finite but that `bad` says so; what they hold afterwards is left open."""
    variants = {"torch": adamw_torch, "fused": adamw_fused, "triton": adamw_triton}
    if states:
        variants[backends.current().operators.adamw](states, rule, verdict)
