"""Memory of every pipeline rank by category, at the moments that can be its peak.

Weights, gradients and optimizer state stay; activations follow the schedule; on top comes the
worst of three moments of the backward pass: inside a layer, at the loss, and when the embedding's
gradient is written. What the collective library and the driver hold lies outside the framework's
allocator and is reported apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from configs.schema import RecomputeModule
from simulator.array import Array, Mask
from simulator.counts.layer import Blocks
from simulator.counts.records import Counts, Saved, Shapes, total
from simulator.counts.vocabulary import embedding_gradient
from simulator.hardware import ELEMENT_BYTES, Hardware
from simulator.layout import SCHEDULES, Layout, StageContent, deal_layers, stage_content
from simulator.parameters import (
    LayerKind,
    LayerParameters,
    layer_parameters,
    leap_head_parameters,
    mtp_extra,
    mtp_kind,
    norm_parameters,
    patch_linear,
)

# What the driver, the framework and fragmentation take beside the allocator's peak.
RESERVED_FRACTION = 0.04


def fits(hw: Hardware, peak: Array, outside: Array, margin: float = 0.0) -> Array:
    """Whether a peak of the allocator and what lies outside it (bytes) fit the device, also where
    the peak turns out higher by the part `margin`."""
    return peak * (1 + margin) * (1 + RESERVED_FRACTION) + outside <= hw.memory_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank."""

    weights: Array
    gradients: Array
    optimizer: Array
    activations: Array  # most micro-batches in flight
    temporary: Array
    buffers: Array  # of the collective library, outside the allocator
    # What holes are a part of: of a process, what would pass were nothing recomputed or swapped; of
    # a device's allocator, which has none to forecast, `passing` (a search has no time for more).
    leaves_holes: Array

    @property
    def kept(self) -> Array:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passing(self) -> Array:
        """What comes and goes within a step, at its most."""
        return self.activations + self.temporary

    @property
    def peak(self) -> Array:
        """What the framework's allocator reports as its peak."""
        return self.kept + self.passing


