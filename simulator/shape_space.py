"""The shapes of a search: every combination of the dimensions' ranges, counted at once, and what
keeps one from being a candidate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.schema import Config, ModelConfig
from configs.violation import ConfigError, Violation
from simulator.array import Array
from simulator.parameters import (
    attention_linears,
    layer_norms,
    mlp_linears,
    query_groups,
    router_rows,
    router_scales,
)
from simulator.quality import expected_loss, model_loss, used

MOST_SHAPES = 20_000_000
DIMENSIONS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
    "num_expert_groups",
    "moe_ffn_hidden_size",
)


@dataclass(frozen=True)
class Ranges:
    """Values to try of each dimension, and limits in parameters (total and active). KV heads are
    meant for GQA: MLA has none."""

    num_layers: list[int]
    hidden_size: list[int]
    num_attention_heads: list[int]
    num_query_groups: list[int]
    num_experts: list[int]
    num_expert_groups: list[int]
    moe_ffn_hidden_size: list[int]
    parameters: tuple[float, float] = (0.0, np.inf)
    active: tuple[float, float] = (0.0, np.inf)


def enumerate_shapes(
    config: Config, ranges: Ranges, tokens: float | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, int], int]:
    """All shapes within limits, as arrays by dimension, with total and active parameters; then
    how many others there are by reason, and how many in all."""
    axes = {name: getattr(ranges, name) for name in DIMENSIONS}
    candidates = int(np.prod([float(len(values)) for values in axes.values()]))
    if candidates > MOST_SHAPES:
        reason = f"at most {MOST_SHAPES:,} at a time: take larger steps"
        raise ConfigError([Violation("shape", f"{candidates:,} shapes", reason)])
    grid = np.meshgrid(*(np.array(values) for values in axes.values()), indexing="ij")
    columns = {name: part.ravel() for name, part in zip(axes, grid, strict=True)}
    groups, top_k = columns["num_expert_groups"], config.moe.top_k
    total, active = parameters_of(config, columns)
    alive = np.ones(candidates, dtype=bool)
    rejected: dict[str, int] = {}
    for reason, bad in (
        ("query heads are no multiple of KV heads", _remainder(config.model, columns)),
        ("experts do not split over the groups", columns["num_experts"] % groups != 0),
        ("the chosen experts do not split over the groups", top_k % groups != 0),
        ("fewer experts than a token chooses", columns["num_experts"] < top_k),
        ("parameters outside the limits", _outside(total, ranges.parameters)),
        ("active parameters outside the limits", _outside(active, ranges.active)),
        ("a higher loss expected than the model's own", _worse(config, columns, active, tokens)),
    ):
        count = int((alive & bad).sum())
        if count:
            rejected[reason] = count
        alive &= ~bad
    kept = {name: values[alive] for name, values in columns.items()}
    return kept, total[alive], active[alive], rejected, candidates


def _remainder(model: ModelConfig, columns: dict[str, np.ndarray]) -> np.ndarray:
    if model.attention == "mla":  # has no KV heads of its own
        return np.zeros(len(columns["num_layers"]), dtype=bool)
    bad: np.ndarray = columns["num_attention_heads"] % columns["num_query_groups"] != 0
    return bad


def _worse(
    config: Config, columns: dict[str, np.ndarray], active: np.ndarray, tokens: float | None
) -> np.ndarray:
    if not tokens:
        return np.zeros(len(active), dtype=bool)
    width = columns["moe_ffn_hidden_size"]
    shared = np.round(_shared_ratio(config.model) * width)
    expansion, granularity = used(config, columns["num_experts"], width, shared)
    loss = expected_loss(active, expansion, granularity, tokens)
    return np.asarray(loss > model_loss(config, tokens) * (1 + 1e-9))


def _outside(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (values < limits[0]) | (values > limits[1])


def _shared_ratio(model: ModelConfig) -> float:
    return model.shared_expert_ffn_hidden_size / model.moe_ffn_hidden_size


def parameters_of(config: Config, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Total and active parameters of shapes given as arrays; `count_parameters` for each."""
    base = config.model
    shape = {name: columns[name] for name in DIMENSIONS if name != "num_expert_groups"}
    # Widths of 0 mean "none" elsewhere, which an array cannot be asked; added below.
    model: Any = replace(base, **shape, shared_expert_ffn_hidden_size=0)  # type: ignore[arg-type]
    total = np.zeros(len(columns["num_layers"]))
    hidden = model.hidden_size.astype(float)
    for groups in np.unique(columns["num_query_groups"]):
        rows = columns["num_query_groups"] == groups
        one = replace(model, num_query_groups=int(groups))
        linears = sum(linear.parameters() for linear in attention_linears(one))
        total[rows] = np.broadcast_to(linears, total.shape)[rows]
    layer = total + layer_norms(model)
    width = np.round(_shared_ratio(base) * model.moe_ffn_hidden_size)
    shared = sum(linear.parameters() for linear in mlp_linears(model, width))
    expert: Array = sum(
        linear.parameters() for linear in mlp_linears(model, model.moe_ffn_hidden_size)
    )
    router = router_rows(model, config.moe) * hidden + router_scales(model, config.moe)
    dense: Array = sum(linear.parameters() for linear in mlp_linears(model, base.ffn_hidden_size))
    dense_layers = base.num_dense_layers
    moe_layers = model.num_layers - dense_layers
    tables = base.vocab_size * hidden * (1 if base.tie_embeddings else 2)
    ends = tables + hidden * (2 if base.normalization == "LayerNorm" else 1)
    same = ends + model.num_layers * layer + dense_layers * dense + moe_layers * (router + shared)
    routed = moe_layers * expert
    return same + routed * model.num_experts, same + routed * config.moe.top_k


def shaped(config: Config, dimensions: dict[str, int]) -> Config:
    """`config` with another shape."""
    shape = {name: value for name, value in dimensions.items() if name != "num_expert_groups"}
    shared = round(_shared_ratio(config.model) * dimensions["moe_ffn_hidden_size"])
    if config.model.attention == "mla":
        shape["num_query_groups"] = config.model.num_query_groups
    model = replace(config.model, **shape, shared_expert_ffn_hidden_size=shared)  # type: ignore[arg-type]
    moe = replace(config.moe, num_expert_groups=dimensions["num_expert_groups"])
    return replace(config, model=model, moe=moe)


def dimensions_of(config: Config) -> dict[str, int]:
    model = config.model
    values = {name: getattr(model, name) for name in DIMENSIONS if name != "num_expert_groups"}
    values["num_query_groups"] = query_groups(model)
    return values | {"num_expert_groups": config.moe.num_expert_groups}
