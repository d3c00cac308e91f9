"""Affine quantisation of matrices, group by group, and what a scheme asks of it.

Shapes: R rows (outputs), C columns (inputs), G groups of columns. Codes are signed, as
compressed-tensors has them: w = (code - zero) · scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from configs.schema import KeyRounding
from pangu.checkpoint.tensor_files import WeightsError

Tensor = torch.Tensor
_SCHEME = re.compile(r"(?:W([2-8]|16)A(4|8|16)|MXFP4A16)(?:KV([2-8]))?(_ASYM)?")
# What a 4-bit float (E2M1) can be; the scale of its block of 32 is a power of two (OCP MX v1.0).
_FLOAT4 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
_MX_BLOCK = 32


@dataclass(frozen=True)
class Scheme:
    """`W4A16`: weights of 4 bits, activations as they are.

    Up to 4 bits weights have a scale for every `group_size` columns of a row, and in `W4A16_ASYM` a
    zero point; above, one scale a row. Activations of 8 or 4 bits are rounded token by token,
    symmetrically. `W4A16KV4`: keys and values of 4 bits too. `W16` leaves weights as they are.
    """

    name: str
    weight_bits: int
    activation_bits: int  # 0: not quantised
    group_size: int  # 0: the whole row

    symmetric: bool = True
    kv_bits: int = 0  # 0: not quantised
    key_rounding: KeyRounding = "token"
    floats: bool = False  # 4-bit floats and scales that are powers of two: MXFP4

    @property
    def by_channel(self) -> bool:
        """Whether keys have limits of their own, which calibration finds."""
        return self.kv_bits > 0 and self.key_rounding == "channel"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code of a weight."""
        return -(2 ** (self.weight_bits - 1)), 2 ** (self.weight_bits - 1) - 1

    @property
    def bits_per_weight(self) -> float:
        """With a 16-bit scale (MXFP4: 8), and a zero point where there is one, for each group."""
        if self.floats:
            return self.weight_bits + 8 / self.group_size
        each = 16 if self.symmetric else 16 + self.weight_bits
        return self.weight_bits + (each / self.group_size if self.group_size else 0)


def scheme_of(
    name: str, group_size: int, widths: set[int], key_rounding: KeyRounding = "token"
) -> Scheme:
    """The scheme called `name` for matrices of these numbers of columns: groups of `group_size`, or
    of the largest part of it that divides all of them.

    Raises:
        WeightsError: there is no such scheme.
    """
    match = _SCHEME.fullmatch(name.upper())
    nothing = match and match[1] == "16" and (match[4] or (match[2] == "16" and not match[3]))
    if match is None or nothing:  # no weights that have zero points, or nothing that is rounded
        raise WeightsError(
            f"--scheme {name}: as W4A16 or W4A16_ASYM (with zero points), weights of 2 to 8 or 16 "
            "bits, activations of 16, 8 or 4, and as W8A8KV8 keys and values of 2 to 8; or MXFP4A16"
        )
    symmetric, cached = not match[4], int(match[3] or 0)
    if match[1] is None:
        if match[4] or any(width % _MX_BLOCK for width in widths):
            raise WeightsError(f"--scheme {name}: blocks of {_MX_BLOCK}, without zero points")
        return Scheme(
            name.upper(), 4, 0, _MX_BLOCK, kv_bits=cached, key_rounding=key_rounding, floats=True
        )
    bits, activations = int(match[1]), int(match[2])
    if bits > 4:
        group_size = 0
    while group_size and any(width % group_size for width in widths):
        group_size //= 2
    rounds = activations if activations < 16 else 0
    return Scheme(name.upper(), bits, rounds, group_size, symmetric, cached, key_rounding)


@dataclass(frozen=True)
class Grid:
    """Where a matrix's groups may be rounded to: `scale` `[R, G]` and `zero` `[R, G]` (0 where
    symmetric), float32."""

    scale: Tensor
    zero: Tensor

    def columns(self, count: int) -> tuple[Tensor, Tensor]:
        """Both for every column, `[R, C]`."""
        size = count // self.scale.size(1)
        return self.scale.repeat_interleave(size, 1), self.zero.repeat_interleave(size, 1)


