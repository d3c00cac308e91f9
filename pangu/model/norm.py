"""Normalisation layers, and the depth-scaled sandwich norm of Pangu Ultra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig

from pangu import backends
from pangu.ops.rms_norm import adds_residuals, rms_norm, rms_norm_triton


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, `[..., hidden]` to the same shape.

    megatron-core's own wrapper refuses sequence parallelism; here the weight is marked so that
    the engine sums its gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        options = {"dtype": config.params_dtype, "device": backends.current().device}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **options))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **options))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)


class SandwichResidual(torch.nn.Module):
    """h + Norm(f(Norm(h))): the residual addition with a second norm whose gain starts at
    c / sqrt(num_layers) (Pangu Ultra, depth-scaled sandwich norm).

    Takes the place of megatron-core's bias-dropout-add.
    """

    def __init__(self, config: TransformerConfig, gain: float) -> None:
        super().__init__()
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        torch.nn.init.constant_(self.norm.weight, gain / math.sqrt(config.num_layers))

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        add = get_bias_dropout_add(training, fused)

        def residual_add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual: torch.Tensor,
            prob: float,
        ) -> torch.Tensor:
            x, bias = x_with_bias
            x = x if bias is None else x + bias
            fits = self.norm.bias is None and x.dtype == residual.dtype
            if fits and prob == 0 and adds_residuals():
                return rms_norm_triton(x, self.norm.weight, self.norm.eps, residual)
            return add((self.norm(x), None), residual, prob)

        return residual_add
