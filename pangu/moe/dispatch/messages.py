"""Messages to experts and back, in two halves: begun, and waited for.

What a forward pass does between the halves it does while tokens travel, and what belongs to it in
the backward pass while their gradients travel: autograd goes through the parts of a forward pass
from the last to the first. Where one of two passes side by side waits, the other has its turn. A
device sends on a stream of its own, which its computing waits for where the host says so: the same
on every kind.

Shapes: M rows sent, N received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pangu.backends import turns


def nothing() -> None:
    """What is done meanwhile where there is nothing to do."""


class Coming(NamedTuple):
    """A message under way: `sent` is kept, and what `read` returns is not there, until `works`
    are over."""

    works: tuple[Any, ...]
    sent: tuple[torch.Tensor, ...]
    read: Callable[[], torch.Tensor]


class Way(NamedTuple):
    """How rows `[M, …]` begin to travel, and how the gradient of what arrives, `[N, …]`, does."""

    there: Callable[[torch.Tensor], Coming]
    back: Callable[[torch.Tensor], Coming]


def exchange(
    group: dist.ProcessGroup, received: list[int] | None = None, sent: list[int] | None = None
) -> Way:
    """Rows to each rank, `sent` of them, and `received` from each; as many to each if not given."""

    def travel(x: torch.Tensor, received: list[int] | None, sent: list[int] | None) -> Coming:
        if group.size() == 1:
            return _here(x)
        x = x.contiguous()
        rows = x.size(0) if received is None else sum(received)
        out = x.new_empty(rows, *x.shape[1:])
        work = dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)
        return Coming((work,), (x,), lambda: out)

    return Way(lambda x: travel(x, received, sent), lambda x: travel(x, sent, received))


def gather(group: dist.ProcessGroup) -> Way:
    """All ranks' rows to every rank; as many of each. Their gradients are summed."""
    return Way(lambda x: _gather(group, x), lambda x: _sum(group, x))


def reduce_scatter(group: dist.ProcessGroup) -> Way:
    """The sum of all ranks' rows, of which every rank receives its part."""
    return Way(lambda x: _sum(group, x), lambda x: _gather(group, x))


def _gather(group: dist.ProcessGroup, x: torch.Tensor) -> Coming:
    if group.size() == 1:
        return _here(x)
    x, out = x.contiguous(), x.new_empty(group.size() * x.size(0), *x.shape[1:])
    work = dist.all_gather_into_tensor(out, x, group=group, async_op=True)
    return Coming((work,), (x,), lambda: out)


def _sum(group: dist.ProcessGroup, x: torch.Tensor) -> Coming:
    if group.size() == 1:
        return _here(x)
    x, out = x.contiguous(), x.new_empty(x.size(0) // group.size(), *x.shape[1:])
    work = dist.reduce_scatter_tensor(out, x, group=group, async_op=True)
    return Coming((work,), (x,), lambda: out)


def _here(x: torch.Tensor) -> Coming:
    return Coming((), (x,), x.detach)


def begin(*parts: tuple[torch.Tensor, Way]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Send all of `parts`; what is returned waits for them, and returns what has arrived,
    differentiable. Every rank of the groups begins and waits in the same order."""
    call = _Call([way for _, way in parts])
    token = _Begin.apply(call, *(rows for rows, _ in parts))
    return lambda: _Arrive.apply(call, token)


def travelled(
    rows: torch.Tensor, way: Way, meanwhile: Callable[[], None] = nothing
) -> torch.Tensor:
    """What arrives, waited for once `meanwhile` is done."""
    arrived = begin((rows, way))
    meanwhile()
    return arrived()[0]


@dataclass
class _Call:
    """What the halves of one call leave to each other."""

    ways: list[Way]
    coming: list[Coming | None] | None = None
    wanted: tuple[bool, ...] = ()  # gradients

    def wait(self) -> list[torch.Tensor | None]:
        assert self.coming is not None
        coming, self.coming = self.coming, None
        works = [work for each in coming if each is not None for work in each.works]
        if works:
            turns.hand_over()
        for work in works:
            work.wait()
        return [None if each is None else each.read() for each in coming]


class _Begin(torch.autograd.Function):
    """Forward it begins, backward it waits; what passes between it and `_Arrive` is empty."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parts: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        call.wanted = ctx.needs_input_grad[1:]
        call.coming = [way.there(rows) for way, rows in zip(call.ways, parts, strict=True)]
        return parts[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *empty: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.call.wait()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, token: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call = call
        return tuple(call.wait())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        call = ctx.call
        parts = zip(call.ways, grads, call.wanted, strict=True)
        call.coming = [way.back(grad) if wanted else None for way, grad, wanted in parts]
        return None, grads[0].new_empty(0)