def grid_of(
    weight_RC: Tensor,
    scheme: Scheme,
    stored: torch.dtype,
    *,
    clip: bool = False,
    gram_CC: Tensor | None = None,
) -> Grid:
    """The grid that the extremes of each group span; with `clip`, of up to half of them whichever
    leaves the least squared error: of the weights, or with `gram_CC`, the sum of x·xᵀ over inputs,
    of what they add to the outputs (AWQ's clipping), where a row's whole output then gains by it.
    `stored` is what scales will be kept in."""
    groups = weight_RC.float().unflatten(1, (-1, scheme.group_size or weight_RC.size(1)))
    whole = grid = spanned(groups, 1.0, scheme, stored)
    if not clip:
        return grid
    blocks = None if gram_CC is None else _diagonal_blocks(gram_CC, groups.size(2))
    least = _squared_error(groups, grid, scheme, blocks)
    for step in range(1, 21):
        other = spanned(groups, 1.0 - step / 40, scheme, stored)
        error = _squared_error(groups, other, scheme, blocks)
        grid, least = _where(error < least, other, grid), torch.minimum(error, least)
    if gram_CC is None:
        return grid
    before, after = (output_error(weight_RC, g, scheme, gram_CC) for g in (whole, grid))
    return _where((after < before)[:, None], grid, whole)


def _where(chosen: Tensor, one: Grid, other: Grid) -> Grid:
    return Grid(
        torch.where(chosen, one.scale, other.scale), torch.where(chosen, one.zero, other.zero)
    )


def _diagonal_blocks(gram_CC: Tensor, size: int) -> Tensor:
    """`[G, size, size]`."""
    parts = gram_CC.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def output_error(weight_RC: Tensor, grid: Grid, scheme: Scheme, gram_CC: Tensor) -> Tensor:
    """Squared error of each output over the inputs of `gram_CC`, the sum of x·xᵀ: `[R]`."""
    wrong = rounded(weight_RC, grid, scheme) - weight_RC.float()
    return ((wrong @ gram_CC) * wrong).sum(1)


def spanned(groups: Tensor, part: float | Tensor, scheme: Scheme, stored: torch.dtype) -> Grid:
    """The grid of weights `[R, G, size]`, float32, that `part` (a number, or `[R, G]`) of each
    group's extremes spans."""
    low, high = scheme.limits
    least = groups.amin(-1).clamp(max=0) * part
    most = groups.amax(-1).clamp(min=0) * part
    if scheme.floats:  # the largest value's exponent less that of the largest float
        largest = torch.maximum(-least, most).clamp(min=2.0**-120)
        scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
        return Grid(scale, torch.zeros_like(scale))
    span = 2 * torch.maximum(-least, most) if scheme.symmetric else most - least
    scale = (span / (high - low)).to(stored).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if scheme.symmetric:
        return Grid(scale, torch.zeros_like(scale))
    return Grid(scale, (low - least / scale).round().clamp(low, high))


def _squared_error(
    groups: Tensor, grid: Grid, scheme: Scheme, blocks: Tensor | None = None
) -> Tensor:
    """Of weights `[R, G, size]`, or of what they make of inputs whose grams are `blocks`
    `[G, size, size]`: `[R, G]`."""
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    codes = nearest_code(groups / scale + zero, scheme)
    wrong = (codes - zero) * scale - groups
    turned = wrong if blocks is None else torch.einsum("rgi,gij->rgj", wrong, blocks)
    return (turned * wrong).sum(-1)


def nearest_code(x: Tensor, scheme: Scheme) -> Tensor:
    """What weights in units of their scale, float32, are rounded to."""
    if not scheme.floats:
        return x.round().clamp(*scheme.limits)
    between = (_FLOAT4[1:] + _FLOAT4[:-1]) / 2
    table = _FLOAT4.to(x.device)
    return table[torch.bucketize(x.contiguous(), between.to(x.device))]


def codes_of(weight_RC: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Nearest codes `[R, C]`, int8; not of floats."""
    scale, zero = grid.columns(weight_RC.size(1))
    return nearest_code(weight_RC.float() / scale + zero, scheme).to(torch.int8)


def float_codes_of(weight_RC: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Nearest 4-bit floats `[R, C]` as their bits, uint8: sign, exponent (2), mantissa (1)."""
    scale, _ = grid.columns(weight_RC.size(1))
    nearest = nearest_code(weight_RC.float() / scale, scheme)
    positive = _FLOAT4[len(_FLOAT4) // 2 :].contiguous()
    bits = torch.searchsorted(positive, nearest.abs()).to(torch.uint8)
    return bits | (nearest < 0).to(torch.uint8) << 3


def rounded(weight_RC: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The nearest values on the grid, float32: what the codes stand for."""
    scale, zero = grid.columns(weight_RC.size(1))
    return (nearest_code(weight_RC.float() / scale + zero, scheme) - zero) * scale
