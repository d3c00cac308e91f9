"""What follows the last backward pass: gradients over replicas, the optimizer, weights back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.array import Array
from simulator.collectives import collective_seconds
from simulator.counts.records import Shapes
from simulator.memory import StageParameters
from simulator.operators import vector_seconds
from simulator.parts import Parts
from simulator.passes import host_bandwidth, outlasting
from simulator.pipeline import RankSeconds

BUCKET_ELEMENTS = 40e6  # megatron-core's smallest gradient bucket


@dataclass(frozen=True)
class DataParallel:
    """Exposed seconds of a rank at the end of a step."""

    reduce: Array  # gradients, beside the last backward pass where overlapped
    optimizer: Array
    gather: Array  # parameters


def optimizer_bytes(s: Shapes) -> float:
    """Bytes that norm, clipping and update move for each parameter. PyTorch's fused AdamW moves 28
    alone, and 4 more for gradients that it scales; the norm 4, 16-bit weights 6."""
    narrower = 4 * (4.0 - s.moment)  # two moments, read and written
    if s.torch_kernels:
        return 42.0 - narrower
    return (34.0 if s.element < 4 else 32.0) - narrower


def data_parallel(parts: Parts, parameters: StageParameters, seconds: RankSeconds) -> DataParallel:
    """Gradient reduction, optimizer step and parameter gathering of one rank."""
    layout, hw, s = parts.layout, parts.hardware, parts.shapes
    element = 4.0 if s.traits.fp32_gradients else s.element
    parameters = parameters.trained
    reduce: Array = 0.0
    gather: Array = 0.0
    held: Array = 0.0
    size: Array
    for elements, group in ((parameters.dense, "dp_cp"), (parameters.experts, "expert_dp")):
        size, stride = layout.size(group), layout.stride(group)
        whole = collective_seconds(hw, "all_reduce", elements * element, size, stride)
        shard = collective_seconds(hw, "reduce_scatter", elements * element, size, stride)
        once = np.where(layout.zero == 0, whole, np.where(layout.zero == 1, shard, 0.0))
        reduce = reduce + once
        again = collective_seconds(hw, "all_gather", elements * s.element, size, stride)
        gather = gather + np.where((layout.zero >= 1) & (layout.zero < 3), again, 0.0)
        held = held + elements / np.where(layout.zero >= 1, size, 1)
    last = np.minimum(BUCKET_ELEMENTS / np.maximum(parameters.total, 1.0), 1.0)
    reduce = np.where(
        layout.overlap_grad_reduce,
        np.maximum(outlasting(hw, reduce, seconds.backward), reduce * last),
        reduce,
    )
    gather = np.where(
        layout.overlap_param_gather,
        np.maximum(outlasting(hw, gather, seconds.forward), gather * last),
        gather,
    )
    # The first and the last stage's copies of the embedding, when all gradients are there.
    far = layout.stride("pp") * np.maximum(layout.pp - 1, 1)
    table = parameters.copied * element
    reduce = reduce + collective_seconds(hw, "all_reduce", table, np.minimum(layout.pp, 2), far)
    # Norm and update read gradients, master weights and moments and write them back; the
    # gradient buffer is then cleared.
    update = optimizer_bytes(s) * held
    clear: Array = np.where(layout.zero >= 2, held, parameters.total)
    optimizer = vector_seconds(hw, update + clear * element)
    if np.any(s.layout.swap_optimizer):  # states stream in and out, both ways at once
        state = (4.0 + 2 * s.moment) * held
        streaming = np.where(s.layout.swap_optimizer, state / host_bandwidth(hw), 0.0)
        optimizer = np.maximum(optimizer, streaming)
    optimizer = optimizer + hw.launch_us.step * 1e-6
    return DataParallel(reduce, optimizer, gather)
