"""The projection on the vocabulary, which may give losses in the place of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from pangu import backends
from pangu.ops.linear_cross_entropy import linear_cross_entropy


class Targets(NamedTuple):
    """What a call of a head is to say: `labels` `[b, s]` int64, and `weights` `[b, s]`, by which
    whoever gets the losses multiplies them, and by one factor more."""

    labels: torch.Tensor
    weights: torch.Tensor


class Head(ColumnParallelLinear):
    """The engine's layer. With `targets` its next call takes the first of them and gives losses
    `[b, s]`, at least float32, where logits would be: only of a whole vocabulary."""

    targets: tuple[Targets, ...] = ()

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.targets:
            return super().forward(input_, weight, runtime_gather_output)
        (labels, weights), *rest = self.targets
        self.targets = tuple(rest)
        losses = linear_cross_entropy(
            input_.flatten(0, 1),
            self.weight if weight is None else weight,
            labels.t().flatten(),
            weights.t().flatten(),
        )
        return losses.view(input_.shape[:2]).t().contiguous(), None


def gives_losses(tensor_parallel: int) -> bool:
    """Whether heads are to be given their targets."""
    chunks = backends.current().operators.linear_cross_entropy == "chunks"
    return tensor_parallel == 1 and chunks
