"""Layouts as a struct of arrays: one layout, or a million of them, through the same code.

Ranks are numbered as megatron-core numbers them: tensor, context, (expert,) data, pipeline from
the nearest neighbours to the farthest; that gives the stride of every group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np

from configs.layout import first_layer, stage_of_mtp
from configs.schema import Config, ModelConfig, RecomputeModule
from configs.violation import ConfigError, Violation
from simulator.array import Array, Mask

MODULES: tuple[str, ...] = get_args(RecomputeModule)
SCHEDULES = ("1f1b", "gpipe", "zero_bubble")
# How layers are dealt to virtual stages: evenly, no-op layers at both ends; from the front, so that
# the last stages hold fewer; or with MTP and the loss on stages of their own, the first of the
# others one layer more where they do not divide.
DEALS = ("even", "front", "apart")


@dataclass(frozen=True)
class Layout:
    """How a model is spread over devices and what is kept for the backward pass.

    Every field is a number or an array, all of them broadcasting; booleans select with
    `np.where`. `schedule` indexes `SCHEDULES`.
    """

    tp: Array = 1
    sequence_parallel: Mask = True
    pp: Array = 1
    vpp: Array = 1
    cp: Array = 1
    ring: Mask = False  # context parallelism by ring exchange; otherwise by all-to-all
    ep: Array = 1
    etp: Array = 1
    dp: Array = 1
    zero: Array = 1  # ZeRO stage
    micro_batch: Array = 1
    num_microbatches: Array = 1
    noop_layers: Array = 0
    deal: Array = 0  # index of `DEALS`
    schedule: Array = 0
    overlap_sends: bool = True  # of interleaved pipelines
    overlap_expert_parallel: Mask = False  # where the schedule has a backward pass beside a forward
    overlap_grad_reduce: Mask = False
    overlap_param_gather: Mask = False
    # full recomputation: none, or of `recompute_layers` layers of each virtual stage (block), or
    # of all of them from checkpoints `recompute_layers` apart (uniform)
    full_recompute: Mask = False
    block_recompute: Mask = False
    recompute_layers: Array = 1
    # selective recomputation, by module; with `swap` the same modules go to the host instead
    swap: Mask = False
    core_attn: Mask = False
    layernorm: Mask = False
    mla_up_proj: Mask = False
    mlp: Mask = False
    moe: Mask = False
    moe_act: Mask = False
    moe_fc1: Mask = False
    moe_permute: Mask = False
    shared_experts: Mask = False
    swapped: tuple[str, ...] = ()  # modules that go to the host in every layout
    swap_optimizer: Mask = False
    stage_layers: tuple[int, ...] | None = None  # layers by virtual stage, where given

    @property
    def devices(self) -> Array:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> Array:
        """Replicas of each expert."""
        return self.tp * self.cp * self.dp / (self.ep * self.etp)

    @property
    def virtual_stages(self) -> Array:
        return self.pp * self.vpp

    @property
    def sequence_shards(self) -> Array:
        """Ranks that share the tokens outside the tensor-parallel matrices."""
        return np.where(self.sequence_parallel, self.tp, 1)

    def stride(self, group: str) -> Array:
        """Distance in ranks between neighbours of a group."""
        if group in ("tp", "etp", "tp_cp", "expert"):
            return 1
        if group == "cp":
            return self.tp
        if group == "ep":
            return self.etp
        if group in ("dp", "dp_cp"):
            return self.tp if group == "dp_cp" else self.tp * self.cp
        if group == "expert_dp":
            return self.ep * self.etp
        return self.tp * self.cp * self.dp  # pp

    def size(self, group: str) -> Array:
        """Ranks in a group."""
        sizes = {
            "dp_cp": self.dp * self.cp,
            "tp_cp": self.tp * self.cp,
            "expert": self.ep * self.etp,
            "expert_dp": self.expert_dp,
        }
        return sizes[group] if group in sizes else getattr(self, group)

    def drops(self, module: str) -> Mask:
        """Whether the activations of `module` are recomputed or swapped."""
        found: Mask = getattr(self, module)
        return found

    def take(self, index: Any) -> Layout:
        """The layouts at `index` of the arrays."""
        chosen = {
            item.name: getattr(self, item.name)[index]
            for item in fields(self)
            if isinstance(getattr(self, item.name), np.ndarray)
        }
        return replace(self, **chosen)


def from_config(config: Config) -> Layout:
    """The one layout that a configuration describes.

    Sizes that do not divide give a data-parallel size or a number of micro-batches of 0:
    `simulator.predict` refuses them.

    Raises:
        ConfigError: `memory=auto` before `simulator.memory_policy` has chosen modules.
    """
    p, memory = config.parallel, config.memory
    if memory.recompute_granularity == "auto":
        reason = "chooses modules for one layout: in predict, report, goodput, doctor and training"
        raise ConfigError([Violation("memory.recompute_granularity", "auto", reason)])
    selective = memory.recompute_granularity == "selective"
    modules = {name: selective and name in memory.recompute_modules for name in MODULES}
    return Layout(
        tp=p.tensor_model_parallel_size,
        sequence_parallel=p.sequence_parallel,
        pp=p.pipeline_model_parallel_size,
        vpp=p.virtual_pipeline_model_parallel_size,
        cp=p.context_parallel_size,
        ring=p.context_parallel_type == "ring",
        ep=p.expert_model_parallel_size,
        etp=p.expert_tensor_parallel_size,
        dp=config.data_parallel_size,
        zero=p.zero_stage,
        micro_batch=config.train.micro_batch_size,
        num_microbatches=config.num_microbatches,
        noop_layers=p.num_noop_layers,
        schedule=SCHEDULES.index(p.schedule),
        overlap_sends=config.simulation.overlap_sends,
        overlap_expert_parallel=p.overlap_expert_parallel,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        full_recompute=memory.recompute_granularity == "full",
        block_recompute=memory.recompute_method == "block",
        recompute_layers=memory.recompute_num_layers,
        swapped=tuple(memory.swap),
        swap_optimizer=memory.swap_optimizer,
        stage_layers=tuple(p.pipeline_layout) if p.pipeline_layout is not None else None,
        **modules,
    )


@dataclass(frozen=True)
class StageContent:
    """What a virtual stage holds: layers of each kind, and the ends of the model (0 or 1)."""

    dense: Array
    moe: Array
    embedding: Array
    mtp: Array  # the multi-token-prediction modules
    head: Array  # final norm, output projection and loss, of MTP's predictions too
    patch: Array = 0  # layers with a patch before them

    @property
    def layers(self) -> Array:
        return self.dense + self.moe


@dataclass(frozen=True)
class Dealt:
    """How many layers each virtual stage holds: `configs.layout.first_layer` of these figures,
    unless `stages` names them. `mtp` is the stage of the MTP modules (-1: none)."""

    depth: int
    each: Array
    more: Array
    noop_layers: Array
    stages: tuple[int, ...] | None = None
    mtp: Array = -1

    def bounds(self, stage: Array) -> tuple[Array, Array]:
        """First and one past the last layer of a virtual stage."""
        if self.stages is not None:
            start = sum(self.stages[: int(stage)])
            return start, start + self.stages[int(stage)]
        return self._first(stage), self._first(stage + 1)

    def _first(self, stage: Array) -> Array:
        found: Array = first_layer(stage, self.depth, self.each, self.noop_layers, self.more)
        return found


def deal_layers(model: ModelConfig, layout: Layout) -> Dealt:
    """The layers of `model` on the virtual stages of every layout."""
    depth = model.num_layers
    apart = layout.deal == DEALS.index("apart")
    slots = np.ceil((depth + layout.noop_layers) / layout.virtual_stages)
    others = np.maximum(layout.virtual_stages - alone(model), 1)
    least = np.floor(depth / others)
    dealt = Dealt(
        depth,
        each=np.where(apart, least, slots),
        more=np.where(apart, depth - least * others, 0),
        noop_layers=np.where(layout.deal == DEALS.index("even"), layout.noop_layers, 0),
        stages=layout.stage_layers,
    )
    if not model.mtp_num_layers:
        return dealt
    start, end = dealt.bounds(np.maximum(layout.virtual_stages - 2, 0))
    return replace(dealt, mtp=stage_of_mtp(layout.virtual_stages, layout.pp, end - start))


def alone(model: ModelConfig) -> int:
    """Virtual stages without layers where MTP and the loss stand apart."""
    return 2 if model.mtp_num_layers else 1


def stage_counts(model: ModelConfig, layout: Layout) -> list[int]:
    """Layers of every virtual stage of a single layout, in order of depth."""
    dealt = deal_layers(model, layout)
    bounds = (dealt.bounds(stage) for stage in range(int(layout.virtual_stages)))
    return [int(end - start) for start, end in bounds]


def stage_content(
    model: ModelConfig, layout: Layout, dealt: Dealt, rank: Array, chunk: int
) -> StageContent:
    """Content of chunk `chunk` of pipeline rank `rank`; empty where the layout has no such one."""
    index = chunk * layout.pp + rank
    exists = (rank < layout.pp) & (chunk < layout.vpp)
    dense_depth = model.num_dense_layers if model.num_experts else model.num_layers
    if dealt.stages is not None and not bool(exists):
        return StageContent(0, 0, 0, 0, 0)
    start, end = dealt.bounds(index)
    dense = np.minimum(end, dense_depth) - np.minimum(start, dense_depth)
    return StageContent(
        dense=np.where(exists, dense, 0),
        moe=np.where(exists, end - start - dense, 0),
        embedding=np.where(exists & (index == 0), 1, 0),
        mtp=np.where(exists & (index == dealt.mtp), 1, 0) if model.mtp_num_layers else 0,
        head=np.where(exists & (index == layout.virtual_stages - 1), 1, 0),
        patch=sum(
            (np.where(exists & (start <= i) & (i < end), 1, 0) for i in model.patched_layers),
            start=0,
        ),
    )
