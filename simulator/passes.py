"""One micro-batch through a pipeline rank, forward and backward: computing, what is repeated, and
what it waits for (its host, sharded weights, swapped activations)."""

from __future__ import annotations

import numpy as np

from configs.violation import ConfigError, Violation
from simulator.array import Array
from simulator.collectives import collective_seconds
from simulator.counts.records import Counts, total
from simulator.hardware import Hardware
from simulator.layer_overlap import exchange_share
from simulator.layout import Layout, StageContent
from simulator.memory import swapped_activations
from simulator.parameters import LayerKind, layer_parameters
from simulator.parts import Parts
from simulator.pipeline import RankSeconds
from simulator.seconds import BlockSeconds

HOST_NORM = 7.0  # of host and device seconds; calibrated on the runs of one node
SYNCHRONISED_NORM = 2.0  # where the host waits for the device in every layer


def rank_seconds(parts: Parts, contents: list[StageContent]) -> RankSeconds:
    """One micro-batch through chunks of one rank, with recomputation and sharded weights, where
    the device may wait for its host."""
    layout = parts.layout
    counts = rank_blocks(parts, contents)
    repeated = repeated_layers(layout, contents)
    (dense, dense_layers), (moe, moe_layers) = counts[:2]
    patch, patches = counts[-1]
    again = np.where(
        layout.full_recompute,
        repeated[0] * dense.again + repeated[1] * moe.again + patches * patch.forward,
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
    inside = total(count * block.experts_hidden for block, count in counts)
    share = exchange_share(parts.hardware, parts.shapes)
    # What a layer hides by itself, and what it hides that beside, is not hidden once more.
    computing = forward + backward + weight - exchanged - inside
    left = np.maximum((exchanged + inside) * share - inside, 0.0)
    hideable = np.minimum(left, np.maximum(computing, 0.0))
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
    """The building blocks of a rank and how many of each; dense and MoE layers come first, patches
    last."""
    names = ("dense", "moe", "embedding", "mtp", "head", "patch")
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
    for elements, group in ((held.dense, "dp_cp"), (held.routed, "expert_dp")):
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
