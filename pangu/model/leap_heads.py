"""Leap multi-token prediction (L-MTP, arXiv 2505.17505): heads that predict tokens further on.

Of n heads with stride k, head i (from 0) predicts the token k·i + 1 positions on. Head 0 is the
model's own; the others are residual blocks on the same hidden state, each with a copy of the
model's head (Medusa's form, arXiv 2401.10774). Stride 1 is plain multi-token prediction.

Shapes: s = sequence (of this rank), b = batch, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from pangu import backends
from pangu.model.head import Head, Targets, gives_losses
from pangu.ops.linear import linear


class LeapHead(MegatronModule):
    """z + SiLU(W·z + b), then logits by a head of its own, cut over the vocabulary like the
    model's. W and b are zero at first: until it is trained, the head says what the model's says.

    Every rank of a tensor-parallel group holds all of W. Where each sees a part of the sequence
    only, the engine sums its gradient over them, as it does for norms.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(config=config)
        size, dtype = config.hidden_size, config.params_dtype
        options = {"dtype": dtype, "device": backends.current().device}
        self.leap_weight = torch.nn.Parameter(torch.zeros(size, size, **options))
        self.leap_bias = torch.nn.Parameter(torch.zeros(size, **options))
        for parameter in (self.leap_weight, self.leap_bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.output_layer = Head(
            size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
        )

    def forward(self, hidden: torch.Tensor, gather: bool | None = None) -> torch.Tensor:
        """hidden `[s, b, H]` → logits `[full s, b, vocab of this rank]`; of the whole vocabulary
        if `gather`; or losses, as its `output_layer` has targets."""
        if not torch.is_grad_enabled() and self.config.tensor_model_parallel_size == 1:
            hidden = hidden + F.silu(linear(hidden, self.leap_weight, self.leap_bias))
            return linear(hidden, self.output_layer.weight)
        hidden = hidden + F.silu(F.linear(hidden, self.leap_weight, self.leap_bias))
        logits, _ = self.output_layer(hidden, runtime_gather_output=gather)
        return logits


class LeapHeads(MegatronModule):
    """Heads 1 to n - 1 by their numbers from 0: `0` is the first beside the model's own."""

    def __init__(self, config: TransformerConfig, heads: int, vocab_size: int) -> None:
        super().__init__(config=config)
        for number in range(heads - 1):
            self.add_module(str(number), LeapHead(config, vocab_size))

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, number: int) -> LeapHead:
        return self._modules[str(number)]


class LeapTargets(NamedTuple):
    """What the heads beside the model's own should say: `labels` `[b, s, n - 1]` int64, and
    `mask` `[b, s, n - 1]` float32, 1 where there is something to say."""

    labels: torch.Tensor
    mask: torch.Tensor


def leap_targets(
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    documents: torch.Tensor | None,
    heads: int,
    stride: int,
) -> LeapTargets:
    """Targets of whole sequences: labels and loss_mask `[b, s]` of the model's own head, documents
    `[b, s + 1]` that each token and the last label belong to; None: all to one.

    A label further on must be trained on itself, must not be behind the sequence's end, and must
    belong to the same document as the token that the head stands at.
    """
    found_labels, masks = [], []
    for number in range(1, heads):
        ahead = min(stride * number, labels.size(1))
        rest = labels.size(1) - ahead
        mask = loss_mask[:, ahead:]
        if documents is not None:
            mask = mask * (documents[:, ahead + 1 :] == documents[:, :rest])
        found_labels.append(F.pad(labels[:, ahead:], (0, ahead)))
        masks.append(F.pad(mask, (0, ahead)))
    return LeapTargets(torch.stack(found_labels, dim=-1), torch.stack(masks, dim=-1))


def leap_losses(
    heads: LeapHeads,
    hidden: torch.Tensor,
    targets: LeapTargets,
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """The losses of each head's labels, `[b, s]` in nats, 0 where there is none; hidden
    `[s, b, H]`. `cross_entropy`: of labels `[b, s]` and this rank's logits `[s, b, vocab]`."""
    found = []
    for number in range(len(heads)):
        labels, mask = targets.labels[..., number], targets.mask[..., number]
        if gives_losses(heads.config.tensor_model_parallel_size):
            heads[number].output_layer.targets = (Targets(labels, mask),)
        found.append(cross_entropy(labels, heads[number](hidden)) * mask)
    return found
