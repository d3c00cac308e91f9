"""SwiGLU between two matrices, where no gradient is wanted and no other rank has a part of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP

from pangu.ops.linear import linear


def is_plain(mlp: MLP) -> bool:
    """Whether a module of the engine's is that and nothing else."""
    config = mlp.config
    return (
        type(mlp.linear_fc1) is ColumnParallelLinear
        and type(mlp.linear_fc2) is RowParallelLinear
        and config.gated_linear_unit
        and config.activation_func is F.silu
        and config.tensor_model_parallel_size == 1
    )


def dense_mlp(mlp: MLP, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A plain MLP's output, `[..., H]` to the same, and the bias that is still to be added."""
    gate, up = linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias).chunk(2, dim=-1)
    return linear(F.silu(gate).mul_(up), mlp.linear_fc2.weight), mlp.linear_fc2.bias
