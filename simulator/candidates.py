"""The layouts and recomputation policies that a search goes through, as arrays.

Sizes that cannot work fall out with their reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np

from configs.dispatch import why_not
from configs.layout import ranks_per_node
from configs.schema import Config
from simulator.array import Array
from simulator.hardware import load_hardware
from simulator.layout import DEALS, MODULES, SCHEDULES, Layout, alone, from_config, stage_counts
from simulator.parameters import query_groups

LARGEST_TP = 64
LARGEST_CP = 64
LARGEST_VPP = 8
MICRO_BATCHES = (1, 2, 4, 8)

# Field of `Layout` -> key of the configuration that pins it.
KEYS = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "micro_batch": "train.micro_batch_size",
    "deal": "parallel.pipeline_layout",
    "ring": "parallel.context_parallel_type",
    "zero": "parallel.zero_stage",
    "schedule": "parallel.schedule",
    "overlap_expert_parallel": "parallel.overlap_expert_parallel",
}
POLICY_KEYS = (
    "memory",
    "memory.recompute_granularity",
    "memory.recompute_modules",
    "memory.recompute_method",
    "memory.recompute_num_layers",
    "memory.swap",
)


def divisors(number: int, limit: int) -> list[int]:
    return [value for value in range(1, min(number, limit) + 1) if number % value == 0]


def enumerate_layouts(
    config: Config, pinned: frozenset[str], everything: bool
) -> tuple[Layout, dict[str, int]]:
    """All structures that can work, sorted by pipeline depth, and how many others there are by
    reason."""
    model, devices = config.model, config.world_size
    now = from_config(config)
    most_stages = model.num_layers + 2
    experts = max(model.num_experts, 1)
    values: dict[str, list[Any]] = {
        "pp": divisors(devices, most_stages),
        "vpp": list(range(1, LARGEST_VPP + 1)),
        "tp": divisors(devices, LARGEST_TP),
        "cp": divisors(devices, LARGEST_CP),
        "ep": divisors(experts, min(devices, 1024)),
        "etp": divisors(devices, LARGEST_TP) if model.num_experts else [1],
        "micro_batch": list(MICRO_BATCHES),
        "deal": list(range(len(DEALS))),
        "ring": [False, True] if everything else [now.ring],
        "zero": [0, 1, 2, 3] if everything else [now.zero],
        "schedule": list(range(len(SCHEDULES))) if everything else [now.schedule],
        "overlap_expert_parallel": [False, True]
        if everything and model.num_experts
        else [now.overlap_expert_parallel],
    }
    for name, key in KEYS.items():
        if key in pinned:
            values[name] = [getattr(now, name)]
    grid = np.meshgrid(*values.values(), indexing="ij", sparse=True)
    axis = dict(zip(values, grid, strict=True))
    shape = np.broadcast_shapes(*(part.shape for part in grid))
    alive = np.ones(shape, dtype=bool)
    rejected: dict[str, int] = {}
    for reason, bad in _reasons(config, axis, everything):
        before = int(alive.sum())
        alive &= np.logical_not(bad)
        if before - int(alive.sum()):
            rejected[reason] = before - int(alive.sum())
    places = np.nonzero(alive)
    columns = {
        name: part.ravel()[place].astype(np.int32 if part.dtype != bool else bool)
        for (name, part), place in zip(axis.items(), places, strict=True)
    }
    order = np.lexsort((columns["vpp"], columns["pp"]))
    columns = {name: column[order] for name, column in columns.items()}
    dp = devices // (columns["tp"] * columns["pp"] * columns["cp"])
    stages = columns["pp"] * columns["vpp"]
    layout = replace(
        now,
        **columns,
        dp=dp,
        num_microbatches=config.train.global_batch_size // (dp * columns["micro_batch"]),
        noop_layers=-model.num_layers % stages,
        stage_layers=None,
    )
    return layout, rejected


def _reasons(
    config: Config, axis: dict[str, np.ndarray], everything: bool
) -> Iterator[tuple[str, Array]]:
    """What keeps a structure from working, in the order in which a planner would ask."""
    yield from _indivisible_sizes(config, axis, everything)
    yield from _bad_stages(config, axis)
    yield from _bad_schedules(config, axis)


def _indivisible_sizes(
    config: Config, axis: dict[str, np.ndarray], everything: bool
) -> Iterator[tuple[str, Array]]:
    """Devices and widths that do not split."""
    model, devices = config.model, config.world_size
    tp, pp, cp, ep, etp = (axis[name] for name in ("tp", "pp", "cp", "ep", "etp"))
    yield "TP × PP × CP does not divide the devices", devices % (tp * pp * cp) != 0
    yield "EP × ETP × PP does not divide the devices", devices % (ep * etp * pp) != 0
    yield "attention heads do not split over TP", model.num_attention_heads % tp != 0
    groups = query_groups(model)
    shards = tp * np.where(axis["ring"], 1, cp)
    heads = model.num_attention_heads % shards != 0
    if model.attention == "gqa":
        heads = heads | ((groups % shards != 0) & (shards % groups != 0))
    yield "attention heads do not split over TP × CP", heads
    widths = [model.vocab_size, model.shared_expert_ffn_hidden_size]
    if not model.num_experts or model.num_dense_layers:
        widths.append(model.ffn_hidden_size)
    uneven: Array = np.zeros((1,), dtype=bool)
    for width in widths:
        uneven = np.logical_or(uneven, width % tp != 0)
    yield "vocabulary or MLP width does not split over TP", uneven
    yield "an expert's width does not split over ETP", model.moe_ffn_hidden_size % etp != 0
    kind = config.moe.dispatcher
    if model.num_experts and kind != "auto":
        node = ranks_per_node(config)
        unserved = np.vectorize(lambda n, m: bool(why_not(kind, config.moe, int(n), int(m), node)))
        yield f"moe.dispatcher={kind} cannot serve its ranks", unserved(ep, etp)
    if not everything and np.size(axis["etp"]) > 1:
        yield "experts are cut over all TP ranks or none", (etp != 1) & (etp != tp)
    parts = np.where(cp > 1, 2 * cp, 1) * tp
    yield "the sequence does not split over TP × CP", config.train.seq_length % parts != 0


def _bad_stages(config: Config, axis: dict[str, np.ndarray]) -> Iterator[tuple[str, Array]]:
    """Layers that do not fill the stages."""
    model, pp, vpp = config.model, axis["pp"], axis["vpp"]
    yield "interleaving needs a pipeline", (vpp > 1) & (pp == 1)
    stages = pp * vpp
    noop = -model.num_layers % stages
    yield "fewer layers than pipeline stages", stages > model.num_layers + 2
    allowed = np.maximum(model.num_layers // 8, 3)
    apart = axis["deal"] == DEALS.index("apart")
    yield "too many no-op layers to fill the stages", ~apart & (noop > allowed)
    # Only the leading dense layers are cheap enough for one more on a stage.
    others = np.maximum(stages - alone(model), 1)
    uneven = (others > model.num_layers) | (
        model.num_layers % others > max(model.num_dense_layers, 1)
    )
    yield "layers do not fill the stages beside MTP and loss", apart & uneven


def _bad_schedules(config: Config, axis: dict[str, np.ndarray]) -> Iterator[tuple[str, Array]]:
    """Batches that do not divide, schedules that do not fit, and choices that change nothing."""
    model, pp, vpp, cp = config.model, axis["pp"], axis["vpp"], axis["cp"]
    front, apart = (axis["deal"] == DEALS.index(name) for name in ("front", "apart"))
    stages, noop = pp * vpp, -config.model.num_layers % (pp * vpp)
    micro, dp = axis["micro_batch"], np.maximum(config.world_size // (axis["tp"] * pp * cp), 1)
    batches = config.train.global_batch_size
    yield "the global batch does not divide into micro-batches", batches % (micro * dp) != 0
    microbatches = np.maximum(batches // (micro * dp), 1)
    yield (
        "interleaving needs a multiple of PP micro-batches",
        (vpp > 1) & (microbatches % pp != 0),
    )
    yield (
        "zero bubble is not interleaved",
        ((axis["schedule"] == SCHEDULES.index("zero_bubble")) & (vpp > 1)),
    )
    overlap, exchanges = axis["overlap_expert_parallel"], axis["ep"] * axis["etp"] > 1
    yield "expert communication overlaps in 1F1B", overlap & (axis["schedule"] > 0)
    yield (
        "a choice without effect",
        (
            (overlap & ~exchanges & (np.size(overlap) > 1))
            | (axis["ring"] & (cp == 1))
            | (front & (noop < 2))
            | (front & (noop == alone(model) * (model.num_layers + noop) // stages))
            | (apart & (pp < 3))
            | ((axis["schedule"] > 0) & (pp == 1))
            | ((axis["zero"] != 1) & (dp * cp == 1) & (axis["zero"] != axis["zero"].min()))
        ),
    )


def recompute_policies(
    config: Config, pinned: frozenset[str], everything: bool = False
) -> list[dict[str, Any]]:
    """Fields of `Layout` for every recomputation policy worth trying; with `everything`, also
    for swapping the same modules to the host, where the machine's link to it is known."""
    now = from_config(config)
    if any(key in pinned for key in POLICY_KEYS):
        names = ("full_recompute", "block_recompute", "recompute_layers", "swap", *MODULES)
        return [{name: getattr(now, name) for name in names}]
    model = config.model
    modules = ["layernorm"]
    if not config.simulation.fused_attention:
        modules.append("core_attn")
    if model.attention == "mla":
        modules.append("mla_up_proj")
    if not model.num_experts or model.num_dense_layers:
        modules.append("mlp")
    if model.num_experts:
        modules += ["moe_act", "moe"]
    if model.shared_expert_ffn_hidden_size:
        modules.append("shared_experts")
    nothing = dict.fromkeys(MODULES, False) | {
        "full_recompute": False,
        "block_recompute": False,
        "recompute_layers": 1,
        "swap": False,
    }
    host = bool(load_hardware(config.hardware).host_link_gbps)
    policies = []
    for count in range(len(modules) + 1):
        for some in itertools.combinations(modules, count):
            if "moe" in some and {"moe_act", "shared_experts"} & set(some):
                continue
            policies.append(nothing | dict.fromkeys(some, True))
            if everything and host and some:
                policies.append(policies[-1] | {"swap": True})
    policies.append(nothing | {"full_recompute": True})
    policies += [
        nothing | {"full_recompute": True, "block_recompute": True, "recompute_layers": layers}
        for layers in (1, 2, 3, 4, 6, 8)
    ]
    return policies


