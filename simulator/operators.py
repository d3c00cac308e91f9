"""Seconds of one operator on one device, from its shape and a machine.

Every argument but the machine broadcasts: a number, or arrays of any number of layouts.
A product takes the longer of computing and moving its bytes; shape enters the computing time
through the library's tiles (padding, a last wave of tiles that leaves cores idle) and through the
depth k over which a tile's start and end are spread.
"""

from __future__ import annotations

import numpy as np

from simulator.array import Array
from simulator.hardware import ELEMENT_BYTES, Hardware

# Part of the doubled peak that attention keeps in float8: 1.2 PFLOPS where 16 bits reach 740
# TFLOPS (arXiv 2407.08608, abstract). Softmax does not become faster.
FLOAT8_ATTENTION = 0.81


def matmul_seconds(
    hw: Hardware,
    m: Array,
    n: Array,
    k: Array,
    *,
    batch: Array = 1,
    dtype: str = "bf16",
    weight_gradient: bool = False,
    weight_bytes: float | None = None,
) -> Array:
    """`batch` products [m, k] x [k, n] in one launch.

    `weight_gradient`: the result is added to a float32 buffer (read and written).
    `weight_bytes`: bytes per element of the [k, n] operand where it is stored narrower than
    `dtype` (W4A8).
    """
    m, n, k, batch = (np.asarray(x, dtype=float) for x in (m, n, k, batch))
    element = ELEMENT_BYTES[dtype]
    output = 8.0 if weight_gradient else max(element, 2.0)
    weight = element if weight_bytes is None else weight_bytes
    moved = batch * (m * k * element + k * n * weight + m * n * output)
    peak = hw.peak(dtype) * hw.matmul.dtype.get(dtype, 1.0)
    if weight_gradient:
        peak *= hw.matmul.weight_gradient
    compute = 2.0 * batch * m * n * k / (peak * _efficiency(hw, batch, m, n, k))
    busy: Array = np.maximum(compute, memory_seconds(hw, moved))
    if hw.matmul.rows and not weight_gradient:
        busy = _few_rows(hw, busy, m, batch * k * n * weight, hw.matmul.reading)
    return busy + _launch(hw.launch_us.matmul, m * n * k)


def grouped_matmul_seconds(
    hw: Hardware,
    groups: Array,
    m_per_group: Array,
    n: Array,
    k: Array,
    *,
    dtype: str = "bf16",
    weight_gradient: bool = False,
    added: bool = True,
    streams: bool = False,
    weight_bytes: float | None = None,
) -> Array:
    """One launch over `groups` experts with `m_per_group` rows each, weights [k, n] apiece.

    Experts fill waves of tiles together but pad their rows apart, and every expert that has a
    row loads its weights. `weight_gradient`: products [k, rows] x [rows, n], `added` to float32.
    `streams`: product after product on a few streams instead of one launch.
    """
    groups, rows, n, k = (np.asarray(x, dtype=float) for x in (groups, m_per_group, n, k))
    a, b, depth = (k, n, rows) if weight_gradient else (rows, n, k)
    element = ELEMENT_BYTES[dtype]
    weight = element if weight_bytes is None else weight_bytes
    activations = groups * rows * (n + k) * element
    weights = groups * n * k * (8.0 if weight_gradient and added else weight)
    narrow = np.minimum(n, k)
    curve = hw.matmul
    part, half = curve.grouped, curve.grouped_half
    if streams and curve.streams_half is not None:
        part, half = curve.streams, curve.streams_half
    peak = hw.peak(dtype) * curve.dtype.get(dtype, 1.0) * part * narrow / (narrow + half)
    if weight_gradient and added:
        peak *= hw.matmul.weight_gradient
    compute = 2.0 * groups * rows * n * k / (peak * _efficiency(hw, groups, a, b, depth))
    moved = activations + weights * np.minimum(rows, 1.0)
    work = groups * rows * n * k
    busy: Array = np.maximum(compute, memory_seconds(hw, moved))
    if curve.rows and not weight_gradient:
        busy = _few_rows(hw, busy, rows, groups * n * k * weight, curve.reading_grouped)
    return busy + _launch(hw.launch_us.matmul, work)


def attention_seconds(
    hw: Hardware,
    *,
    batch: Array,
    heads: Array,
    seq_q: Array,
    seq_kv: Array,
    qk_dim: Array,
    v_dim: Array,
    causal: bool = True,
    fused: bool = True,
    passes: float = 1.0,
    backward: bool = False,
    flash_2: bool = False,
    dtype: str = "bf16",
    kv_heads: Array | None = None,
    kv_bytes: float | None = None,
) -> Array:
    """Scores, softmax and weighted sum of `batch` sequences, forward or backward.

    Fused attention computes S = QKᵀ and PV (backward: S again, dV, dP, dQ, dK) and skips what a
    causal mask hides; its traffic is its inputs and outputs, with `kv_heads` heads of keys and
    values of `kv_bytes` per element. Unfused attention computes everything and moves the
    [heads, seq_q, seq_kv] scores through softmax, `passes` times what one kernel does, and dropout.
    """
    batch, heads, seq_q, seq_kv, qk_dim, v_dim = (
        np.asarray(x, dtype=float) for x in (batch, heads, seq_q, seq_kv, qk_dim, v_dim)
    )
    if not fused:
        shape = (batch * heads, seq_q, seq_kv, qk_dim, v_dim)
        return _unfused_attention(hw, *shape, passes=passes, backward=backward, dtype=dtype)
    element = ELEMENT_BYTES[dtype]
    pairs = batch * heads * seq_q * seq_kv
    if causal:
        pairs = pairs * (1.0 - (np.minimum(seq_q, seq_kv) - 1.0) / (2.0 * seq_kv))
    flops = 2.0 * pairs * ((3 * qk_dim + 2 * v_dim) if backward else (qk_dim + v_dim))
    curve = hw.attention
    head = np.minimum(qk_dim, v_dim)
    head_factor = head / (head + curve.half_head) * (128.0 + curve.half_head) / 128.0
    best: Array = curve.in_training * (curve.backward if backward else curve.forward)
    best = best * np.where(v_dim < qk_dim, curve.unequal, 1.0)
    if flash_2:
        best = best * curve.flash_2
    reached = best * np.minimum(head_factor, 1.05)
    reached = reached * seq_kv / (seq_kv + curve.half_length)
    if dtype == "fp8":
        reached = reached * FLOAT8_ATTENTION
    kv_heads = heads if kv_heads is None else np.asarray(kv_heads, dtype=float)
    kv = batch * kv_heads * seq_kv * (qk_dim + v_dim) * (element if kv_bytes is None else kv_bytes)
    queries = batch * heads * seq_q * (qk_dim + v_dim) * element
    moving = memory_seconds(hw, queries + kv / curve.cache) * (2.0 if backward else 1.0)
    compute = flops / (hw.peak(dtype) * reached)
    return np.maximum(compute, moving) + _launch(hw.launch_us.matmul, pairs)


