"""What PyTorch's own CUDA kernels cost where this project's trainer uses them, in bytes of memory
traffic that would take as long: measured on one H200, whose elementwise kernels move 3.5 TB/s.
"""

from __future__ import annotations

from simulator.array import Array
from simulator.counts.records import Modules, Operator, Shapes, vector

# Sums over rows reach 0.8 TB/s: embedding bags of 8 rows of 1,024, 2,048 and 5,120 (0.76 to 0.82),
# and RMSNorm with its input gradient at 1,024.
REDUCTION = 4.2
# A norm's gain gradient takes as long as this many passes over its input; the scan of a short row
# takes 5.7 ns.
GAIN_PASSES = 21.0
SCAN_BYTES_PER_ROW = 20e3
# Rotary embedding of megatron-core's unfused code: negation of a half, two concatenations, two
# products, a sum.
ROPE_PASSES = 12.0


def norm(
    s: Shapes, name: str, rows: Array, width: Array, recompute: Modules = ""
) -> list[Operator]:
    """A norm over `rows` rows of `width`: read and written forward; backward it reads input and
    gradient, writes one, and sums the gain's gradient over all rows."""
    size = rows * width * s.element
    if not s.torch_kernels:
        return vector(name, 2 * size, 3 * size, recompute)
    gain = GAIN_PASSES * size
    return [
        *vector(name, 2 * REDUCTION * size, 3 * REDUCTION * size, recompute),
        Operator(f"{name} gain", "weight_gradient", "vector", 0, gain, {"bytes": gain}),
    ]


def rope(s: Shapes, every: Array, rotated: Array) -> list[Operator]:
    """Rotary embedding of `rotated` bytes of queries and keys; fused, one pass over `every` byte
    of the projection."""
    moved = ROPE_PASSES * rotated if s.torch_kernels else 2 * every
    return vector("attention.rope", moved, moved)


def gathered(s: Shapes, tokens: Array, rows: Array) -> Array:
    """Traffic of copying each token's rows: `tokens` bytes of tokens, `rows` bytes of rows."""
    return 2 * rows if s.torch_kernels else tokens + rows


def summed(s: Shapes, tokens: Array, rows: Array) -> Array:
    """Traffic of summing each token's rows."""
    return REDUCTION * (tokens + rows) if s.torch_kernels else tokens + rows
