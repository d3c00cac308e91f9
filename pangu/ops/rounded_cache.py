"""Keys and values of few bits, as the values that the codes stand for, in floating point.

Rounded where they are made, before they go into a cache or meet a query: the plain pass and the one
over a cache see the same. Shapes: s = tokens, b = batch, g = KV heads, d = channels of a head.
"""

from __future__ import annotations

import torch

from configs.schema import KeyRounding

_GROUP = 128  # channels that share a scale, where heads are wider
_CLIP = 0.95  # of the extremes, as QuaRot has it


def round_cached(
    key: torch.Tensor, value: torch.Tensor, bits: int, keys: KeyRounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[s, b, g, d]`, rotated for their positions, and values `[s, b, g, e]` as a cache of
    `bits` bits gives them back; `bits` 0 leaves them.

    "token" is QuaRot (arXiv 2404.00456): both in the Hadamard basis of their head. "channel" is
    KVQuant's way (arXiv 2401.18079): keys have been rounded before (`round_channels`), values are
    here, as they are.
    """
    if not bits:
        return key, value
    if keys == "channel":
        return key, _passing(value, round_spans(value, bits))
    return _passing(key, _in_hadamard_basis(key, bits)), _passing(
        value, _in_hadamard_basis(value, bits)
    )


def round_spans(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """Each group of up to 128 channels of `[..., d]` to 2^bits even steps from `clip` times its
    least to `clip` times its largest value: asymmetric, token by token, float32."""
    width = x.size(-1)
    groups = x.float().unflatten(-1, (-1, width if width % _GROUP else _GROUP))
    low, high = (part * clip for part in groups.aminmax(dim=-1, keepdim=True))
    return _nearest(groups, low, (high - low) / (2**bits - 1), bits).flatten(-2)


def round_channels(
    key: torch.Tensor, low_gd: torch.Tensor, step_gd: torch.Tensor, bits: int
) -> torch.Tensor:
    """Keys `[s, b, g, d]` before their rotation to 2^bits steps from each channel's own lowest
    value; a channel with step 0 stays. A bias moves `low` along and changes no error."""
    nearest = _nearest(key.float(), low_gd.float(), step_gd.float(), bits)
    return _passing(key, torch.where(step_gd > 0, nearest, key.float()))


def _nearest(x: torch.Tensor, low: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    step = torch.where(step > 0, step, torch.ones_like(step))
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def _in_hadamard_basis(x: torch.Tensor, bits: int) -> torch.Tensor:
    return _turned(round_spans(_turned(x.float()), bits, _CLIP))


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Sylvester's transform, orthonormal and its own inverse, of blocks of the largest power of two
    that divides the width of `[..., d]`."""
    width = x.size(-1)
    size = width & -width
    blocks = x.unflatten(-1, (-1, size))
    step = 1
    while step < size:
        pairs = blocks.unflatten(-1, (-1, 2, step))
        first, second = pairs.unbind(-2)
        blocks = torch.stack((first + second, first - second), -2).flatten(-3)
        step *= 2
    return (blocks / size**0.5).flatten(-2)


def _passing(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded` in x's dtype; the backward pass is that of `x`."""
    return x + (rounded.to(x.dtype) - x).detach()
