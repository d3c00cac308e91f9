"""What learned transforms of matrices' inputs cost in serving (`model.input_transforms`: FlatQuant,
arXiv 2410.09426, section 3.1)."""

from __future__ import annotations

import math

from simulator.array import Array
from simulator.collectives import collective_seconds
from simulator.operators import matmul_seconds, vector_seconds
from simulator.parameters import Linear
from simulator.serving import Serving


def factors(size: int) -> tuple[int, int]:
    """The two whole factors of a width that are nearest to each other, the smaller one first."""
    small = next(each for each in range(math.isqrt(size), 0, -1) if size % each == 0)
    return small, size // small


def transform_seconds(serving: Serving, linear: Linear, rows: Array, tp: int) -> Array:
    """Before one matrix, on `rows` tokens: with `inputs` = a·b, products with `[b, b]` and `[a, a]`
    in float32, 2·(a + b) operations a channel; to float32 and back, two transpositions, rounding.

    Where ranks hold parts of the inputs, they are gathered first, and each transforms all.
    """
    if not serving.model.input_transforms:
        return 0.0
    hw = serving.hardware
    left, right = factors(linear.inputs)
    products = matmul_seconds(hw, rows * left, right, right, dtype="fp32")
    products = products + matmul_seconds(hw, rows * right, left, left, dtype="fp32")
    passes = vector_seconds(hw, (2 + 4 + 8 + 8 + 8 + 2) * rows * linear.inputs)
    gathered: Array = 0.0
    if linear.split == "row":
        gathered = collective_seconds(hw, "all_gather", 2.0 * rows * linear.inputs, tp)
    return gathered + products + passes
