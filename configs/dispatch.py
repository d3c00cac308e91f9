"""Which dispatcher takes tokens to their experts. The trainer, the simulator and the flags for
other engines all ask here.

`auto` takes the one whose rows are there first, by what each sends inside nodes and between them
and by the rates of the links; see the table in `docs/training.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.layout import ranks_per_node
from configs.schema import Config, DispatcherType, MoEConfig
from configs.violation import ConfigError, Violation

# Each takes the place of one before it if it needs less than this part of its time: what a
# dispatcher with other shapes in every step costs besides (counts that the host waits for, more
# copies) is not counted.
WORTH = 0.95
IN_ORDER: tuple[DispatcherType, ...] = (
    "moge",
    "hierarchical",
    "allgather",
    "alltoall",
    "deduplicated",
)


@dataclass(frozen=True)
class Level:
    """How fast `devices` ranks (0: any number) reach each other, in any one unit: when all gather
    what all have, and when each sends to each what it has for it."""

    devices: int
    gather: float
    exchange: float


@dataclass(frozen=True)
class Links:
    """What joins the ranks, from the fastest level on; `ranks_per_node` is 0 where it is not known,
    and all count as one node then."""

    ranks_per_node: int = 0
    levels: tuple[Level, ...] = ()

    def over(self, ranks: int) -> Level:
        """The first level that holds so many."""
        return next((x for x in self.levels if x.devices == 0 or x.devices >= ranks), self._last)

    @property
    def _last(self) -> Level:
        return self.levels[-1] if self.levels else Level(0, *ASSUMED)


# Where no machine is named: an exchange keeps this part of what gathering reaches, and a link
# between nodes is so much slower (Atlas 800 A2: 196 and 25 GB/s, H100: 450 and 50, which keep less
# of it).
ASSUMED = (1.0, 0.6)
SLOWER = 10.0


def links(config: Config) -> Links:
    """Of the machine that `hardware` names, or assumed."""
    per_node = ranks_per_node(config)
    levels = [
        Level(link["devices"], *(_rate(link, kind) for kind in ("all_gather", "all_to_all")))
        for link in (config.hardware or {}).get("links", [])
    ]
    if not levels:
        slow = Level(0, *(rate / SLOWER for rate in ASSUMED))
        levels = [Level(per_node, *ASSUMED)] + [slow] * (per_node > 0)
    return Links(per_node, tuple(levels))


def _rate(link: dict[str, Any], kind: str) -> float:
    """GB/s of one device."""
    return link["bandwidth_gbps"] / link.get("devices_per_port", 1) * link["efficiency"][kind]


@dataclass(frozen=True)
class Volume:
    """Rows that a rank sends for each token of its own, on the way to the experts (and back)."""

    between: float  # to other nodes
    inside: float


def volume(
    kind: DispatcherType,
    moe: MoEConfig,
    expert_parallel: int,
    expert_tensor_parallel: int = 1,
    ranks_per_node: int = 0,
) -> Volume:
    """What a dispatcher sends, if choices are even. A gather is a ring: its ranks send all tokens
    but one rank's, and the last of a node sends them to the next node."""
    ranks = expert_parallel * expert_tensor_parallel
    node = min(ranks_per_node or ranks, ranks)
    nodes = ranks / node
    if kind == "local":
        return Volume(0.0, 0.0)
    if kind in ("allgather", "moge"):
        crossing = 1 / node if nodes > 1 else 0.0
        return Volume((ranks - 1) * crossing, (ranks - 1) * (1 - crossing))
    if kind == "hierarchical":
        whole = why_not("moge", moe, expert_parallel, 1) == ""
        rows = nodes if whole else moe.top_k / node
        return Volume(nodes - 1, rows * (node - 1))
    rows = float(moe.top_k)
    if kind == "deduplicated":
        rows = ranks_reached(moe, expert_parallel)
    here = max(node / expert_tensor_parallel, 1) / expert_parallel  # part that stays in the node
    gathered = rows * (expert_tensor_parallel - 1)
    return Volume(rows * (1 - here), rows * (here - 1 / expert_parallel) + gathered)


def distinct(places: Any, top_k: int) -> Any:
    """Expected number of distinct places among `top_k` even choices; of a number or an array."""
    return places * (1.0 - (1.0 - 1.0 / places) ** top_k)