def candidates(structures: Layout, policies: list[dict[str, Any]], index: Array) -> Layout:
    """Candidates by number: structure = index // policies, policy = the rest. Float arrays, so
    that no product of sizes overflows."""
    structure, policy = np.divmod(index, len(policies))
    taken = structures.take(structure)
    columns: dict[str, Any] = {
        item.name: value.astype(float) if value.dtype != bool else value
        for item in fields(taken)
        if isinstance(value := getattr(taken, item.name), np.ndarray)
    }
    for name, value in policies[0].items():
        table = np.array([entry[name] for entry in policies])
        columns[name] = table[policy] if isinstance(value, bool) else table[policy].astype(float)
    return replace(taken, **columns)


def configure(config: Config, layout: Layout) -> Config:
    """The configuration that a single layout stands for."""
    modules: Any = [name for name in MODULES if getattr(layout, name)]
    swapped = modules if layout.swap else []
    again = [] if layout.swap else modules
    granularity: Any = "full" if layout.full_recompute else "selective" if again else "none"
    schedule: Any = SCHEDULES[int(layout.schedule)]
    even = int(layout.deal) == DEALS.index("even")
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=int(layout.tp),
        pipeline_model_parallel_size=int(layout.pp),
        virtual_pipeline_model_parallel_size=int(layout.vpp),
        context_parallel_size=int(layout.cp),
        context_parallel_type="ring" if layout.ring else "all_to_all",
        expert_model_parallel_size=int(layout.ep),
        expert_tensor_parallel_size=int(layout.etp),
        num_noop_layers=int(layout.noop_layers) if even else 0,
        pipeline_layout=None if even else stage_counts(config.model, layout),
        zero_stage=int(layout.zero),
        schedule=schedule,
        overlap_expert_parallel=bool(layout.overlap_expert_parallel),
    )
    memory = replace(
        config.memory,
        recompute_granularity=granularity,
        recompute_modules=again or ["core_attn"],
        recompute_method="block" if layout.block_recompute else "uniform",
        recompute_num_layers=int(layout.recompute_layers),
        swap=swapped or config.memory.swap,
    )
    train = replace(config.train, micro_batch_size=int(layout.micro_batch))
    return replace(config, parallel=parallel, memory=memory, train=train)
