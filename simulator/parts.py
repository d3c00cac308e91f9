"""The building blocks of a model under its layouts, counted and priced: what every forecast is made
of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.schema import Config
from simulator.array import Array
from simulator.counts.layer import Blocks, blocks
from simulator.counts.records import Counts, Saved, Shapes, shapes
from simulator.hardware import Hardware, load_hardware
from simulator.imbalance import routing_factor
from simulator.layout import Layout
from simulator.memory import Activations, block_activations
from simulator.seconds import BlockSeconds, StageBlocks, price_blocks


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
        kept: dict[tuple[tuple[str, ...], ...], Array] = {}
        for tensor in value.saved:
            by = tensor.dropped_by, tensor.swapped_by
            kept[by] = kept.get(by, 0.0) + tensor.bytes
        return Counts(
            saved=[Saved("", _expand(size, index, length), *by) for by, size in kept.items()],
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
