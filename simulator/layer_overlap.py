"""What of an MoE layer's messages goes beside what the same layer computes (`pangu/moe/layer.py`,
`pangu/moe/chunks.py`).

Of C chunks, forward, what is under way and what is computed meanwhile; h are messages there
(dispatch), b back (combine):

    h         | shared expert                `ends`
    h         | experts of a chunk           `first`
    h, b      | experts of a chunk           `middle`, C - 2 times
    b         | experts of a chunk           `last`
    b         |

A single chunk has the first line and the last. Backward it is the same from below: b and h are
gradients, and weight gradients wait for the messages of their own chunk, so that `ends` are the
shared expert's and one chunk's, and `last` no weight's. Of every line what outlasts the computing
is exposed: max(0, messages - computing), where machines hide messages whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.array import Array
from simulator.counts.dispatch import uses
from simulator.counts.records import Message, Phase, Shapes, total
from simulator.hardware import Hardware

FLAT_EXCHANGE = 0.5  # of what copy engines or few-core dispatchers hide
# Messages that something is computed beside; those inside a node, and inside an expert's ranks, are
# waited for.
THERE = ("moe.dispatch", "moe.dispatch between nodes")
BACK = ("moe.combine", "moe.combine between nodes")
# Operators, by how their names begin.
SHARED = ("shared_expert.",)
EXPERTS = ("experts.", "moe.sort", "moe.unsort")
SORTING = ("moe.permute", "moe.unpermute")


@dataclass(frozen=True)
class Beside:
    """Seconds of computing beside the messages of one pass: by the lines above."""

    ends: Array = 0.0
    first: Array = 0.0
    middle: Array = 0.0
    last: Array = 0.0


def exchange_share(hw: Hardware, s: Shapes) -> float:
    """Part of expert communication that computing hides. The preset's is of copy engines, or of
    dispatchers that take few cores; others are the collective library's kernels, which occupy the
    device where collectives are kernels at all."""
    kernels = hw.backend == "cuda" and not s.traits.node_forwarding
    return hw.overlap.exchange * (FLAT_EXCHANGE if kernels else 1.0)


def hidden(there: Array, back: Array, beside: Beside, chunks: int) -> tuple[Array, Array]:
    """Seconds of the messages there and back that computing hides, of `there` and `back` seconds in
    all that can be."""
    h, b = there / chunks, back / chunks
    hidden_there = np.minimum(h, beside.ends)
    if chunks == 1:
        return hidden_there, 0.0
    first, last = np.minimum(h, beside.first), np.minimum(b, beside.last)
    both = np.minimum(h + b, beside.middle)
    of_there = np.minimum(h, both)
    more = chunks - 2
    return hidden_there + first + more * of_there, last + more * (both - of_there)


def inside_layer(
    hw: Hardware, s: Shapes, messages: list[tuple[Message, Array]], free: dict[str, Array]
) -> list[Array]:
    """Of each message, which takes so many seconds, those that its layer hides. `free` are the
    seconds of each operator and phase beside which nothing else runs."""
    found: list[Array] = [0.0] * len(messages)
    if not s.traits.layer_overlap:
        return found
    share = [exchange_share(hw, s) * _hideable(hw, s, message) for message, _ in messages]
    phases: tuple[Phase, ...] = ("forward", "input_gradient")
    for phase in phases:
        each = {
            names: [
                index
                for index, (message, _) in enumerate(messages)
                if message.phase == phase and message.name in names
            ]
            for names in (THERE, BACK)
        }
        there, back = (
            total(share[index] * messages[index][1] for index in indices)
            for indices in each.values()
        )
        parts = hidden(there, back, _beside(s, phase, free), s.moe.dispatch_chunks)
        for indices, whole, part in zip(each.values(), (there, back), parts, strict=True):
            rate = part / np.maximum(whole, 1e-30)
            for index in indices:
                found[index] = rate * share[index] * messages[index][1]
    return found


def _hideable(hw: Hardware, s: Shapes, message: Message) -> Array:
    """1 where a message can go beside computing. Between processes of one host the thread that
    computes moves them itself; what is recomputed as `moe_permute` is sent within a pass of its
    own."""
    layout = s.layout
    again = layout.drops("moe_permute") & np.logical_not(layout.swap)
    can: Array = np.where(again, 0.0, 1.0)
    if hw.backend != "cpu":
        return can
    size = layout.size(message.group) if message.ranks is None else message.ranks
    stride = layout.stride(message.group) if message.stride is None else message.stride
    return np.where(size * stride > s.domain, can, 0.0)


def _beside(s: Shapes, phase: Phase, free: dict[str, Array]) -> Beside:
    def seconds(names: tuple[str, ...], phase: Phase) -> Array:
        end = f":{phase}"
        return total(t for name, t in free.items() if name.startswith(names) and name.endswith(end))

    # Where tokens are gathered, they are sorted when they have arrived, else before they leave.
    arrived = np.where(uses(s, "allgather", "moge"), 1.0, 0.0)
    chunks = s.moe.dispatch_chunks
    shared = seconds(SHARED, phase)
    rows = (seconds(EXPERTS, phase) + arrived * seconds(SORTING, phase)) / chunks
    if phase == "forward":
        return Beside(shared, rows, rows, rows)
    later = np.where(s.layout.overlap_expert_parallel | (chunks > 1), 1.0, 0.0)
    weights = seconds(EXPERTS, "weight_gradient") / chunks
    ends = shared + seconds(SHARED, "weight_gradient") + later * weights
    return Beside(ends, rows + weights, rows + weights, rows)