def vector_seconds(hw: Hardware, bytes: Array, flops: Array = 0) -> Array:
    """An elementwise operator or reduction that moves `bytes` in all (reads and writes)."""
    bytes = np.asarray(bytes, dtype=float)
    busy = np.maximum(memory_seconds(hw, bytes), np.asarray(flops, dtype=float) / hw.vector_peak)
    return busy + _launch(hw.launch_us.vector, bytes)


def memory_seconds(hw: Hardware, bytes: Array) -> Array:
    """Moving `bytes` through the device's memory, without a launch."""
    return np.asarray(bytes, dtype=float) / (hw.memory_bandwidth * hw.memory_efficiency)


def _few_rows(
    hw: Hardware, busy: Array, rows: Array, weight_bytes: Array, reading: list[float]
) -> Array:
    """Seconds of a product of `rows` rows over `weight_bytes` of weights: as measured up to the
    most rows that were, from there on `busy`, what all others take, and no less than there."""
    known = np.array(hw.matmul.rows, dtype=float)
    slowness = np.interp(np.maximum(rows, known[0]), known, 1.0 / np.array(reading))
    measured = weight_bytes * np.minimum(rows, 1.0) * slowness / hw.memory_bandwidth
    return np.where(rows <= known[-1], measured, np.maximum(busy, measured))


def _launch(microseconds: float, work: Array) -> Array:
    """The fixed cost, where there is an operator at all."""
    return np.where(work > 0, microseconds * 1e-6, 0.0)


def _efficiency(hw: Hardware, batch: Array, m: Array, n: Array, k: Array) -> Array:
    """Part of the peak that `batch` products [m, k] x [k, n] reach by computing alone."""
    curve = hw.matmul
    m, n, k, batch = (np.maximum(x, 1.0) for x in (m, n, k, batch))
    size = np.log2(m * n * k * batch) / 3.0
    reached = np.interp(size, np.log2(curve.size), curve.efficiency) * curve.in_training
    best: Array = 0.0
    for rows, columns, part in curve.tiles:
        down, across = np.ceil(m / rows), np.ceil(n / columns)
        waves = batch * down * across / curve.units
        # Fewer tiles than cores: the library splits k, down to 512 deep, to occupy the rest.
        split = np.clip(np.floor(k / 512.0), 1.0, np.maximum(1.0 / waves, 1.0))
        idle = 1.0 - waves / np.ceil(waves)
        filled = np.where(waves < 1.0, np.minimum(waves * split, 1.0), 1.0 - curve.wave_loss * idle)
        used = m * n / (down * rows * across * columns)
        best = np.maximum(best, part * used * filled)
    return reached * best * k / (k + curve.depth_half)


def _unfused_attention(
    hw: Hardware,
    matrices: Array,
    seq_q: Array,
    seq_kv: Array,
    qk_dim: Array,
    v_dim: Array,
    *,
    passes: float,
    backward: bool,
    dtype: str,
) -> Array:
    """Two batched products around a scale-mask-softmax and a dropout (Megatron's `core_attn`);
    backward runs each product's two gradients. Megatron's fused causal softmax reads what the
    mask leaves, half of the scores, and writes all of them."""
    element = ELEMENT_BYTES[dtype]
    elements = matrices * seq_q * seq_kv
    if not backward:
        scores = matmul_seconds(hw, seq_q, seq_kv, qk_dim, batch=matrices, dtype=dtype)
        output = matmul_seconds(hw, seq_q, v_dim, seq_kv, batch=matrices, dtype=dtype)
        softmax = vector_seconds(hw, (1.5 if passes == 1.0 else 2 * passes) * element * elements)
        dropout = vector_seconds(hw, (2 * element + 1) * elements)
        return scores + softmax + dropout + output
    d_probabilities = matmul_seconds(hw, seq_q, seq_kv, v_dim, batch=matrices, dtype=dtype)
    d_value = matmul_seconds(hw, seq_kv, v_dim, seq_q, batch=matrices, dtype=dtype)
    d_query = matmul_seconds(hw, seq_q, qk_dim, seq_kv, batch=matrices, dtype=dtype)
    d_key = matmul_seconds(hw, seq_kv, qk_dim, seq_q, batch=matrices, dtype=dtype)
    softmax = vector_seconds(hw, (2.0 if passes == 1.0 else 3 * passes) * element * elements)
    dropout = vector_seconds(hw, (2 * element + 1) * elements)
    return d_probabilities + d_value + d_query + d_key + softmax + dropout
