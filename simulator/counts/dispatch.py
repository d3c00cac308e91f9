"""What crosses between ranks on the way to experts and back.

`load` is the expected maximum over ranks of the rows that arrive, relative to their mean.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from configs.dispatch import distinct, ranks_reached, why_not
from configs.schema import DispatcherType
from simulator.array import Array, Mask
from simulator.counts.records import Collective, Message, Modules, Phase, Shapes


def uses(s: Shapes, *kinds: DispatcherType) -> Mask:
    """Where rows travel by one of these dispatchers; a dense model has none."""
    return np.isin(s.dispatchers, kinds) if s.model.num_experts else False


def exchange(s: Shapes, sent: Array, load: Array) -> list[Message]:
    """Dispatch and combine, forward and backward, of `sent` bytes of rows, chunk by chunk.

    Either all tokens of the EP × ETP ranks are gathered and their sums reduced, or rows are
    exchanged over the EP ranks; expert tensor parallelism then gathers them in its group and
    reduces them before the way back.
    """
    layout = s.layout
    gathers = np.where(uses(s, "allgather", "moge"), 1, 0)
    gathered = s.shard * s.model.hidden_size * s.element * layout.ep * layout.etp
    sharded = np.where(
        uses(s, "alltoall", "deduplicated", "hierarchical") & (np.asarray(layout.etp) > 1), 1, 0
    )
    rows = np.where(uses(s, "deduplicated"), _once(s, sent), sent)
    within = rows * load * layout.etp
    messages = []
    names: tuple[Any, ...] = ("forward", "input_gradient")
    for phase in names:
        for name in ("dispatch", "combine"):
            again: Modules = ("moe", "moe_permute") if name == "dispatch" else "moe"
            again = again if phase == "forward" else ""
            outwards = (name == "dispatch") == (phase == "forward")
            kind: Any = "all_gather" if outwards else "reduce_scatter"
            title = f"moe.{name}"
            part = width(s, name, phase)
            all_rows = gathered * part
            messages.append(Message(title, phase, kind, "expert", all_rows, "", again, gathers))
            messages.append(
                Message(f"{title} within", phase, kind, "etp", within, "", again, sharded)
            )
            messages += _between_ranks(s, title, phase, kind, sent * load * part, part, again)
    chunks = s.moe.dispatch_chunks
    return [replace(m, bytes=m.bytes / chunks, count=m.count * chunks) for m in messages]


def width(s: Shapes, name: str, phase: Phase) -> float:
    """Bytes of a row that travels, relative to the model's."""
    combined = {"model": s.element, "bf16": 2.0, "fp32": 4.0}[s.moe.combine_dtype]
    if name == "combine":
        return combined / s.element
    if phase != "forward":  # a gradient
        return 1.0
    with_scale = 1.0 + 4.0 / s.model.hidden_size
    sent = {"model": s.element, "bf16": 2.0, "int8": with_scale}[s.moe.dispatch_dtype]
    return sent / s.element


def _between_ranks(
    s: Shapes, name: str, phase: Phase, kind: Collective, sent: Array, part: float, again: Modules
) -> list[Message]:
    """Rows to and from the ranks that hold their experts, where tokens are not gathered by all.
    `part` of a row's bytes in the model's own precision travel."""
    layout = s.layout
    flat, once, gathered = (
        np.where(uses(s, way), 1, 0) for way in ("alltoall", "deduplicated", "hierarchical")
    )
    each = _once(s, sent)
    messages = []
    if np.any(flat):
        messages.append(Message(name, phase, "all_to_all", "ep", sent, "", again, flat))
    if np.any(once) and not s.traits.node_forwarding:
        messages.append(Message(name, phase, "all_to_all", "ep", each, "", again, once))
    inside = np.clip(np.floor(s.domain / layout.etp), 1, layout.ep)
    nodes = np.maximum(np.floor(layout.ep / inside), 1)
    token = s.shard * s.model.hidden_size * s.element * part
    between, within = f"{name} between nodes", f"{name} inside node"
    far, near = (nodes, layout.etp * inside), (inside, layout.etp)  # ranks and stride
    if np.any(gathered):
        # MoGE's way inside is a gather, where all its experts on a rank are one row.
        whole = np.vectorize(lambda ranks: not why_not("moge", s.moe, int(ranks), 1))(layout.ep)
        rows = np.where(whole, np.minimum(sent, token * layout.ep), sent)
        messages += [
            Message(between, phase, kind, "ep", token * nodes, "", again, gathered, *far),
            Message(within, phase, "all_to_all", "ep", rows, "", again, gathered, *near),
        ]
    if np.any(once) and s.traits.node_forwarding:
        # Rows are handed on inside the node while others still cross.
        crossing, beside = token * distinct_nodes(s, nodes), f"{between}:{phase}"
        messages += [
            Message(between, phase, "all_to_all", "ep", crossing, "", again, once, *far),
            Message(within, phase, "all_to_all", "ep", each, beside, again, once, *near),
        ]
    return messages


def _once(s: Shapes, sent: Array) -> Array:
    """Of `sent` bytes, a row for each choice, those of a row for each rank that a token goes to."""
    reached = np.vectorize(lambda ranks: ranks_reached(s.moe, int(ranks)))(s.layout.ep)
    return sent * reached / s.moe.top_k


def distinct_nodes(s: Shapes, nodes: Array) -> Array:
    """Expected number of nodes that hold a token's experts, its own included; group-limited
    routing stays inside the groups it may use."""
    moe_config = s.moe
    reachable = nodes
    limited = moe_config.router in ("group_limited", "forced_balance")
    if limited and moe_config.topk_group:
        share = moe_config.topk_group / moe_config.num_expert_groups
        reachable = np.maximum(np.minimum(nodes, np.ceil(nodes * share)), 1)
    return distinct(reachable, moe_config.top_k)
