"""The Euclidean norm of many tensors together."""

from __future__ import annotations

import torch

from pangu import backends


def total_norm_reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`total_norm` in float64."""
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def _blocks(tensors: list[torch.Tensor], elements: int) -> list[torch.Tensor]:
    """The norm of each piece. torch on a CPU adds squares up in a few float32 lanes, one after the
    other: of 2**21 elements the norm is 3e-5 too small, of 2**24 7e-4."""
    pieces = [piece for tensor in tensors for piece in tensor.reshape(-1).split(elements)]
    return [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`[]`, in the tensors' precision, without waiting for the device; 0 without any tensors."""
    if not tensors:
        return torch.zeros((), device=backends.current().device)
    block = backends.current().block_elements
    norms = _blocks(tensors, block) if block else torch._foreach_norm(tensors)
    return torch.linalg.vector_norm(torch.stack(norms)).to(tensors[0].dtype)
