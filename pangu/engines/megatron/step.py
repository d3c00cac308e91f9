"""A global batch, micro-batch by micro-batch, through megatron-core's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model

from pangu import backends
from pangu.backends.copies import to_device
from pangu.engines.contract import Batch, StepShape
from pangu.engines.megatron.process_groups import sum_over_losses
from pangu.model.leap_heads import LeapTargets, leap_targets
from pangu.model.transformer_config import PanguTransformerConfig
from pangu.moe.config import StepTokens
from pangu.ops.attention import documents_stay_on_host


def run_schedule(
    chunks: list[Any],
    micro_batches: list[Batch],
    shape: StepShape,
    *,
    forward_only: bool = False,
) -> torch.Tensor:
    """Forward (and backward) over one global batch.

    Every model chunk reads the same `micro_batches`, which are this replica's.
    Returns (sum of token losses, tokens) over all ranks, float64 `[2]`.
    """
    batches = [iter(micro_batches) for _ in chunks]
    outputs: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks,
        num_microbatches=shape.num_microbatches,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )
    device = backends.current().device
    local = torch.zeros(2, dtype=torch.float64, device=device)
    for output in outputs:
        local += output
    return sum_over_losses(local)


def forward_step(
    batches: Iterator[Batch], model: GPTModel, settings: PanguTransformerConfig | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """megatron-core's hook: the model's output for the next micro-batch, and its loss function.

    `settings` are the model's own, where what wraps it has a `config` of another kind.
    """
    batch = dict(next(batches))
    document_ids = batch.pop("document_ids", None)  # all positions, on every context rank
    if document_ids is not None and not documents_stay_on_host():
        document_ids = to_device(document_ids)
    batch = {name: to_device(tensor) for name, tensor in batch.items()}
    further = _leap_targets(batch, settings or get_model_config(model))
    batch.pop("documents", None)
    batch = split_sequence(batch)
    if further is not None:
        further = LeapTargets(**split_sequence(further._asdict()))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        document_ids,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        leap_targets=further,
    )
    return output, partial(token_loss, batch["loss_mask"])


def split_sequence(batch: Batch) -> Batch:
    """This context-parallel rank's part of `[batch, seq, …]` tensors: chunks r and 2 * size - 1 - r
    of 2 * size, so that every rank sees as many early as late positions."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    rank = parallel_state.get_context_parallel_rank()

    def part(tensor: torch.Tensor) -> torch.Tensor:
        chunks = tensor.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    return {name: part(tensor) for name, tensor in batch.items()}


def token_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the losses, tokens, both for the report) of a micro-batch; inputs `[batch, seq]`.

    The engine divides gradients by the tokens of the whole global batch.
    """
    mask = loss_mask.reshape(-1).to(losses.dtype)
    total = (losses.reshape(-1) * mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    report = torch.stack([total.detach().double(), tokens.double()])
    return total, tokens, report


def _leap_targets(batch: Batch, settings: PanguTransformerConfig) -> LeapTargets | None:
    """Those of a whole micro-batch; None for a model without leap heads."""
    model = settings.model
    if model is None or not model.leap_heads:
        return None
    whole = (batch["labels"], batch["loss_mask"], batch.get("documents"))
    return leap_targets(*whole, model.leap_heads, model.leap_stride)


def _labels(batch: Batch, settings: PanguTransformerConfig) -> torch.Tensor:
    """Labels of a micro-batch: of the main loss, of each depth, of each further leap head."""
    mask = batch["loss_mask"]
    # A depth's label stands so much further on: at a sequence's end there is none.
    counts = [mask[:, ahead:].sum() for ahead in range((settings.mtp_num_layers or 0) + 1)]
    further = _leap_targets(batch, settings)
    if further is not None:
        counts += further.mask.sum(dim=(0, 1)).unbind()
    return torch.stack(counts).double()


def count_tokens(micro_batches: list[Batch], settings: PanguTransformerConfig) -> StepTokens:
    """What the losses of a global batch are means over; `micro_batches` are this replica's.
    Collective over the data-parallel ranks."""
    counts = torch.stack([_labels(batch, settings) for batch in micro_batches]).sum(dim=0)
    group = parallel_state.get_data_parallel_group()
    tokens = to_device(counts.float())
    dist.all_reduce(tokens, group=group)
    return StepTokens(tokens[0], tokens[1:], len(micro_batches) * group.size())


def mtp_loss(chunks: list[Any], step: StepTokens) -> torch.Tensor | None:
    """Mean of the depths' losses over the global batch since the last call, or of the leap heads'
    beside the model's own, of no dimension, on the device; None for a model without either.
    Collective over the world."""
    if not step.mtp.numel():
        return None
    sums = torch.zeros(step.mtp.numel(), dtype=torch.float64, device=step.mtp.device)
    for chunk in chunks:
        model = unwrap_model(chunk)
        sums += model.mtp_sums
        model.mtp_sums.zero_()
    return (sum_over_losses(sums) / step.mtp.clamp(min=1)).mean()
