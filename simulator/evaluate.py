"""The forecast over arrays: step time and memory of one layout or a million, one code path.

Schedules come in closed form here; `simulator.predict` runs the same parts for a single layout
and builds the schedule event by event.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.array import Array
from simulator.collectives import collective_seconds
from simulator.counts.layer import Blocks, blocks
from simulator.counts.records import Counts, Saved, Shapes, shapes, total
from simulator.hardware import Hardware, load_hardware
from simulator.imbalance import routing_factor
from simulator.layout import Layout, StageContent
from simulator.memory import (
    Activations,
    StageParameters,
    block_activations,
    communication_buffers,
    measured_peak,
    rank_memory,
    stage_contents,
    stage_parameters,
    swapped_activations,
)
from simulator.operators import vector_seconds
from simulator.parameters import LayerKind, layer_parameters, model_flops_per_token
from simulator.pipeline import Ranks, RankSeconds, distinct_ranks, hidden_seconds, pipeline_seconds
from simulator.seconds import BlockSeconds, StageBlocks, price_blocks

FLAT_EXCHANGE = 0.5  # of what copy engines or few-core dispatchers hide
HOST_NORM = 7.0  # of host and device seconds; calibrated on the runs of one node
SYNCHRONISED_NORM = 2.0  # where the host waits for the device in every layer
BUCKET_ELEMENTS = 40e6  # megatron-core's smallest gradient bucket


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
    buffer_bytes: Array  # of the collective library, beside the peak
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
    exponent = s.traits.expert_popularity_exponent
    return routing_factor(s.moe, s.model.num_experts, tokens, s.layout.ep, exponent)


def evaluate(config: Config, layout: Layout, load: Array | None = None) -> Evaluation:
    """Step time, throughput, MFU and peak memory of every layout (`load`: see `prepare`)."""
    parts = prepare_distinct(config, layout, load)
    chunk_count = int(np.max(layout.vpp))
    peak: Array = 0.0
    work: Array = 0.0
    reduce: Array = 0.0
    optimizer: Array = 0.0
    gather: Array = 0.0
    buffers = communication_buffers(parts.shapes)
    ranks: list[tuple[Ranks, RankSeconds]] = []
    for group in distinct_ranks(config.model, layout):
        contents = stage_contents(parts.shapes, group.first, chunk_count)
        memory = rank_memory(parts.shapes, parts.blocks, parts.kept, group.first, contents)
        seconds = rank_seconds(parts, contents)
        end = data_parallel(parts, stage_parameters(parts.shapes, contents), seconds)
        held = group.count > 0
        most = measured_peak(parts.hardware, memory)
        peak = np.maximum(peak, np.where(held, most, 0.0))
        reduce = np.maximum(reduce, np.where(held, end.reduce, 0.0))
        optimizer = np.maximum(optimizer, np.where(held, end.optimizer, 0.0))
        gather = np.maximum(gather, np.where(held, end.gather, 0.0))
        hidden = hidden_seconds(layout, group.first, seconds)
        work = work + group.count * (seconds.both * layout.num_microbatches - hidden)
        ranks.append((group, seconds))
    passing = pipeline_seconds(layout, ranks, send_seconds(parts))
    busy = work / layout.pp
    step = passing + reduce + optimizer + gather
    rate = tokens_per_step(config, layout) / step / layout.devices
    return Evaluation(
        step,
        rate,
        rate * model_flops_per_token(config) / parts.hardware.peak(peak_dtype(parts)),
        peak,
        buffers,
        passing,
        np.maximum(passing - busy, 0.0) / step,
        reduce + gather,
        optimizer,
    )


# What a building block's operators, messages and tensors depend on.
_BLOCK_FIELDS = ("tp", "sequence_parallel", "cp", "ring", "ep", "etp", "micro_batch")


def prepare_distinct(config: Config, layout: Layout, load: Array | None = None) -> Parts:
    """`prepare`, each distinct building block counted and priced once.

    Blocks know nothing of pipelines, replicas, schedules and recomputation, so that many layouts
    share them.
    """
    columns = [np.asarray(getattr(layout, name)) for name in _BLOCK_FIELDS]
    if load is not None or all(column.ndim == 0 for column in columns):
        return prepare(config, layout, load)
    key: Array = 0
    for column in columns:
        if column.ndim:
            values, codes = np.unique(column, return_inverse=True)
            key = key * len(values) + codes
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    few = prepare(config, layout.take(first))
    length = len(first)
    s = shapes(config, layout)
    counted: Blocks = _expand(few.blocks, inverse, length)
    return Parts(
        few.hardware,
        s,
        counted,
        _expand(few.seconds, inverse, length),
        block_activations(s, counted),
        _expand(few.load, inverse, length),
    )


def _expand(value: Any, index: Any, length: int) -> Any:
    """A record of arrays over distinct blocks as one over all layouts. Lines, operators and
    messages are left out, saved tensors summed by what drops them."""
    if isinstance(value, np.ndarray):
        return value[index] if value.shape == (length,) else value
    if isinstance(value, dict):
        return {key: _expand(item, index, length) for key, item in value.items()}
    if isinstance(value, Counts):
        kept: dict[tuple[str, ...], Array] = {}
        for tensor in value.saved:
            kept[tensor.dropped_by] = kept.get(tensor.dropped_by, 0.0) + tensor.bytes
        return Counts(
            saved=[Saved("", _expand(size, index, length), by) for by, size in kept.items()],
            backward_peak=_expand(value.backward_peak, index, length),
            matrices=_expand(value.matrices, index, length),
        )
    if isinstance(value, BlockSeconds | StageBlocks | Blocks):
        parts = {
            name: [] if isinstance(item, list) else _expand(item, index, length)
            for name, item in vars(value).items()
        }
        return replace(value, **parts)
    return value


def peak_dtype(parts: Parts) -> str:
    """The precision whose peak MFU is relative to."""
    dtype = parts.shapes.dtype
    return dtype if dtype in parts.hardware.peak_tflops else "bf16"


def tokens_per_step(config: Config, layout: Layout) -> Array:
    sequences = layout.micro_batch * layout.num_microbatches * layout.dp
    return sequences * config.train.seq_length


def rank_seconds(parts: Parts, contents: list[StageContent]) -> RankSeconds:
    """One micro-batch through chunks of one rank, with recomputation and sharded weights, where
    the device may wait for its host."""
    layout = parts.layout
    counts = rank_blocks(parts, contents)
    repeated = repeated_layers(layout, contents)
    (dense, dense_layers), (moe, moe_layers) = counts[:2]
    again = np.where(
        layout.full_recompute,
        repeated[0] * dense.again + repeated[1] * moe.again,
        dense_layers * dense.recompute(layout) + moe_layers * moe.recompute(layout),
    )
    dense_wait = layer_waits(parts, "dense")
    moe_wait = layer_waits(parts, "moe")
    forward = total(count * block.forward for block, count in counts)
    forward = forward + dense_layers * dense_wait[0] + moe_layers * moe_wait[0]
    backward = total(count * block.input_gradient for block, count in counts) + again
    backward = backward + dense_layers * dense_wait[1] + moe_layers * moe_wait[1]
    weight = total(count * block.weight_gradient for block, count in counts)
    exchanged = total(
        count * (block.experts_forward + block.experts_backward) for block, count in counts
    )
    computing = forward + backward + weight - exchanged
    hideable = np.minimum(exchanged * exchange_share(parts), computing)
    issuing = issuing_seconds(layout, counts, repeated)
    reads = parts.shapes.traits.host_reads_counts and parts.shapes.model.num_experts
    norm = SYNCHRONISED_NORM if reads else HOST_NORM
    waits = [
        waiting(host, device, norm)
        for host, device in zip(issuing, (forward, backward + weight), strict=True)
    ]
    # Side by side, both passes take what is left of them, and the host issues both meanwhile.
    apart = forward + backward + weight
    beside = apart - hideable + waiting(issuing[0] + issuing[1], apart - hideable, norm)
    saved = np.maximum(apart + waits[0] + waits[1] - beside, 0.0)
    return RankSeconds(forward + waits[0], backward + waits[1], weight, saved, waits[0] + waits[1])


def exchange_share(parts: Parts) -> float:
    """Part of the expert exchange that another micro-batch's computing hides. The preset's is of
    copy engines, or of dispatchers that take few cores; others are the collective library's
    kernels, which occupy the device where collectives are kernels at all."""
    share = parts.hardware.overlap.exchange
    kernels = parts.hardware.backend == "cuda" and not parts.shapes.traits.node_forwarding
    return share * FLAT_EXCHANGE if kernels else share


def waiting(host: Array, device: Array, norm: float = HOST_NORM) -> Array:
    """Seconds that the device waits for a host that takes `host` to issue its `device` seconds.

    Neither is ahead for long: short kernels starve the device, long ones fill its queue, and where
    both take alike, a part of a pass is lost. A host that waits for the device in every layer
    begins each with an empty queue.
    """
    longer = np.maximum(np.maximum(host, device), 1e-12)
    both = (host / longer) ** norm + (device / longer) ** norm
    return np.maximum(longer * both ** (1.0 / norm) - device, 0.0)


def rank_blocks(parts: Parts, contents: list[StageContent]) -> list[tuple[BlockSeconds, Array]]:
    """The building blocks of a rank and how many of each; dense and MoE layers come first."""
    names = ("dense", "moe", "embedding", "mtp", "head")
    return [
        (getattr(parts.seconds, name), total(getattr(content, name) for content in contents))
        for name in names
    ]


def repeated_layers(layout: Layout, contents: list[StageContent]) -> tuple[Array, Array]:
    """Dense and MoE layers that recomputation of whole layers repeats."""
    dense: Array = 0.0
    moe: Array = 0.0
    for content in contents:
        first = np.where(layout.block_recompute, layout.recompute_layers, content.layers)
        some = np.minimum(first, content.dense)
        dense = dense + some
        moe = moe + np.minimum(first - some, content.moe)
    return dense, moe


def issuing_seconds(
    layout: Layout, counts: list[tuple[BlockSeconds, Array]], repeated: tuple[Array, Array]
) -> tuple[Array, Array]:
    """What the host takes to issue one micro-batch, forward and backward."""
    (dense, dense_layers), (moe, moe_layers) = counts[:2]
    again = np.where(
        layout.full_recompute,
        repeated[0] * dense.host_forward + repeated[1] * moe.host_forward,
        dense_layers * dense.host_recompute(layout) + moe_layers * moe.host_recompute(layout),
    )
    forward = total(count * block.host_forward for block, count in counts)
    return forward, total(count * block.host_backward for block, count in counts) + again


def layer_waits(parts: Parts, kind: LayerKind) -> tuple[Array, Array]:
    """Seconds per layer, forward and backward, that sharded weights and swapped activations keep
    computing waiting."""
    block: BlockSeconds = getattr(parts.seconds, kind)
    weights = sharded_weights(parts, block, kind)
    swap = swapping(parts, block, getattr(parts.blocks, kind))
    return weights[0] + swap[0], weights[1] + swap[1]


def swapping(parts: Parts, block: BlockSeconds, counts: Counts | None) -> tuple[Array, Array]:
    """Exposed seconds of a layer's way to the host and back; a layer computes meanwhile.

    Raises:
        ConfigError: nobody knows how fast the machine reaches its host.
    """
    moved = swapped_activations(parts.shapes, counts)
    if not np.any(moved > 0):
        return 0.0, 0.0
    seconds = moved / host_bandwidth(parts.hardware)
    forward = np.maximum(seconds - block.forward, 0.0)
    return forward, np.maximum(seconds - block.backward(parts.layout), 0.0)


def host_bandwidth(hw: Hardware) -> float:
    """Bytes/s to the host, one way."""
    if not hw.host_link_gbps:
        reason = f"swapping needs it, and the preset {hw.name} does not know it"
        raise ConfigError([Violation("hardware.host_link_gbps", 0, reason)])
    return hw.host_link_gbps * 1e9


def sharded_weights(parts: Parts, block: BlockSeconds, kind: LayerKind) -> tuple[Array, Array]:
    """Exposed seconds per layer, forward and backward, of gathering ZeRO-3's weights and of
    reducing ZeRO-2/3's gradients with every micro-batch. Each hides behind the layer before it."""
    layout, hw, s = parts.layout, parts.hardware, parts.shapes
    counts = parts.blocks.dense if kind == "dense" else parts.blocks.moe
    if counts is None or not np.any(np.asarray(layout.zero) >= 2):
        return 0.0, 0.0
    held = layer_parameters(s.model, s.moe, kind, layout.tp, layout.ep, layout.etp)
    grad = 4.0 if s.traits.fp32_gradients else s.element
    early = s.traits.sharding == "deepspeed_2021"
    gather: Array = 0.0
    reduce: Array = 0.0
    for elements, group in ((held.dense, "dp_cp"), (held.experts, "expert_dp")):
        size, stride = layout.size(group), layout.stride(group)
        if early:  # every neighbour as far as the next node's
            stride = np.maximum(stride, s.domain)
        sent = s.linear_element if s.traits.fp8_gathers and s.dtype == "fp8" else s.element
        weights = collective_seconds(hw, "all_gather", elements * sent, size, stride)
        gather = gather + np.where(layout.zero >= 3, weights, 0.0)
        grads = collective_seconds(hw, "reduce_scatter", elements * grad, size, stride)
        reduce = reduce + np.where(layout.zero >= 2, grads, 0.0)
    work = block.backward(layout) + np.where(layout.full_recompute, block.again, 0.0)
    again = np.where(np.logical_and(layout.full_recompute, early), 2.0, 1.0) * gather
    return outlasting(hw, gather, block.forward), outlasting(hw, again + reduce, work)


def outlasting(hw: Hardware, messages: Array, work: Array) -> Array:
    """What of `messages` shows beside `work`."""
    hidden = np.minimum(messages * hw.overlap.independent, work * hw.overlap.beside)
    return messages - hidden


def send_seconds(parts: Parts) -> Array:
    """One hidden state from a pipeline rank to the next."""
    layout, s = parts.layout, parts.shapes
    rows = s.tokens / layout.tp if s.traits.scatter_gather_sends else s.shard
    size = rows * s.model.hidden_size * s.element
    return collective_seconds(parts.hardware, "send_recv", size, layout.pp, layout.stride("pp"))


def optimizer_bytes(s: Shapes) -> float:
    """Bytes that norm, clipping and update move for each parameter. PyTorch's fused AdamW moves 28
    alone; the norm 4, scaling by tokens and by the norm 8 each, 16-bit weights 6."""
    if s.torch_kernels:
        return 54.0
    return 34.0 if s.element < 4 else 32.0


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
    if s.layout.swap_optimizer:  # states stream in and out, both ways at once
        optimizer = np.maximum(optimizer, 12.0 * held / host_bandwidth(hw))
    optimizer = optimizer + hw.launch_us.step * 1e-6
    return DataParallel(reduce, optimizer, gather)
