"""Rotary position embedding (arXiv 2104.09864).

Shapes: s positions, b sequences, n heads, d head size, of which the first r are turned.
"""

from __future__ import annotations

import importlib

import torch

from pangu import backends


def rotary_reference(
    x: torch.Tensor, angles: torch.Tensor, *, pairs: bool = False, scale: float = 1.0
) -> torch.Tensor:
    """`rotary` in plain operations, whose sine and cosine have x's dtype."""
    width = angles.size(-1)
    turned, rest = x[..., :width], x[..., width:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if pairs else turned.chunk(2, dim=-1)
    turned, across = torch.cat((first, second), dim=-1), torch.cat((-second, first), dim=-1)
    cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
    return torch.cat((turned * cos + across * sin, rest), dim=-1)


def rotary_triton(
    x: torch.Tensor, angles: torch.Tensor, *, pairs: bool = False, scale: float = 1.0
) -> torch.Tensor:
    """One kernel each way, sine and cosine in float32; float64 in plain operations."""
    if x.dtype == torch.float64:
        return rotary_reference(x, angles, pairs=pairs, scale=scale)
    kernels = importlib.import_module("pangu.ops.kernels.rotary")
    return kernels.rotary(x, angles, pairs=pairs, scale=scale)


def rotary(
    x: torch.Tensor, angles: torch.Tensor, *, pairs: bool = False, scale: float = 1.0
) -> torch.Tensor:
    """`[s, b, n, d]`, turned by angles `[s, 1, 1, r]` (radians, one a dimension): dimension i with
    i + r/2, or, as pairs, 2i with 2i + 1, which come out as i and i + r/2. Times `scale`, but for
    the dimensions from r on."""
    variants = {"torch": rotary_reference, "triton": rotary_triton}
    return variants[backends.current().operators.rotary](x, angles, pairs=pairs, scale=scale)
