"""Seconds of one collective over a hierarchy of links.

A group is `size` ranks, `stride` apart, so that its placement follows: of a domain of D devices
it holds D // stride members. With m_i members inside one domain of level i (m_-1 = 1, the last
m_i = size), each rank moves over level i

    all_gather, reduce_scatter, broadcast     bytes · (1/m_(i-1) - 1/m_i)
    all_reduce                                twice that
    all_to_all                                bytes · (m_i - m_(i-1)) / size

which is the least a hierarchy needs; level 0 of a single-node group gives the familiar
bytes · (g - 1)/g. Levels run at once (NCCL's rings) or one after another (hierarchical HCCL).

Gloo has one ring through all ranks, g of them: every hop carries bytes · (g - 1)/g, and of the
m_(i-1) ranks that a domain holds one sends it on over level i, at the pace of the port that all of
them share: per rank bytes · (1 - 1/g)/m_(i-1) for gathering and twice that for all_reduce. The
trainer's reduce_scatter over gloo is an exchange and a sum, and moves what all_to_all does.
"""

from __future__ import annotations

import numpy as np

from simulator.array import Array
from simulator.hardware import Hardware, Kind, Link

# The least part of an all-reduce's rate, as 1 + this, before the low-latency protocol takes over.
LOW_LATENCY = 4.0


def collective_seconds(
    hw: Hardware, kind: Kind, bytes: Array, size: Array, stride: Array = 1, concurrent: Array = 1
) -> Array:
    """Seconds until the last rank has finished.

    `bytes`: the whole buffer of one rank. all_reduce, broadcast: its tensor; all_gather: the
    gathered result; reduce_scatter: the input; all_to_all: all that one rank sends, its own
    share included; send_recv: the message to the next rank of the group.
    `concurrent`: collectives that share the same links at the same time, this one included.
    A group of one costs nothing.
    """
    bytes, size, stride, concurrent = (
        np.asarray(x, dtype=float) for x in (bytes, size, stride, concurrent)
    )
    if kind == "send_recv":
        busy = _point_to_point(hw, bytes, size, stride, concurrent)
    else:
        busy = _group(hw, kind, bytes, size, stride, concurrent)
    return np.where((size > 1) & (bytes > 0), busy + hw.launch_us.collective * 1e-6, 0.0)


def members(link: Link, size: Array, stride: Array) -> Array:
    """How many of a group's ranks one domain of this link holds."""
    size, stride = np.asarray(size, dtype=float), np.asarray(stride, dtype=float)
    if link.devices == 0:
        return size
    return np.minimum(np.maximum(np.floor(link.devices / stride), 1.0), size)


def _group(
    hw: Hardware, kind: Kind, bytes: Array, size: Array, stride: Array, concurrent: Array
) -> Array:
    moving: Array = 0.0
    waiting: Array = 0.0
    inner: Array = np.ones(())
    for link in hw.links:
        outer = np.maximum(members(link, size, stride), inner)
        volume = bytes * _part(hw, kind, inner, outer, size)
        seconds = _transfer(link, kind, volume, bytes, outer / inner, concurrent)
        one_by_one = hw.collective_library == "hccl"
        moving = moving + seconds if one_by_one else np.maximum(moving, seconds)
        waiting = waiting + _steps(hw, kind, link, outer / inner) * link.latency_us * 1e-6
        inner = outer
    return moving + waiting


def _part(hw: Hardware, kind: Kind, inner: Array, outer: Array, size: Array) -> Array:
    """Of its bytes, what each rank moves over a level whose domains hold `outer` of the group's
    ranks, those of the level below `inner`."""
    gloo = hw.collective_library == "gloo"
    if kind == "all_to_all" or (gloo and kind == "reduce_scatter"):
        return (outer - inner) / size
    once: Array
    if gloo and kind in ("all_gather", "all_reduce"):
        once = np.where(outer > inner, (1.0 - 1.0 / size) / inner, 0.0)
    else:
        once = 1.0 / inner - 1.0 / outer
    return once * (2.0 if kind == "all_reduce" else 1.0)


def _transfer(
    link: Link, kind: Kind, volume: Array, bytes: Array, peers: Array, concurrent: Array
) -> Array:
    """Moving `volume` bytes per rank among `peers` domains of this level."""
    bandwidth = link.bandwidth * link.efficiency[kind] / concurrent
    if link.topology == "mesh":
        bandwidth = bandwidth * np.clip((peers - 1.0) / (link.devices - 1.0), 1e-9, 1.0)
    ramp = 1.0 + link.half_mib * 2**20 / np.maximum(bytes, 1.0)
    if kind == "all_reduce" and link.all_reduce_half_mib:  # tiny ones go by another protocol
        half = link.all_reduce_half_mib * 2**20
        ramp = np.maximum(ramp, 1.0 + np.minimum(half / np.maximum(bytes, 1.0), LOW_LATENCY))
    return np.where(peers > 1, volume / bandwidth * ramp, 0.0)


def _steps(hw: Hardware, kind: Kind, link: Link, peers: Array) -> Array:
    """Latencies in a row: a ring takes peers - 1 steps, a tree or recursive doubling log2; the
    library takes the fewer, but NCCL has only rings for gathering and reduce-scatter (trees are
    for all-reduce). A full mesh and a direct exchange need one."""
    tree = np.ceil(np.log2(np.maximum(peers, 1.0)))
    if link.topology == "mesh" or kind == "all_to_all":
        one = np.where(peers > 1, 1.0, 0.0)
        return one * (2.0 if kind == "all_reduce" else 1.0)
    if kind in ("all_gather", "reduce_scatter") and hw.collective_library != "hccl":
        return peers - 1.0
    fewer = np.minimum(peers - 1.0, 2.0 * tree)
    return fewer * (2.0 if kind == "all_reduce" else 1.0)


def _point_to_point(
    hw: Hardware, bytes: Array, size: Array, stride: Array, concurrent: Array
) -> Array:
    """The slowest hop of the group: over the first level whose domain holds all of it."""
    seconds: Array = np.full(np.broadcast_shapes(*map(np.shape, (bytes, size, stride))), np.inf)
    for link in reversed(hw.links):
        bandwidth = link.bandwidth * link.efficiency["send_recv"] / concurrent
        if link.topology == "mesh":
            bandwidth = bandwidth / (link.devices - 1.0)
        hop = bytes / bandwidth + link.latency_us * 1e-6
        inside = members(link, size, stride) >= size
        seconds = np.where(inside, hop, seconds)
    return seconds