def measured_peak(hw: Hardware, memory: Memory) -> Array:
    """The peak that a run reports, in bytes: of the allocator on a device with memory of its own,
    of the whole process elsewhere.

    What a process holds beyond the count does not shrink with what is recomputed or swapped
    (measured: `benchmarks/memory_limit.py`).
    """
    return memory.peak + memory.leaves_holes * hw.memory_overhead + hw.process_base_bytes


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one pipeline rank on one device: `dense` replicated over the data-parallel
    group, `experts` over the expert-data-parallel group."""

    dense: Array
    experts: Array
    # Embedding table that another stage holds too (tied with its head, or for its MTP modules):
    # an all-reduce between the stages adds up the gradients.
    copied: Array = 0.0
    # Of `dense` and of `experts`, where they alone are trained.
    adapters: tuple[Array, Array] | None = None

    @property
    def trained(self) -> StageParameters:
        """Those that have gradients."""
        return self if self.adapters is None else StageParameters(*self.adapters)

    @property
    def total(self) -> Array:
        return self.dense + self.experts


def stage_contents(s: Shapes, rank: Array, max_chunks: int) -> list[StageContent]:
    """Content of every chunk of a pipeline rank."""
    dealt = deal_layers(s.model, s.layout)
    return [stage_content(s.model, s.layout, dealt, rank, chunk) for chunk in range(max_chunks)]


def stage_parameters(s: Shapes, contents: list[StageContent]) -> StageParameters:
    """Parameters of the chunks `contents` of one pipeline rank."""
    model, layout = s.model, s.layout
    kinds: dict[str, LayerParameters] = {
        "dense": layer_parameters(model, s.moe, "dense", layout.tp, layout.ep, layout.etp)
    }
    if model.num_experts:
        kinds["moe"] = layer_parameters(model, s.moe, "moe", layout.tp, layout.ep, layout.etp)
    dense = total(content.dense for content in contents)
    moe = total(content.moe for content in contents)
    embedding = total(content.embedding for content in contents)
    head = total(content.head for content in contents)
    mtp = total(content.mtp for content in contents)
    table = np.ceil(model.vocab_size / layout.tp) * model.hidden_size
    ends = embedding * table
    if model.position_embedding == "learned":
        ends = ends + embedding * model.max_position_embeddings * model.hidden_size
    # Away from the first stage, tied embeddings are a copy and MTP modules have one of their own.
    elsewhere = 1 - embedding
    own_head = head * (elsewhere if model.tie_embeddings else 1)
    ends = ends + (own_head + mtp * elsewhere) * table
    ends = ends + head * norm_parameters(model, model.hidden_size)
    ends = ends + head * leap_head_parameters(model, layout.tp)
    several = (layout.pp > 1) & bool(model.tie_embeddings or model.mtp_num_layers)
    copies = embedding + mtp + head * bool(model.tie_embeddings)
    copied = np.where(several, np.minimum(copies, 1), 0) * table
    shared = ends + dense * kinds["dense"].dense
    if model.patched_layers:
        patches = total(content.patch for content in contents)
        shared = shared + patches * patch_linear(model).parameters()
    experts: Array = 0.0
    low, expert_low = dense * kinds["dense"].adapters, dense * 0.0
    if model.num_experts:
        low = low + moe * kinds["moe"].adapters
        expert_low = moe * kinds["moe"].expert_adapters
        shared = shared + moe * kinds["moe"].dense
        experts = moe * kinds["moe"].routed
    if model.mtp_num_layers:
        inside = kinds[mtp_kind(model)]
        extra = model.mtp_num_layers * mtp
        low = low + extra * inside.adapters
        shared = shared + extra * (inside.dense + mtp_extra(model, layout.tp))
        experts = experts + extra * inside.routed
        expert_low = expert_low + extra * inside.expert_adapters
    trained = (low, expert_low) if model.lora_rank else None
    return StageParameters(shared, experts, copied, trained)


def kept_activations(s: Shapes, counts: Counts) -> Array:
    """Bytes that one micro-batch leaves for the backward pass of a layer, under selective
    recomputation and swap."""
    kept: Array = 0.0
    for tensor in counts.saved:
        gone = _remade(s, tensor) | _away(s, tensor)
        kept = kept + np.where(gone, 0.0, tensor.bytes)
    return kept


def _remade(s: Shapes, tensor: Saved) -> Mask:
    """Whether recomputation makes it again."""
    found: Mask = False
    for module in tensor.dropped_by:
        found = found | (s.layout.drops(module) & np.logical_not(s.layout.swap))
    return found


def _away(s: Shapes, tensor: Saved) -> Mask:
    """Whether it is on the host."""
    found: Mask = False
    for module in tensor.movable_by:
        found = found | (s.layout.drops(module) & s.layout.swap) | (module in s.layout.swapped)
    return found & np.logical_not(_remade(s, tensor))


def swapped_activations(s: Shapes, counts: Counts | None) -> Array:
    """Bytes that one micro-batch of a layer sends to the host, and later fetches."""
    swapped: Array = 0.0
    for tensor in counts.saved if counts else ():
        swapped = swapped + np.where(_away(s, tensor), tensor.bytes, 0.0)
    return swapped


@dataclass(frozen=True)
class Activations:
    """Bytes kept per micro-batch by each block, and the peaks while it runs backward."""

    dense: Array
    moe: Array
    head: Array
    mtp: Array
    embedding: Array
    checkpoint: Array  # input of a layer
    layer_peak: Array
    head_peak: Array
    patch: Array = 0.0
    # The same, were nothing recomputed or swapped; of a process alone, see `Memory.leaves_holes`.
    if_all_kept: Activations | None = None


def block_activations(s: Shapes, blocks: Blocks) -> Activations:
    kept = _activations(s, blocks)
    if s.backend != "cpu":
        return kept
    plain = replace(s, layout=_keeping_all(s.layout))
    return replace(kept, if_all_kept=_activations(plain, blocks))


def _keeping_all(layout: Layout) -> Layout:
    modules: dict[str, Any] = dict.fromkeys(get_args(RecomputeModule), False)
    return replace(layout, full_recompute=False, swapped=(), **modules)


def _activations(s: Shapes, blocks: Blocks) -> Activations:
    dense = kept_activations(s, blocks.dense) if blocks.dense else 0.0
    moe = kept_activations(s, blocks.moe) if blocks.moe else 0.0
    peaks = [block.backward_peak for block in (blocks.dense, blocks.moe) if block]
    layer_peak: Array = 0.0
    for peak in peaks:
        layer_peak = np.maximum(layer_peak, peak)
    # A layer that is recomputed whole stands in memory once more, complete.
    whole = np.maximum(dense, moe)
    chunk = np.where(s.layout.block_recompute, 1, s.layout.recompute_layers)
    layer_peak = layer_peak + np.where(s.layout.full_recompute, whole * chunk, 0.0)
    # What was swapped comes back a layer at a time.
    back = np.maximum(swapped_activations(s, blocks.dense), swapped_activations(s, blocks.moe))
    layer_peak = layer_peak + back
    return Activations(
        dense,
        moe,
        kept_activations(s, blocks.head),
        kept_activations(s, blocks.mtp) if blocks.mtp else 0.0,
        kept_activations(s, blocks.embedding),
        s.shard * s.model.hidden_size * s.element,
        layer_peak,
        blocks.head.backward_peak,
        kept_activations(s, blocks.patch) if blocks.patch else 0.0,
    )


def chunk_activations(layout: Layout, kept: Activations, content: StageContent) -> Array:
    """Bytes that one micro-batch keeps in one chunk."""
    everything = content.dense * kept.dense + content.moe * kept.moe
    count = layout.recompute_layers
    first_dense = np.minimum(count, content.dense)
    first_moe = np.minimum(count - first_dense, content.moe)
    rest = (content.dense - first_dense) * kept.dense + (content.moe - first_moe) * kept.moe
    block = (first_dense + first_moe) * kept.checkpoint + rest
    uniform = np.ceil(content.layers / count) * kept.checkpoint
    full = np.where(layout.block_recompute, block, uniform)
    layers = np.where(layout.full_recompute, full, everything + content.patch * kept.patch)
    ends = content.head * kept.head + content.mtp * kept.mtp
    return layers + ends + content.embedding * kept.embedding


def units_in_flight(layout: Layout, rank: Array) -> Array:
    """Chunk passes forward but not yet backward, at most, on a pipeline rank.

    1F1B keeps p - rank; interleaving 2(p - rank - 1) + (v - 1)p + 1 chunk passes; the overlapped
    schedule one more; GPipe all.
    """
    p, v, m = layout.pp, layout.vpp, layout.num_microbatches
    after = np.maximum(p - rank - 1, 0)
    one = after + 1
    interleaved = 2 * after + (v - 1) * p + 1
    units = np.where(v > 1, interleaved, one)
    units = units + np.where(layout.overlap_expert_parallel, 1, 0)
    units = np.where(layout.schedule == SCHEDULES.index("gpipe"), m * v, units)
    return np.minimum(units, m * v)


def live_activations(
    layout: Layout, kept: Activations, contents: list[StageContent], rank: Array
) -> Array:
    """Bytes of all activations in flight at the fullest moment of a rank.

    Interleaving runs p micro-batches through a chunk before it turns to the next chunk.
    """
    units = units_in_flight(layout, rank)
    group = np.minimum(layout.pp, layout.num_microbatches)
    gpipe = layout.schedule == SCHEDULES.index("gpipe")
    round_ = group * layout.vpp
    live: Array = 0.0
    for chunk, content in enumerate(contents):
        first = np.clip(units - chunk * group, 0, group)
        again = np.clip(units - round_ - chunk * group, 0, group)
        count = np.where(layout.vpp > 1, first + again, units)
        count = np.where(gpipe, layout.num_microbatches, count)
        live = live + count * chunk_activations(layout, kept, content)
    return live


def rank_memory(
    s: Shapes, blocks: Blocks, kept: Activations, rank: Array, contents: list[StageContent]
) -> Memory:
    """Memory of one pipeline rank."""
    layout = s.layout
    parameters = stage_parameters(s, contents)
    element = s.element
    half = element < 4
    shard = layout.dp * layout.cp
    expert_shard = layout.expert_dp

    def sharded(stage: int, held: StageParameters) -> Array:
        by_dense = held.dense / np.where(layout.zero >= stage, shard, 1)
        return by_dense + held.experts / np.where(layout.zero >= stage, expert_shard, 1)

    # Quantised weights are kept plain and transposed, in place of 16-bit ones.
    quantised = ELEMENT_BYTES[s.dtype] < 2
    weights = sharded(3, parameters) * (2 * ELEMENT_BYTES[s.dtype] if quantised else element)
    trained = parameters.trained
    matrices = _matrices(blocks)
    gradients = sharded(2, trained) * (4.0 if s.traits.fp32_gradients or not half else element)
    state = (4.0 if half else 0.0) + 2 * s.moment  # float32 master weights, Adam's two moments
    optimizer = np.where(s.layout.swap_optimizer, 0.0, sharded(1, trained) * state)
    if s.traits.transformer_engine and not s.model.lora_rank:
        gradients = gradients + element * total(matrices.values())
    whole = whole_layers(s, blocks, contents)
    live = live_activations(layout, kept, contents, rank)
    temporary = _temporary(s, layout, kept, contents) + whole
    holes = live + temporary
    if kept.if_all_kept is not None:
        plain, all_kept = _keeping_all(layout), kept.if_all_kept
        holes = live_activations(plain, all_kept, contents, rank)
        holes = holes + _temporary(s, plain, all_kept, contents) + whole
    buffers = communication_buffers(s)
    return Memory(weights, gradients, optimizer, live, temporary, buffers, holes)


def _temporary(s: Shapes, layout: Layout, kept: Activations, contents: list[StageContent]) -> Array:
    """The most that one of the three moments of a backward pass adds to what is kept for it."""
    head = total(content.head for content in contents)
    embeds = total(content.embedding for content in contents)
    first = chunk_activations(layout, kept, contents[0])
    table = 0.0 if s.model.lora_rank else embedding_gradient(s)
    at_embedding = embeds * table - first
    temporary = np.maximum(kept.layer_peak, np.where(head > 0, kept.head_peak, 0.0))
    return np.maximum(temporary, at_embedding)


def whole_layers(s: Shapes, blocks: Blocks, contents: list[StageContent]) -> Array:
    """Bytes of what ZeRO shards but has in hand whole at a rank's fullest moment: at stage 3 the
    weights of the layer that computes and of the next one, from stage 2 on the gradient of one.
    A part without replicas (experts spread over all ranks) is not sharded, and so never gathered.
    """
    layout = s.layout
    mtp = total(content.mtp for content in contents)
    largest: Array = 0.0
    layers: Array = 0.0
    kinds: tuple[LayerKind, ...] = ("dense", "moe")
    for kind in kinds:
        if getattr(blocks, kind) is None:
            continue
        count = total(getattr(content, kind) for content in contents)
        count = count + (mtp if kind == mtp_kind(s.model) else 0)
        held = layer_parameters(s.model, s.moe, kind, layout.tp, layout.ep, layout.etp)
        dense = np.where(layout.dp * layout.cp > 1, held.dense, 0.0)
        experts = np.where(layout.expert_dp > 1, held.routed, 0.0)
        largest = np.maximum(largest, np.where(count > 0, dense + experts, 0.0))
        layers = layers + count
    copies = np.where(layout.zero >= 3, np.minimum(layers, 2), 0)
    copies = copies + np.where(layout.zero >= 2, np.minimum(layers, 1), 0)
    return copies * s.element * largest


def _matrices(blocks: Blocks) -> dict[str, Array]:
    present = [block for block in (blocks.dense, blocks.moe) if block]
    return {name: size for block in present for name, size in block.matrices.items()}


def communication_buffers(s: Shapes) -> Array:
    """The collective library's buffers, for every group of more than one rank."""
    groups: Array = 0
    for name in ("tp", "cp", "dp", "ep", "etp", "pp", "expert_dp"):
        groups = groups + np.where(s.layout.size(name) > 1, 1, 0)
    return groups * s.communicator_bytes
