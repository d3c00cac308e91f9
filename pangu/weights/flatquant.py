"""FlatQuant (arXiv 2410.09426): before a layer's matrices are rounded, their inputs are flattened
by learned maps. Each input is divided by a vector s and turned by P = left ⊗ right, and weights
take the inverse, so that without rounding the layer computes what it did. s goes into the norm
before (or, for a dense layer's second matrix, into the first); P and the part of a token's largest
value that is rounded within stay with the model (`pangu.ops.input_transform`).

Shapes: R rows, C columns, G groups, E experts, H hidden, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from pangu.ops.input_transform import InputTransform, kronecker
from pangu.weights.hadamard import hadamard
from pangu.weights.quantize import Grid, Scheme, nearest_code, spanned
from pangu.weights.readers import matrices, norm_readers
from pangu.weights.smoothing import smooth_scales

Tensor = torch.Tensor
_RATE, _CLIP_RATE = 5e-3, 5e-2  # of AdamW, falling to a thousandth (the released code's)
_WIDE = 4.0  # what the logit of a part begins with: 0.98 of the largest value
_SECOND, _FIRST = "mlp.linear_fc2.weight", "mlp.linear_fc1"


def learn(
    layer: Any,
    calls: list[dict[str, Any]],
    scheme: Scheme,
    stored: torch.dtype,
    epochs: int,
) -> dict[str, Grid]:
    """Round the layer's matrices in place, with transforms that leave its outputs on `calls`
    nearest to the float layer's (mean squares). Returns the grids, by weight, laid out as it is.

    The layer has been built with transforms that do nothing. Where learning does not lower the
    error, they stay as they began: Hadamard matrices, and SmoothQuant's scales with α 0.3.
    """
    layer.requires_grad_(False)
    _round_inputs(layer, 0)
    flat = _Flat(layer, *_floats(layer, calls), scheme, stored)
    with torch.enable_grad():
        flat.train(calls, epochs)
    found, grids = flat.tensors()
    own = layer.state_dict()
    for name, tensor in found.items():
        own[name].copy_(tensor)
    return grids


def _round_inputs(layer: Any, bits: int) -> None:
    for module in layer.modules():
        if isinstance(module, InputTransform):
            module.bits = bits


def _floats(layer: Any, calls: list[dict[str, Any]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the layer makes of `calls`, and the largest |x| `[C]` that comes out of each norm or
    into a dense layer's second matrix, by the norm's name or the matrix's."""
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        most = x.detach().float().abs().flatten(0, -2).amax(0)
        largest[name] = torch.maximum(largest[name], most) if name in largest else most

    handles = [
        layer.get_submodule(readers.norm).register_forward_hook(
            lambda _, __, x, name=readers.norm: look(name, x)
        )
        for readers in norm_readers(layer)
    ]
    if hasattr(layer.mlp, "linear_fc2"):
        hook = layer.mlp.linear_fc2.register_forward_pre_hook
        handles.append(hook(lambda _, args: look(_SECOND, args[0])))
    try:
        return [layer(**call)[0] for call in calls], largest
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Matrix:
    """What is learned of a weight and of the transform `rounding` of its input: logits of the parts
    that are rounded within, `inside` `[]` of a token's and `parts` `[R, G]` of a group's."""

    rounding: str
    left: Tensor
    right: Tensor
    inside: Tensor
    parts: Tensor


