"""Collectives around tensor-parallel matrices, as megatron-core issues them.

With sequence parallelism: all-gather before a column-cut matrix, reduce-scatter after a row-cut
one, mirrored in the backward pass, where the input is gathered again for the weight gradient.
Without: one all-reduce in each direction.
"""

from __future__ import annotations

import numpy as np

from simulator.array import Array
from simulator.counts.records import Message, Modules, Shapes


def before_column(
    s: Shapes, linear: str, width: Array, recompute: Modules = "", group: str = "tp"
) -> list[Message]:
    """Around a column-cut matrix whose input is `[tokens, width]`.

    Megatron runs the gradient's reduction beside the weight gradient and the second gathering of
    the input beside the input gradient; the forward gathering is hidden only with fused kernels,
    with which the gradient's reduction is fused too where it is not beside the weight gradient.
    """
    parallel = _sequence_parallel(s)
    size = s.tokens * width * s.element
    gathered = s.tokens * width * _gathered_element(s)
    beside = s.traits.tp_gradient_overlap
    fused = s.traits.tp_comm_overlap
    forward = f"{linear}:forward" if fused else ""
    again = f"{linear}:{'input' if beside else 'weight'}_gradient" if beside or fused else ""
    back = f"{linear}:{'weight' if beside else 'input'}_gradient" if beside or fused else ""
    name, gradient = f"{linear} input", f"{linear} gradient"
    twice = f"{name} again"
    return [
        Message(name, "forward", "all_gather", group, gathered, forward, recompute, parallel),
        Message(twice, "weight_gradient", "all_gather", group, gathered, again, "", parallel),
        Message(gradient, "input_gradient", "reduce_scatter", group, size, back, "", parallel),
        Message(gradient, "input_gradient", "all_reduce", group, size, back, "", 1 - parallel),
    ]


def after_row(
    s: Shapes, linear: str, width: Array, recompute: Modules = "", group: str = "tp"
) -> list[Message]:
    """Around a row-cut matrix whose output is `[tokens, width]`."""
    parallel = _sequence_parallel(s)
    size = s.tokens * width * s.element
    gathered = s.tokens * width * _gathered_element(s)
    fused = f"{linear}:forward" if s.traits.tp_comm_overlap else ""
    back = f"{linear}:input_gradient" if s.traits.tp_comm_overlap else ""
    output = f"{linear} output"
    gradient = f"{linear} output gradient"
    return [
        Message(output, "forward", "reduce_scatter", group, size, fused, recompute, parallel),
        Message(output, "forward", "all_reduce", group, size, fused, recompute, 1 - parallel),
        Message(gradient, "input_gradient", "all_gather", group, gathered, back, "", parallel),
    ]


def _gathered_element(s: Shapes) -> float:
    """Bytes of an element that is gathered for a product."""
    return s.linear_element if s.traits.fp8_gathers and s.dtype == "fp8" else s.element


def _sequence_parallel(s: Shapes) -> Array:
    return np.where(s.layout.sequence_parallel, 1, 0)
