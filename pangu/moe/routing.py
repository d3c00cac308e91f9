"""Routing as three plain functions: scores → choice → weights.

Shapes: T tokens, E experts, G groups, K choices per token. Each function is replaceable on its own:
a router is a `Routing`, and the kinds of routing differ in one line each of `routing_for`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from configs.schema import MoEConfig
from pangu.ops.choice import highest
from pangu.ops.routing import Rule, in_one_pass, route_triton

Scores = Callable[[torch.Tensor], torch.Tensor]
Choice = Callable[[torch.Tensor], torch.Tensor]
Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Routing:
    """`scores`: logits `[T, E]` → scores `[T, E]`. `choice`: scores (with the balancing bias, if
    any) → bool `[T, E]`. `weights`: scores (without it) and choice → `[T, E]`, 0 where unchosen.
    """

    scores: Scores
    choice: Choice
    weights: Weights

    def __call__(
        self, logits_TE: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `[T, E]` and routing map, bool `[T, E]`. The bias moves the choice only."""
        scores_TE = self.scores(logits_TE)
        with torch.no_grad():
            ranking_TE = scores_TE if expert_bias_E is None else scores_TE + expert_bias_E
            chosen_TE = self.choice(ranking_TE)
        return self.weights(scores_TE, chosen_TE), chosen_TE


@dataclass(frozen=True)
class OnePassRouting(Routing):
    """Three functions that a rule says as well, by which a kernel does all of it in one pass."""

    rule: Rule

    def __call__(
        self, logits_TE: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if in_one_pass():
            return route_triton(logits_TE, expert_bias_E, self.rule)
        return super().__call__(logits_TE, expert_bias_E)


def _rule(moe: MoEConfig) -> Rule | None:
    """The rule of a router that has one."""
    if moe.router not in ("moge", "top_k") or moe.softmax_after_top_k:
        return None
    if moe.score_function == "gated":
        return None
    return Rule(
        num_groups=moe.num_expert_groups if moe.router == "moge" else 1,
        k=moe.top_k,
        softmax=moe.score_function == "softmax",
        renormalize=moe.renormalize,
        factor=moe.scaling_factor,
    )


def routing_for(moe: MoEConfig) -> Routing:
    """The functions of a configured router; of experts with parts, among whole experts."""
    if moe.expert_parts:
        moe = replace(moe, top_k=moe.top_k // (moe.shared_parts + moe.active_parts))
    choices: dict[str, Choice] = {
        "moge": partial(moge, num_groups=moe.num_expert_groups, k=moe.top_k),
        "top_k": partial(top_k, k=moe.top_k),
        "group_limited": partial(
            group_limited,
            num_groups=moe.num_expert_groups,
            kept_groups=moe.topk_group,
            k=moe.top_k,
        ),
        "expert_choice": partial(expert_choice, k=moe.top_k),
        "forced_balance": partial(forced_balance, k=moe.top_k),
    }
    scores: Scores = sigmoid if moe.score_function == "sigmoid" else softmax
    weights: Weights = chosen_scores
    if moe.score_function == "gated":
        weights = ones
    if moe.softmax_after_top_k:
        scores, weights = identity, softmax_of_chosen
    if moe.renormalize:
        weights = partial(renormalized, weights=weights)
    if moe.scaling_factor != 1.0:
        weights = partial(scaled, weights=weights, factor=moe.scaling_factor)
    rule = _rule(moe)
    if rule is None:
        return Routing(scores, choices[moe.router], weights)
    return OnePassRouting(scores, choices[moe.router], weights, rule)


# Scores.


def softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    """Over all experts: MoGE's *global* softmax."""
    return logits_TE.softmax(dim=-1)


def sigmoid(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.sigmoid()


def identity(logits_TE: torch.Tensor) -> torch.Tensor:
    """Choose by the logits themselves; the weights make probabilities of the chosen ones."""
    return logits_TE


# Choice.


def top_k(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """The k highest of all experts."""
    return highest(scores_TE, k)


def moge(scores_TE: torch.Tensor, num_groups: int, k: int) -> torch.Tensor:
    """Mixture of Grouped Experts: the k/G highest in each of G equal, contiguous groups
    (arXiv 2505.21411, §2.1)."""
    return highest(scores_TE.unflatten(-1, (num_groups, -1)), k // num_groups).flatten(-2)


def group_limited(
    scores_TE: torch.Tensor, num_groups: int, kept_groups: int, k: int
) -> torch.Tensor:
    """DeepSeek-V3: keep the groups whose k/kept_groups best experts sum highest, then choose k
    among their experts."""
    scores_TGX = scores_TE.unflatten(-1, (num_groups, -1))
    group_scores_TG = scores_TGX.topk(max(1, k // kept_groups), dim=-1).values.sum(dim=-1)
    kept_TG = highest(group_scores_TG, kept_groups)
    return highest(scores_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(-2), k)


def expert_choice(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Each expert takes the T·k/E tokens that score highest for it (at least one). A token's
    experts then depend on later tokens: not causal."""
    tokens, experts = scores_TE.shape
    capacity = min(tokens, max(1, tokens * k // experts))
    return highest(scores_TE.t(), capacity).t()


def within_capacity(
    weights_TE: torch.Tensor, chosen_TE: torch.Tensor, factor: float, k: int
) -> torch.Tensor:
    """Of the choices `[T, E]` (bool) those that an expert has room for: factor·T·k/E of them, those
    of the highest weights, of equal ones the first tokens (capacity: arXiv 2101.03961, eq. 3)."""
    tokens, experts = chosen_TE.shape
    capacity = math.ceil(factor * tokens * k / experts)
    if capacity >= tokens:
        return chosen_TE
    wanted_TE = weights_TE.detach().masked_fill(~chosen_TE, float("-inf"))
    return highest(wanted_TE.t(), capacity).t() & chosen_TE


def forced_balance(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Token t takes experts t·k … t·k + k - 1, modulo E, whatever the scores: for benchmarks."""
    tokens, experts = scores_TE.shape
    first_T1 = torch.arange(tokens, device=scores_TE.device)[:, None] * k
    offset_TE = torch.arange(experts, device=scores_TE.device)[None, :] - first_T1
    return offset_TE.remainder(experts) < k


# Weights.


def chosen_scores(scores_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """The chosen scores as they are, 0 elsewhere: MoGE's weights."""
    return scores_TE.masked_fill(~chosen_TE, 0.0)


def ones(scores_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """1 for each chosen expert: the parts of a carved MLP add up to it (arXiv 2502.04416)."""
    return chosen_TE.to(scores_TE.dtype)


def softmax_of_chosen(logits_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """Softmax after the choice: over the chosen logits alone."""
    return logits_TE.masked_fill(~chosen_TE, float("-inf")).softmax(dim=-1)


def renormalized(
    scores_TE: torch.Tensor, chosen_TE: torch.Tensor, weights: Weights = chosen_scores
) -> torch.Tensor:
    """Weights that sum to 1 for each token."""
    weights_TE = weights(scores_TE, chosen_TE)
    return weights_TE / (weights_TE.sum(dim=-1, keepdim=True) + 1e-20)


def scaled(
    scores_TE: torch.Tensor, chosen_TE: torch.Tensor, weights: Weights, factor: float
) -> torch.Tensor:
    """Weights times a constant."""
    return weights(scores_TE, chosen_TE) * factor