class _Flat:
    """A layer as a function of what is learned. `before` are its own tensors."""

    def __init__(
        self,
        layer: Any,
        targets: list[Tensor],
        largest: dict[str, Tensor],
        scheme: Scheme,
        stored: torch.dtype,
    ) -> None:
        self.layer, self.targets, self.scheme, self.stored = layer, targets, scheme, stored
        self.before = {name: weight.clone() for name, weight in layer.named_parameters()}
        self.readers = norm_readers(layer)
        self.logs = {  # of the scales, by the norm or the weight before which they stand
            found.norm: self._begin(found.rounded + found.exact, largest[found.norm])
            for found in self.readers
        }
        if _SECOND in largest and layer.config.gated_linear_unit:
            self.logs[_SECOND] = self._begin([_SECOND], largest[_SECOND])
        self.matrices = {
            _weight_of(name): self._matrix(name, module)
            for name, module in layer.named_modules()
            if isinstance(module, InputTransform)
        }

    def _begin(self, names: list[str], largest_C: Tensor) -> Tensor:
        weights = [part for name in names for part in matrices(name, self.before[name])]
        return smooth_scales(weights, largest_C, 0.3).log().requires_grad_()

    def _matrix(self, name: str, module: InputTransform) -> _Matrix:
        rows = _rows_of(_weight_of(name), self.before[_weight_of(name)])
        groups = rows.size(1) // (self.scheme.group_size or rows.size(1))
        left, right = (_orthogonal(part).requires_grad_() for part in (module.left, module.right))
        parts = left.new_full((len(rows), groups), _WIDE).requires_grad_()
        return _Matrix(name, left, right, left.new_full((), _WIDE).requires_grad_(), parts)

    def train(self, calls: list[dict[str, Any]], epochs: int) -> None:
        """Learn; what was there before comes back where nothing was gained."""
        _round_inputs(self.layer, self.scheme.activation_bits)
        maps, clips = list(self.logs.values()), []
        for matrix in self.matrices.values():
            maps += [matrix.left, matrix.right]
            clips += [matrix.parts] + ([matrix.inside] if self.scheme.activation_bits else [])
        begun = [each.detach().clone() for each in (*maps, *clips)]
        least = self._error(calls)
        optimizer = torch.optim.AdamW(
            [{"params": maps, "lr": _RATE}, {"params": clips, "lr": _CLIP_RATE}], weight_decay=0.0
        )
        steps = max(epochs * len(calls), 1)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, _RATE / 1000)
        for _ in range(epochs):
            for call, target in zip(calls, self.targets, strict=True):
                optimizer.zero_grad()
                self._loss(call, target).backward()
                optimizer.step()
                falling.step()
        if not self._error(calls) < least:  # also where it is no number
            with torch.no_grad():
                for each, value in zip((*maps, *clips), begun, strict=True):
                    each.copy_(value)

    def _loss(self, call: dict[str, Any], target: Tensor) -> Tensor:
        found, _ = self.tensors()
        output = functional_call(self.layer, found, kwargs=call)[0]
        return (output.float() - target.float()).square().mean()

    @torch.no_grad()
    def _error(self, calls: list[dict[str, Any]]) -> float:
        pairs = zip(calls, self.targets, strict=True)
        return sum(float(self._loss(call, target)) for call, target in pairs)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Grid]]:
        """The layer's tensors that are others than before, rounded, and the grids."""
        found: dict[str, Tensor] = {}
        grids: dict[str, Grid] = {}
        columns: dict[str, Tensor] = {}  # what a weight's columns are multiplied by
        for readers in self.readers:
            scales = self.logs[readers.norm].exp()
            for name in (f"{readers.norm}.weight", f"{readers.norm}.bias"):
                if name in self.before:
                    found[name] = (self.before[name] / scales).to(self.before[name].dtype)
            for name in readers.exact:
                found[name] = (self.before[name] * scales).to(self.before[name].dtype)
            columns |= dict.fromkeys(readers.rounded, scales)
        above: dict[str, Tensor] = {}  # what the rows of the first matrix are divided by
        if _SECOND in self.logs:
            columns[_SECOND] = self.logs[_SECOND].exp()
            above[f"{_FIRST}.weight"] = torch.cat(
                [torch.ones_like(columns[_SECOND]), columns[_SECOND]]
            )
            if (name := f"{_FIRST}.bias") in self.before:
                found[name] = self.before[name] / above[f"{_FIRST}.weight"]
        for name, matrix in self.matrices.items():
            weight = self.before[name]
            rows = _rows_of(name, weight)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            rows = rows * columns[name] if name in columns else rows
            rows = rows / above[name][:, None] if name in above else rows
            inverses = (torch.linalg.inv(part.double()).T for part in (matrix.left, matrix.right))
            rows = kronecker(rows, *(part.to(rows.dtype) for part in inverses))
            values, grid = self._rounded(rows, torch.sigmoid(matrix.parts))
            found[name] = _laid_out(name, values, weight).to(weight.dtype)
            grids[name] = Grid(
                _laid_out(name, grid.scale, weight), _laid_out(name, grid.zero, weight)
            )
            found[f"{matrix.rounding}.left"] = matrix.left
            found[f"{matrix.rounding}.right"] = matrix.right
            bits = self.scheme.activation_bits
            inside = torch.sigmoid(matrix.inside) if bits else torch.ones_like(matrix.inside)
            found[f"{matrix.rounding}.clip"] = inside
        return found, grids

    def _rounded(self, rows_RC: Tensor, parts_RG: Tensor) -> tuple[Tensor, Grid]:
        """The nearest values on the grid; gradients pass the rounding alone as if it was not
        there."""
        groups = rows_RC.unflatten(1, (parts_RG.size(1), -1))
        grid = spanned(groups, parts_RG, self.scheme, self.stored)
        scale, zero = grid.scale[..., None], grid.zero[..., None]
        low, high = (-6, 6) if self.scheme.floats else self.scheme.limits
        codes = (groups / scale + zero).clamp(low, high)
        codes = codes + (nearest_code(codes.detach(), self.scheme) - codes).detach()
        return ((codes - zero) * scale).flatten(1), grid


def _orthogonal(identity: Tensor) -> Tensor:
    """A Hadamard matrix of that size where one is known, else a random rotation."""
    size = len(identity)
    try:
        whole = torch.from_numpy(hadamard(size))
    except ValueError:
        generator = torch.Generator().manual_seed(size)
        drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
        whole = torch.linalg.qr(drawn).Q
    return whole.to(identity)


def _weight_of(rounding: str) -> str:
    """The weight whose input passes the module of that name."""
    module = rounding.removesuffix(".input_rounding")
    if module.endswith("experts.activate"):
        return module.removesuffix("activate") + "w2"
    return f"{module}.w1" if module.endswith("experts") else f"{module}.weight"


def _rows_of(name: str, weight: Tensor) -> Tensor:
    """A weight as one matrix `[R, C]`; of experts `w1` `[E, H, 2, F]` and `w2` `[E, F, H]` all of
    them."""
    if name.endswith("experts.w1"):
        return weight.permute(0, 2, 3, 1).flatten(0, 2)
    if name.endswith("experts.w2"):
        return weight.transpose(1, 2).flatten(0, 1)
    return weight


def _laid_out(name: str, rows: Tensor, like: Tensor) -> Tensor:
    """The way back, of as many rows with any columns."""
    if name.endswith("experts.w1"):
        return rows.unflatten(0, (like.size(0), 2, like.size(3))).permute(0, 3, 1, 2)
    if name.endswith("experts.w2"):
        return rows.unflatten(0, (like.size(0), like.size(2))).transpose(1, 2)
    return rows
