"""A transformer layer that takes the place of pruned ones before it (LinearPatch,
arXiv 2505.24680)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from pangu import backends
from pangu.model.cached_layer import CachedLayer


class LayerPatch(torch.nn.Module):
    """x·P on the whole residual stream, `[..., hidden]` to the same shape; `weight` is Pᵀ, as in
    any linear.

    Every rank of a tensor-parallel group holds all of it. Where each sees a part of the sequence
    only, the engine sums its gradient over them, as it does for norms.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        options = {"dtype": config.params_dtype, "device": backends.current().device}
        self.weight = torch.nn.Parameter(torch.eye(size, **options))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PatchedLayer(CachedLayer):
    """`layer_patch`, then the layer."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.layer_patch = LayerPatch(config)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states `[seq, batch, hidden]`; the rest as the engine's layer takes it."""
        return super().forward(self.layer_patch(hidden_states), *args, **kwargs)
