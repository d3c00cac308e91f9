"""What a run asks of its engine, and what they hand each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pangu.engines.state_parts import Part

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepShape:
    """What a data-parallel replica computes in one step; sizes in sequences and tokens."""

    num_microbatches: int
    micro_batch_size: int
    seq_length: int


@dataclass(frozen=True)
class StepResult:
    """What a step did. `loss` is the mean cross-entropy per token in nats, over the global batch;
    `mtp_loss` that of multi-token prediction, the mean of its depths or of further leap heads,
    None without; `grad_norm` is the norm before clipping; a skipped step changed
    nothing."""

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool
    mtp_loss: float | None = None


def step_result(told: list[float]) -> StepResult:
    """From what a device tells: the sum of losses, their tokens, the norm of the gradients, 1 where
    the step was skipped, and the mean of further losses where there are any."""
    total, tokens, norm, skipped, *further = told
    loss = total / tokens if tokens else float("nan")
    norm = float("nan") if skipped else norm
    return StepResult(loss, norm, int(tokens), bool(skipped), *further)


class Engine(Protocol):
    """This rank's share of a model in training. Process groups exist; every method is collective
    but `set_learning_rate`."""

    @property
    def chunks(self) -> Sequence[Any]:
        """The rank's modules as they are trained: one, or one per virtual pipeline stage. Each
        tells the names and the split of its weights by `sharded_state_dict`."""

    @property
    def data_parallel_rank(self) -> int:
        """Which part of a global batch this rank reads."""

    @property
    def data_parallel_size(self) -> int:
        """How many parts there are."""

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` in the next step."""

    def train_step(self, batches: Iterator[Batch], shape: StepShape) -> Callable[[], StepResult]:
        """One optimizer step on this replica's next micro-batches. A non-finite loss or gradient
        on any rank leaves everything as it was: weights, moments, the steps that they count, the
        balancing bias. Asking what it did waits for the device."""

    def evaluate(self, batches: Iterator[Batch], shape: StepShape) -> float:
        """Mean cross-entropy per token, in nats, over the next global batch; nothing is
        trained."""

    def state_parts(self) -> list[Part]:
        """The optimizer's state by parameter, in the same order on all ranks that share them."""

    def replicas(self) -> dist.ProcessGroup:
        """The ranks that hold copies of the same weights, and so can share the writing of them."""

    def whole_weights(self, *, changing: bool = False) -> AbstractContextManager[None]:
        """While it lasts, the weights of `chunks` are whole where ranks hold pieces of them
        otherwise; `changing` those that all ranks write the same into stay so."""
