"""A model with fewer experts: which stay in each layer, and what becomes of the tensors.

Shapes: E experts, M experts that stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from configs.schema import Config, MoEConfig
from pangu.checkpoint.tensor_files import Source, WeightsError

Kept = Mapping[str, list[int]]  # by layer (`decoder.layers.3.mlp`): experts, in order
# Everything of a router and of routed experts has the experts in its first dimension, but for what
# is done to the inputs of all of them.
_BY_EXPERT = re.compile(r"(?P<layer>.+\.mlp)\.(?P<part>router|experts)\.(?!.*input_rounding).+")


def layer_and_part(name: str) -> tuple[str, str] | None:
    """Of a tensor with a row an expert: its layer, and "router" or "experts"; None of others."""
    found = _BY_EXPERT.fullmatch(name)
    return (found["layer"], found["part"]) if found else None


def _groups(moe: MoEConfig) -> int:
    """Groups of experts that stay equally large."""
    return moe.num_expert_groups if moe.router in ("moge", "group_limited") else 1


def experts_left(config: Config, keep: float) -> int:
    """How many experts stay in every layer, of each group equally many.

    Raises:
        WeightsError: there are none, tokens would choose more, or experts choose their tokens.
    """
    model, moe = config.model, config.moe
    if not model.num_experts:
        raise WeightsError("the model has no experts to prune; `pangu.compress carve` makes some")
    if moe.router in ("expert_choice", "forced_balance"):
        raise WeightsError(f"with moe.router={moe.router} no task has experts of its own")
    if moe.expert_parts:
        raise WeightsError("the model's experts are carved: prune the model that they come from")
    groups, least = _groups(moe), moe.top_k // moe.equal_groups
    if moe.router == "group_limited":
        least = -(-moe.top_k // moe.topk_group)
    size = model.num_experts // groups
    left = max(1, round(size * keep))
    if left < least:
        where = f" of each of {groups} groups" if groups > 1 else ""
        reason = f"leaves {left} of {size} experts{where}, and a token chooses {least}"
        raise WeightsError(f"keeping {keep:g} {reason}: keep at least {least / size:.3g}")
    return groups * left


def kept_experts(config: Config, scores: Mapping[str, torch.Tensor], keep: float) -> Kept:
    """The highest scores `[E]` of each layer, in MoGE and group-limited layers of each group; of
    equal ones the lowest numbers.

    Raises:
        WeightsError: see `experts_left`.
    """
    groups = _groups(config.moe)
    each = experts_left(config, keep) // groups
    kept = {}
    for layer, scores_E in scores.items():
        scores_GX = scores_E.unflatten(0, (groups, -1))
        best_GM = scores_GX.argsort(dim=-1, descending=True, stable=True)[:, :each].sort(-1).values
        first_G1 = torch.arange(groups)[:, None] * scores_GX.size(1)
        kept[layer] = (best_GM + first_G1).flatten().tolist()
    return kept


def pruned_config(config: Config, keep: float) -> Config:
    """The model with fewer experts; how they are chosen stays.

    Raises:
        WeightsError: see `experts_left`.
    """
    return replace(config, model=replace(config.model, num_experts=experts_left(config, keep)))


def pruned_tensors(source: Source, kept: Kept) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, of routers and experts the rows that stay. A balancing bias, a learned scale
    go with their expert; weights are normalised over what is left as the router has it."""
    for name in source.names():
        yield name, pruned(name, source.read(name), kept)


def pruned(name: str, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """A tensor of the whole model, or of its quantisation: its experts' rows that stay."""
    place = layer_and_part(name)
    return tensor[torch.tensor(kept[place[0]])] if place else tensor