def ranks_reached(moe: MoEConfig, expert_parallel: int) -> float:
    """Expected number of ranks that hold experts of a token, of choices that are even where the
    router leaves them free: MoGE has as many in each group."""
    groups = moe.equal_groups
    if groups % expert_parallel == 0:
        return float(expert_parallel)
    if expert_parallel % groups or moe.top_k % groups:
        return float(distinct(expert_parallel, moe.top_k))
    return float(groups * distinct(expert_parallel / groups, moe.top_k // groups))


def duration(kind: DispatcherType, sent: Volume, links: Links, ranks: int) -> float:
    """Of what is sent, per token, in the unit of the links' rates."""
    node, all_ranks = links.over(min(links.ranks_per_node or ranks, ranks)), links.over(ranks)
    if kind in ("allgather", "moge"):
        return sent.inside / node.gather + sent.between / all_ranks.gather
    crossing = all_ranks.gather if kind == "hierarchical" else all_ranks.exchange
    return sent.inside / node.exchange + sent.between / crossing


def durations(
    moe: MoEConfig, expert_parallel: int, expert_tensor_parallel: int, links: Links
) -> dict[DispatcherType, float]:
    """Of every dispatcher that can serve, in the order in which `auto` looks at them."""
    node, ranks = links.ranks_per_node, expert_parallel * expert_tensor_parallel
    kinds: Sequence[DispatcherType] = IN_ORDER
    if moe.router == "expert_choice":  # tokens differ in their number of experts
        kinds = ("alltoall",)
    sizes = expert_parallel, expert_tensor_parallel, node
    return {
        kind: duration(kind, volume(kind, moe, *sizes), links, ranks)
        for kind in kinds
        if not why_not(kind, moe, *sizes) and (kind != "hierarchical" or 0 < node < expert_parallel)
    }


def dispatcher(
    moe: MoEConfig, expert_parallel: int, expert_tensor_parallel: int, links: Links | None = None
) -> DispatcherType:
    """The dispatcher that `moe.dispatcher` stands for; `auto` takes the fastest that can serve.

    Raises:
        ConfigError: the dispatcher named cannot serve this router or these sizes.
    """
    sizes = expert_parallel, expert_tensor_parallel
    if moe.dispatcher != "auto":
        if reason := why_not(moe.dispatcher, moe, *sizes):
            raise ConfigError([Violation("moe.dispatcher", moe.dispatcher, reason)])
        return moe.dispatcher
    if not why_not("local", moe, *sizes):
        return "local"
    each = durations(moe, *sizes, links or Links())
    best = next(iter(each))
    for kind, needed in each.items():
        best = kind if needed < WORTH * each[best] else best
    return best


def resolved(config: Config) -> DispatcherType:
    """The dispatcher of a configuration."""
    p = config.parallel
    sizes = p.expert_model_parallel_size, p.expert_tensor_parallel_size
    return dispatcher(config.moe, *sizes, links(config))


def explained(config: Config) -> str:
    """One line: the dispatcher, and where `auto` chose it, why."""
    p, kind = config.parallel, resolved(config)
    found, sizes = links(config), (p.expert_model_parallel_size, p.expert_tensor_parallel_size)
    if config.moe.dispatcher != "auto" or kind == "local":
        return f"experts: {kind} dispatch"
    ranks, node = sizes[0] * sizes[1], found.ranks_per_node
    where = f"{ranks} ranks" + (f" on {ranks // node} nodes" if 0 < node < ranks else "")
    each = durations(config.moe, *sizes, found)
    others = ", ".join(
        f"{other} {each[other] / each[kind]:.2g}x" for other in each if other != kind
    )
    sent = volume(kind, config.moe, *sizes, node)
    line = f"experts: moe.dispatcher=auto takes {kind} over {where}; a token travels "
    line += f"{sent.between:.2g} times between nodes and {sent.inside:.2g} inside"
    return f"{line} (of its time {others})" if others else line


def why_not(
    kind: DispatcherType,
    moe: MoEConfig,
    expert_parallel: int,
    expert_tensor_parallel: int,
    ranks_per_node: int = 0,
) -> str:
    """Why a dispatcher cannot serve this router over these ranks; "" where it can. `ranks_per_node`
    is 0 where it is not known."""
    spread = expert_parallel * expert_tensor_parallel
    if kind == "local" and spread > 1:
        return f"tokens cannot stay local: experts are spread over EP x ETP = {spread} ranks"
    if kind == "moge" and moe.capacity_factor:
        return "its equal splits need every token's experts, and capacity_factor turns some away"
    if kind == "moge" and moe.router != "moge":
        return f"its equal splits come from router=moge, not {moe.router}"
    if kind == "moge" and moe.num_expert_groups % expert_parallel:
        return (
            f"equal splits need whole groups on every rank: {moe.num_expert_groups} groups over "
            f"{expert_parallel} expert-parallel ranks"
        )
    if kind == "hierarchical" and expert_tensor_parallel > 1:
        return (
            "it takes tokens to whole experts, and expert_tensor_parallel_size = "
            f"{expert_tensor_parallel} slices them"
        )
    if kind == "hierarchical" and ranks_per_node and expert_parallel % ranks_per_node:
        inside = "lie inside one node" if expert_parallel < ranks_per_node else "do not fill nodes"
        return (
            f"its two levels are nodes and their ranks: {expert_parallel} expert-parallel ranks "
            f"{inside} of {ranks_per_node}"
        )
    return ""
