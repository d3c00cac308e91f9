"""The forecast over arrays: step time and memory of one layout or a million, one code path.

Schedules come in closed form here; `simulator.predict` runs the same parts for a single layout
and builds the schedule event by event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import Config
from simulator.collectives import collective_seconds
from simulator.counts.layer import Blocks, blocks
from simulator.counts.records import Shapes, shapes, total
from simulator.hardware import Hardware, load_hardware
from simulator.imbalance import routing_factor
from simulator.layout import Layout, StageContent
from simulator.memory import (
    Activations,
    Memory,
    StageParameters,
    block_activations,
    blocks_parameters,
    rank_memory,
    stage_contents,
    stage_parameters,
)
from simulator.operators import vector_seconds
from simulator.parameters import model_flops_per_token
from simulator.pipeline import RankSeconds, pipeline_seconds
from simulator.seconds import BlockSeconds, StageBlocks, price_blocks

Array = Any
BUCKET_ELEMENTS = 40e6  # megatron-core's smallest gradient bucket


@dataclass(frozen=True)
class ChunkSeconds:
    """One micro-batch through one chunk of one rank."""

    forward: Array
    input_gradient: Array
    weight_gradient: Array
    hideable: Array


@dataclass(frozen=True)
class DataParallel:
    """Exposed seconds of a rank at the end of a step."""

    reduce: Array  # gradients, beside the last backward pass where overlapped
    optimizer: Array
    gather: Array  # parameters


@dataclass(frozen=True)
class Evaluation:
    """What a layout yields; every field has one entry per layout.

    `mfu` is relative to the machine's peak for the training precision.
    """

    step_seconds: Array
    tokens_per_second_per_device: Array
    mfu: Array
    peak_memory_bytes: Array
    pipeline_seconds: Array
    bubble_fraction: Array
    data_parallel_seconds: Array
    optimizer_seconds: Array


@dataclass(frozen=True)
class Parts:
    """Everything about one micro-batch that the schedules are built from."""

    hardware: Hardware
    shapes: Shapes
    blocks: Blocks
    seconds: StageBlocks
    kept: Activations
    load: Array

    @property
    def layout(self) -> Layout:
        return self.shapes.layout


def prepare(config: Config, layout: Layout, load: Array | None = None) -> Parts:
    """Count and price the building blocks of the model under `layout`.

    `load` is the fullest expert-parallel rank's share of rows relative to the mean; left out, it
    is what the router is expected to yield (`simulator.imbalance`).
    """
    hardware = load_hardware(config.hardware)
    s = shapes(config, layout)
    if load is None:
        load = expected_load(s)
    counted = blocks(s, load)
    priced = price_blocks(hardware, s, counted)
    return Parts(hardware, s, counted, priced, block_activations(s, counted), load)


def expected_load(s: Shapes) -> Array:
    """Expected maximum over expert-parallel ranks of the rows they receive, over the mean."""
    if not s.model.num_experts:
        return 1.0
    tokens = s.shard * s.layout.ep * s.layout.etp
    return routing_factor(s.moe, s.model.num_experts, tokens, s.layout.ep)


def evaluate(config: Config, layout: Layout, load: Array | None = None) -> Evaluation:
    """Step time, throughput, MFU and peak memory of every layout (`load`: see `prepare`)."""
    parts = prepare(config, layout, load)
    ranks_count = int(np.max(layout.pp))
    chunk_count = int(np.max(layout.vpp))
    peak: Array = 0.0
    ranks: list[RankSeconds] = []
    ends: list[DataParallel] = []
    for rank in range(ranks_count):
        contents = stage_contents(parts.shapes, rank, chunk_count)
        inside = rank < layout.pp
        memory = rank_memory(parts.shapes, parts.blocks, parts.kept, rank, contents)
        peak = np.maximum(peak, np.where(inside, memory.peak, 0.0))
        chunks = [chunk_seconds(parts, content) for content in contents]
        seconds = sum_chunks(chunks)
        ranks.append(seconds)
        ends.append(data_parallel(parts, stage_parameters(parts.shapes, contents), seconds))
    passing = pipeline_seconds(layout, ranks, send_seconds(parts))
    reduce = optimizer = gather = 0.0 * passing
    for end in ends:
        reduce = np.maximum(reduce, end.reduce)
        optimizer = np.maximum(optimizer, end.optimizer)
        gather = np.maximum(gather, end.gather)
    work: Array = 0.0
    for index, seconds in enumerate(ranks):
        work = work + np.where(index < layout.pp, seconds.both, 0.0)
    busy = work * layout.num_microbatches / layout.pp
    step = passing + reduce + optimizer + gather
    tokens = tokens_per_step(config, layout)
    rate = tokens / step / layout.devices
    return Evaluation(
        step,
        rate,
        rate * model_flops_per_token(config) / parts.hardware.peak(peak_dtype(parts)),
        peak,
        passing,
        np.maximum(passing - busy, 0.0) / step,
        reduce + gather,
        optimizer,
    )


def peak_dtype(parts: Parts) -> str:
    """The precision whose peak MFU is relative to."""
    dtype = parts.shapes.dtype
    return dtype if dtype in parts.hardware.peak_tflops else "bf16"


def tokens_per_step(config: Config, layout: Layout) -> Array:
    sequences = layout.micro_batch * layout.num_microbatches * layout.dp
    return sequences * config.train.seq_length


def chunk_seconds(parts: Parts, content: StageContent) -> ChunkSeconds:
    """One micro-batch through a chunk with recomputation and sharded weights."""
    layout, priced = parts.layout, parts.seconds
    dense, moe = priced.dense, priced.moe
    count = np.where(layout.block_recompute, layout.recompute_layers, content.layers)
    repeated_dense = np.minimum(count, content.dense)
    repeated_moe = np.minimum(count - repeated_dense, content.moe)
    again = repeated_dense * dense.forward + repeated_moe * moe.forward
    # A layer that is recomputed whole recomputes nothing selectively.
    selective = np.where(layout.full_recompute, 0.0, 1.0)
    again = np.where(layout.full_recompute, again, 0.0) + selective * (
        content.dense * dense.recompute + content.moe * moe.recompute
    )
    dense_wait = sharded_weights(parts, dense, "dense")
    moe_wait = sharded_weights(parts, moe, "moe")

    def whole(field: str) -> Array:
        return (
            content.dense * getattr(dense, field)
            + content.moe * getattr(moe, field)
            + content.embedding * getattr(priced.embedding, field)
            + content.head * getattr(priced.head, field)
        )

    forward = whole("forward") + content.dense * dense_wait[0] + content.moe * moe_wait[0]
    backward = whole("input_gradient") + again
    backward = backward + content.dense * dense_wait[1] + content.moe * moe_wait[1]
    exchanged = whole("experts_forward") + whole("experts_backward")
    weight = whole("weight_gradient")
    computing = forward + backward + weight - exchanged
    hideable = np.minimum(exchanged, computing)
    return ChunkSeconds(forward, backward, weight, hideable)


def sum_chunks(chunks: list[ChunkSeconds]) -> RankSeconds:
    return RankSeconds(
        total(chunk.forward for chunk in chunks),
        total(chunk.input_gradient for chunk in chunks),
        total(chunk.weight_gradient for chunk in chunks),
        total(chunk.hideable for chunk in chunks),
    )


def sharded_weights(parts: Parts, block: BlockSeconds, kind: str) -> tuple[Array, Array]:
    """Exposed seconds per layer, forward and backward, of gathering ZeRO-3's weights and of
    reducing ZeRO-2/3's gradients with every micro-batch. Each hides behind the layer before it."""
    layout, hw, s = parts.layout, parts.hardware, parts.shapes
    counts = parts.blocks.dense if kind == "dense" else parts.blocks.moe
    if counts is None or not np.any(np.asarray(layout.zero) >= 2):
        return 0.0, 0.0
    elements = blocks_parameters(counts, s, kind)
    size, stride = layout.size("dp_cp"), layout.stride("dp_cp")
    gather: Array = collective_seconds(hw, "all_gather", elements * s.element, size, stride)
    gather = np.where(layout.zero >= 3, gather, 0.0)
    grads = elements * (4.0 if s.traits.fp32_gradients else s.element)
    reduce: Array = collective_seconds(hw, "reduce_scatter", grads, size, stride)
    reduce = np.where(layout.zero >= 2, reduce, 0.0)
    forward = np.maximum(gather - block.forward, 0.0)
    work = block.backward + np.where(layout.full_recompute, block.forward, 0.0)
    return forward, np.maximum(gather + reduce - work, 0.0)


