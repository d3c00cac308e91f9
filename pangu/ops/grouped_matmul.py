"""Many matrix products of one row-sorted matrix with a stack of weights, one weight per group.

Shapes: N rows, E groups, I input width, O output width. Group e owns `counts[e]` consecutive rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from pangu import backends
from pangu.ops import packed_weights
from pangu.ops.weight_gradient import add_weight_gradient

Gradient = Callable[[], torch.Tensor | None]  # None: the parameter has it already


class Kernels(Protocol):
    """The two products that forward and backward need; neither records gradients."""

    @staticmethod
    def rows(x_NI: torch.Tensor, w_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """`[N, O]`: each row times its group's weight (which may be a transposed view)."""
        ...

    @staticmethod
    def weights(x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """`[E, I, O]`: xᵀ·y of each group; zero for a group without rows."""
        ...


class Loop:
    """The reference: one product per group, on every device and in every dtype, written straight
    into its place in the result. Reads `counts` on the host. The weights are unbound once:
    indexing a stack per expert would make the backward quadratic in their number."""

    @staticmethod
    def rows(x_NI: torch.Tensor, w_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        sizes = counts_E.tolist()
        out = x_NI.new_empty(x_NI.size(0), w_EIO.size(2))
        groups = zip(x_NI.split(sizes), w_EIO.unbind(0), out.split(sizes), sizes, strict=True)
        for x, w, y, size in groups:
            if size:
                torch.mm(x, w, out=y)
        return out

    @staticmethod
    def weights(x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        sizes = counts_E.tolist()
        out = x_NI.new_empty(len(sizes), x_NI.size(1), y_NO.size(1))
        groups = zip(x_NI.split(sizes), y_NO.split(sizes), out.unbind(0), sizes, strict=True)
        for x, y, w, size in groups:
            if size:
                torch.mm(x.t(), y, out=w)
            else:
                w.zero_()
        return out


class Fused:
    """`torch.nn.functional.grouped_mm`: one kernel, counts stay on the device."""

    @staticmethod
    def rows(x_NI: torch.Tensor, w_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x_NI, w_EIO, offs=_ends(counts_E, x_NI))

    @staticmethod
    def weights(x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return _without_empty(F.grouped_mm(x_NI.t(), y_NO, offs=_ends(counts_E, x_NI)), counts_E)

    @staticmethod
    def fits(x_NI: torch.Tensor, w_EIO: torch.Tensor) -> bool:
        """16-byte rows and a supported dtype; with no rows at all there is nothing to fuse."""
        widths = w_EIO.shape[1:]
        aligned = all(width * x_NI.element_size() % 16 == 0 for width in widths)
        return aligned and x_NI.dtype != torch.float64 and x_NI.size(0) > 0


class Npu:
    """torch-npu's grouped product, which refuses a list of one count: that is a plain product.
    Written against its schema; not run on an NPU."""

    @staticmethod
    def rows(x_NI: torch.Tensor, w_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        if w_EIO.size(0) == 1:
            return x_NI @ w_EIO[0]
        return _npu_grouped_matmul(x_NI, w_EIO, counts_E, group_type=0)

    @staticmethod
    def weights(x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        if counts_E.numel() == 1:
            return (x_NI.t() @ y_NO)[None]
        return _without_empty(_npu_grouped_matmul(x_NI.t(), y_NO, counts_E, group_type=2), counts_E)


class Fixed:
    """A row's sum has one order, however many rows its group has; for decoding alone."""

    @staticmethod
    def rows(x_NI: torch.Tensor, w_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return importlib.import_module("pangu.ops.kernels.fixed_matmul").grouped(
            x_NI, w_EIO, counts_E
        )

    @staticmethod
    def weights(x_NI: torch.Tensor, y_NO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("products in one order have no gradients")


def _npu_grouped_matmul(
    x: torch.Tensor, w: torch.Tensor, counts_E: torch.Tensor, group_type: int
) -> torch.Tensor:
    """group_type 0 splits the rows, 2 the inner dimension; split_item 3 asks for one tensor and
    group_list_type 1 says that the list holds counts."""
    torch_npu = importlib.import_module("torch_npu")
    return torch_npu.npu_grouped_matmul(
        [x],
        [w],
        group_list=counts_E.to(device=x.device, dtype=torch.int64),
        split_item=3,
        group_type=group_type,
        group_list_type=1,
    )[0]


def _without_empty(out_EIO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """A kernel that sees no rows may leave its block unwritten."""
    empty_E = (counts_E == 0).to(out_EIO.device, non_blocking=True)
    return out_EIO.masked_fill_(empty_E[:, None, None], 0)


def _ends(counts_E: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return counts_E.to(like.device, non_blocking=True).cumsum(0).to(torch.int32)


class _GroupedMatmul(torch.autograd.Function):
    """The fused products of torch refuse some gradients (expanded, unaligned) and NPU's has none:
    so the backward is written here, from the same two kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        w_EIO: torch.Tensor,
        counts_E: torch.Tensor,
        kernels: type[Kernels],
        parameter: tuple[torch.nn.Parameter | None],
        later: list[Gradient] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_NI, w_EIO, counts_E)
        ctx.kernels, (ctx.parameter,), ctx.later = kernels, parameter, later
        return kernels.rows(x_NI, w_EIO, counts_E)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, w_EIO, counts_E = ctx.saved_tensors
        grad_NO = grads[0].contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.kernels.rows(grad_NO, w_EIO.transpose(1, 2), counts_E)
        make = partial(_weights, ctx.kernels, ctx.parameter, w_EIO, x_NI, grad_NO, counts_E)
        if ctx.later is not None:
            ctx.later.append(make)
        elif ctx.needs_input_grad[1]:
            grad_w = _for_hooks(make(), w_EIO)
        return grad_x, grad_w, None, None, None, None


def _weights(
    kernels: type[Kernels],
    parameter: Any,
    w_EIO: torch.Tensor,
    x_NI: torch.Tensor,
    grad_NO: torch.Tensor,
    counts_E: torch.Tensor,
) -> torch.Tensor | None:
    """The gradient of the weights; None where the parameter has it already."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        total_EIO = main_grad.view(w_EIO.shape)
        if add_weight_gradient(total_EIO, x_NI, grad_NO, counts_E):
            parameter.grad_added_to_main_grad = True
            return None
    return kernels.weights(x_NI, grad_NO, counts_E)


def _for_hooks(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A gradient, or one that is never read: the engine's hooks run where there is one."""
    return torch.empty_like(like) if gradient is None else gradient


class Postponed(NamedTuple):
    """Weights in one forward pass whose gradients are made where the backward pass comes to the
    call of `postpone`, not to their products; those of each wait in `gradients` in between."""

    weights: tuple[torch.Tensor, ...]
    gradients: tuple[list[Gradient] | None, ...]  # None of a frozen weight


def postpone(
    parameters: tuple[torch.nn.Parameter, ...], before: Postponed | None = None
) -> Postponed:
    """For one product of each: `grouped_matmul(x, weight, counts, …, later=gradients)`, of which
    the last is a part of the same backward pass.

    Where a forward pass uses them several times, each call is given the one `before` it: what the
    later ones make is added to by the earlier, and the engine sees one gradient.
    """
    gradients: Any = tuple([] if each.requires_grad else None for each in parameters)
    weights = parameters if before is None else before.weights
    return Postponed(_Postpone.apply(before is None, gradients, *weights), gradients)


class _Postpone(torch.autograd.Function):
    """Its products give no gradient of their own; the engine comes here all the same."""

    @staticmethod
    def forward(
        ctx: Any, first: bool, gradients: tuple[list[Gradient] | None, ...], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.first, ctx.gradients = first, gradients
        ctx.shapes = [weight.shape for weight in weights]
        ctx.like = weights[0].new_empty(())
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *later: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        parts = zip(ctx.gradients, later, ctx.shapes, strict=True)
        return None, None, *(_Postpone._sum(ctx, *part) for part in parts)

    @staticmethod
    def _sum(
        ctx: Any, waiting: list[Gradient] | None, later: torch.Tensor | None, shape: torch.Size
    ) -> torch.Tensor | None:
        if waiting is None:
            return None
        made = waiting.pop()()
        if made is not None:
            made = made.view(shape)
            return made if later is None else later.add_(made)
        return ctx.like.new_empty(shape) if ctx.first else None


def grouped_matmul(
    x_NI: torch.Tensor,
    w_EIO: torch.Tensor,
    counts_E: torch.Tensor,
    kernels: type[Kernels] | None = None,
    parameter: torch.nn.Parameter | None = None,
    later: list[Gradient] | None = None,
) -> torch.Tensor:
    """Rows of each group times the group's weight: `[N, O]`, differentiable in x and w.

    `counts_E` holds integers on any device and sums to N; groups may be empty. `kernels` replaces
    the backend's choice: the loop on a CPU, where it is as fast as `grouped_mm` and takes every
    dtype and width; `grouped_mm` on a GPU; torch-npu's operator on an NPU.

    `parameter` is the one of which w is a view. Where megatron-core's data parallelism has given
    it a `main_grad`, the weight gradient is added right there if the backend can
    (`weight_gradient`), which saves writing it down and adding it afterwards. `later` is that of a
    `Postponed` weight, or of the same detached, where the product is in a graph of its own.
    """
    kernels = kernels or _choose(x_NI, w_EIO)
    if not torch.is_grad_enabled():
        packed = packed_weights.current()
        packs = packed and kernels is Loop and backends.current().operators.linear == "onednn"
        if packed and packs and x_NI.dtype == torch.float32:
            return _packed_rows(x_NI, w_EIO, counts_E, packed)
        return kernels.rows(x_NI, w_EIO, counts_E)
    # In a tuple, or it would be one more input, whose hooks run with every product's gradients.
    return _GroupedMatmul.apply(x_NI, w_EIO, counts_E, kernels, (parameter,), later)


def _packed_rows(
    x_NI: torch.Tensor,
    w_EIO: torch.Tensor,
    counts_E: torch.Tensor,
    packed: packed_weights.PackedWeights,
) -> torch.Tensor:
    """`Loop.rows`, by copies of weights where there are some."""
    sizes = counts_E.tolist()
    parts = []
    for x, w, size in zip(x_NI.split(sizes), w_EIO.unbind(0), sizes, strict=True):
        if size:
            copy = packed.of(w.t())
            parts.append(
                torch.mm(x, w)
                if copy is None
                else torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "")
            )
    return torch.cat(parts) if parts else x_NI.new_empty(0, w_EIO.size(2))


def _choose(x_NI: torch.Tensor, w_EIO: torch.Tensor) -> type[Kernels]:
    variant = backends.current().operators.grouped_matmul
    if variant == "fused" and not Fused.fits(x_NI, w_EIO):
        return Loop
    variants: dict[str, type[Kernels]] = {
        "loop": Loop,
        "fused": Fused,
        "npu": Npu,
        "fixed": Fixed,
    }
    return variants[variant]
