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

    The gradient's reduction runs beside the weight gradient and the second gathering of the
    input beside the input gradient; the forward gathering only with fused kernels.
    """
    parallel = _sequence_parallel(s)
    size = s.tokens * width * s.element
    fused = f"{linear}:forward" if s.traits.tp_comm_overlap else ""
    return [
        Message(
            f"{linear} input", "forward", "all_gather", group, size, fused, recompute, parallel
        ),
        Message(
            f"{linear} input again",
            "weight_gradient",
            "all_gather",
            group,
            size,
            f"{linear}:input_gradient",
            "",
            parallel,
        ),
        Message(
            f"{linear} gradient",
            "input_gradient",
            "reduce_scatter",
            group,
            size,
            f"{linear}:weight_gradient",
            "",
            parallel,
        ),
        Message(
            f"{linear} gradient",
            "input_gradient",
            "all_reduce",
            group,
            size,
            f"{linear}:weight_gradient",
            "",
            1 - parallel,
        ),
    ]


def after_row(
    s: Shapes, linear: str, width: Array, recompute: Modules = "", group: str = "tp"
) -> list[Message]:
    """Around a row-cut matrix whose output is `[tokens, width]`."""
    parallel = _sequence_parallel(s)
    size = s.tokens * width * s.element
    fused = f"{linear}:forward" if s.traits.tp_comm_overlap else ""
    back = f"{linear}:input_gradient" if s.traits.tp_comm_overlap else ""
    return [
        Message(
            f"{linear} output", "forward", "reduce_scatter", group, size, fused, recompute, parallel
        ),
        Message(
            f"{linear} output", "forward", "all_reduce", group, size, fused, recompute, 1 - parallel
        ),
        Message(
            f"{linear} output gradient",
            "input_gradient",
            "all_gather",
            group,
            size,
            back,
            "",
            parallel,
        ),
    ]


def _sequence_parallel(s: Shapes) -> Array:
    return np.where(s.layout.sequence_parallel, 1, 0)
