"""Linears with a low-rank product beside them, which alone is trained: LoRA (arXiv 2106.09685),
y = W·x + α/r · B·A·x, in training with dropout of the second x. In every layout of tensor
parallelism the whole A and B are the same.

Shapes: r rank; inputs and outputs are those of the linear.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from pangu import backends
from pangu.ops.rounded_linear import RoundedColumn, RoundedRow


def _matrix(linear: Any, rows: int, columns: int, cut: int | None) -> torch.nn.Parameter:
    """Zeros `[rows, columns]`, which `pangu.model.init` fills; of a whole that is cut along
    dimension `cut` over the tensor-parallel ranks, or (None) the same on all of them."""
    options = {"dtype": linear.config.params_dtype, "device": backends.current().device}
    parameter: Any = torch.nn.Parameter(torch.zeros(rows, columns, **options))
    if cut is not None:
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = cut, 1
    else:  # where ranks see parts of the sequence, the engine adds its gradients up over them
        parameter.sequence_parallel = linear.sequence_parallel
    return parameter


def _scale(linear: Any) -> float:
    return float(linear.config.lora_alpha / linear.config.lora_rank)


def _dropped(linear: Any, x: torch.Tensor, *, cut: bool) -> torch.Tensor:
    """What an adapter reads of `x` in training. Where x is `cut`, every tensor-parallel rank draws
    a mask of its own for its part; else all of them hold the whole x and draw the same mask."""
    part = linear.config.lora_dropout
    if not part or not linear.training:
        return x
    with get_cuda_rng_tracker().fork() if cut else nullcontext():
        return F.dropout(x, part)


def _sharded(
    linear: Any, cuts: dict[str, int], prefix: str, offsets: tuple, metadata: dict
) -> dict[str, Any]:
    groups = {"tp_group": linear.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    tensors = linear.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(tensors, prefix, cuts, offsets, **groups)


class LoraColumn(RoundedColumn):
    """Cut by its outputs: `lora_a` `[r, inputs]` whole, `lora_b` `[outputs, r]` cut with them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rank = self.config.lora_rank
        self.lora_a = _matrix(self, rank, self.input_size, None)
        self.lora_b = _matrix(self, self.output_size_per_partition, rank, 0)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = super().forward(input_, *args, **kwargs)
        low = F.linear(_dropped(self, input_, cut=self.sequence_parallel), self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return output + F.linear(low, self.lora_b) * _scale(self), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        cuts = {"weight": 0, "bias": 0, "lora_b": 0}
        found = _sharded(self, cuts, prefix, sharded_offsets, metadata)
        if getattr(self.weight, "gated", False):  # a rank has its part of gate and of up
            name = f"{prefix}lora_b"
            found[name] = apply_swiglu_sharded_factory(found[name], sharded_offsets)
        return found


class LoraRow(RoundedRow):
    """Cut by its inputs: `lora_a` `[r, inputs]` cut with them, `lora_b` `[outputs, r]` whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rank = self.config.lora_rank
        self.lora_a = _matrix(self, rank, self.input_size_per_partition, 1)
        self.lora_b = _matrix(self, self.output_size, rank, None)

    def forward(self, input_: torch.Tensor) -> Any:
        output, bias = super().forward(input_)
        low = F.linear(_dropped(self, input_, cut=True), self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + F.linear(low, self.lora_b) * _scale(self), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        return _sharded(self, {"weight": 1, "lora_a": 1}, prefix, sharded_offsets, metadata)


def column(config: Any, name: str) -> type[ColumnParallelLinear]:
    """The linear called `name` in a model of `config`, cut by its outputs: perhaps with rounded
    inputs, perhaps with an adapter."""
    if name in config.lora_modules:
        return LoraColumn
    return RoundedColumn if config.rounds_inputs else ColumnParallelLinear


def row(config: Any, name: str) -> type[RowParallelLinear]:
    """The same, cut by its inputs."""
    if name in config.lora_modules:
        return LoraRow
    return RoundedRow if config.rounds_inputs else RowParallelLinear
