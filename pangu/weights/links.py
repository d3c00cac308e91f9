"""How one of our tensors is made of another program's, and taken apart again.

Shapes: H hidden, D head size, G key/value groups, Q query heads of a group, E experts, F width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Link:
    """`ours` is `join` of the tensors named `theirs`; `split` is its inverse, to the last bit."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Tensors], torch.Tensor]
    split: Callable[[torch.Tensor], Tensors]


def same(ours: str, theirs: str) -> Link:
    """The same tensor under another name."""
    return Link(ours, (theirs,), lambda parts: parts[0], lambda whole: [whole])


def rows(ours: str, *theirs: str) -> Link:
    """Equal blocks of rows, one after the other (gate and up in `linear_fc1`)."""
    return Link(ours, theirs, torch.cat, lambda whole: list(whole.chunk(len(theirs))))


def query_key_value(ours: str, theirs: tuple[str, str, str], groups: int, heads: int) -> Link:
    """Megatron's order: for each of G groups its Q queries, its key, its value; `[G·(Q+2)·D, …]`.

    Serves weights `[·, H]` and biases `[·]`.
    """
    queries = heads // groups

    def join(parts: Tensors) -> torch.Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(whole: torch.Tensor) -> Tensors:
        grouped = whole.unflatten(0, (groups, -1))
        size = grouped.size(1) // (queries + 2)
        parts = grouped.split([queries * size, size, size], dim=1)
        return [part.flatten(0, 1) for part in parts]

    return Link(ours, theirs, join, split)


def experts_in(ours: str, theirs: list[tuple[str, str]]) -> Link:
    """`w1` `[E, H, 2, F]` from each expert's gate and up, both `[F, H]`."""

    def join(parts: Tensors) -> torch.Tensor:
        stacked = torch.stack(parts).unflatten(0, (-1, 2))  # [E, 2, F, H]
        return stacked.permute(0, 3, 1, 2).contiguous()

    def split(whole: torch.Tensor) -> Tensors:
        return [part.contiguous() for part in whole.permute(0, 2, 3, 1).flatten(0, 1)]

    return Link(ours, tuple(name for pair in theirs for name in pair), join, split)


def experts_out(ours: str, theirs: list[str]) -> Link:
    """`w2` `[E, F, H]` from each expert's down projection `[H, F]`."""
    return Link(
        ours,
        tuple(theirs),
        lambda parts: torch.stack(parts).transpose(1, 2).contiguous(),
        lambda whole: [part.contiguous() for part in whole.transpose(1, 2)],
    )


def fused_experts_in(ours: str, theirs: str) -> Link:
    """`w1` from one tensor `[E, 2·F, H]`, gates before ups."""
    return Link(
        ours,
        (theirs,),
        lambda parts: parts[0].unflatten(1, (2, -1)).permute(0, 3, 1, 2).contiguous(),
        lambda whole: [whole.permute(0, 2, 3, 1).flatten(1, 2).contiguous()],
    )


def fused_experts_out(ours: str, theirs: str) -> Link:
    """`w2` from one tensor `[E, H, F]`."""
    return Link(
        ours,
        (theirs,),
        lambda parts: parts[0].transpose(1, 2).contiguous(),
        lambda whole: [whole.transpose(1, 2).contiguous()],
    )
