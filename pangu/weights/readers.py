"""Which matrices of a layer read the same input, for methods that scale or turn it.

Shapes: R rows, C columns, E experts, H hidden, F width of an expert, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
_FIRST = ("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj")
_ROUTER = ("weight", "up_weight", "parts.weight", "parts.up_weight")


@dataclass(frozen=True)
class Readers:
    """A norm of a layer and the weights that read what it gives, by name: those that are rounded,
    and the router's, which are not. `seen` is the module whose input that is."""

    norm: str
    seen: str
    rounded: list[str]
    exact: list[str]


def norm_readers(layer: Any) -> list[Readers]:
    """The layer's two norms."""
    attention, mlp = layer.self_attention, layer.mlp
    first = [f"self_attention.{name}" for name in _FIRST if hasattr(attention, name)]
    names = dict(layer.named_parameters())
    mlps = ("mlp.linear_fc1.weight", "mlp.shared_experts.linear_fc1.weight", "mlp.experts.w1")
    router = [f"mlp.router.{part}" for part in _ROUTER] if hasattr(mlp, "router") else []
    return [
        Readers("input_layernorm", first[0], [f"{name}.weight" for name in first], []),
        Readers(
            "pre_mlp_layernorm",
            "mlp",
            [name for name in mlps if name in names],
            [name for name in router if name in names],
        ),
    ]


def matrices(name: str, weight: Tensor) -> list[Tensor]:
    """A weight as matrices `[R, C]`, views of it: a linear's own, each expert's of `experts.w1`."""
    if name.endswith("experts.w1"):
        return [expert.flatten(1).T for expert in weight]
    return [weight]