def send_seconds(parts: Parts) -> Array:
    """One hidden state from a pipeline rank to the next."""
    layout, s = parts.layout, parts.shapes
    size = s.shard * s.model.hidden_size * s.element
    return collective_seconds(parts.hardware, "send_recv", size, layout.pp, layout.stride("pp"))


def data_parallel(parts: Parts, parameters: StageParameters, seconds: RankSeconds) -> DataParallel:
    """Gradient reduction, optimizer step and parameter gathering of one rank."""
    layout, hw, s = parts.layout, parts.hardware, parts.shapes
    element = 4.0 if s.traits.fp32_gradients else s.element
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
        np.maximum(reduce - seconds.backward, reduce * last),
        reduce,
    )
    gather = np.where(
        layout.overlap_param_gather,
        np.maximum(gather - seconds.forward, gather * last),
        gather,
    )
    # Norm and update read gradients, master weights and moments and write them back; the
    # gradient buffer is then cleared.
    update = (34.0 if s.element < 4 else 32.0) * held
    clear: Array = np.where(layout.zero >= 2, held, parameters.total)
    return DataParallel(reduce, vector_seconds(hw, update + clear * element), gather)


def stage_memory(parts: Parts, rank: int) -> Memory:
    """Memory of one rank of a single layout."""
    contents = stage_contents(parts.shapes, rank, int(np.max(parts.layout.vpp)))
    return rank_memory(parts.shapes, parts.blocks, parts.kept, rank, contents)
