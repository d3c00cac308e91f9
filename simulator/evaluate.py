"""The forecast over arrays: step time and memory of one layout or a million, one code path.

Schedules come in closed form here; `simulator.predict` runs the same parts for a single layout
and builds the schedule event by event.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.schema import Config
from simulator.array import Array
from simulator.layout import Layout
from simulator.memory import (
    communication_buffers,
    measured_peak,
    rank_memory,
    stage_contents,
    stage_parameters,
)
from simulator.parameters import model_flops_per_token
from simulator.parts import peak_dtype, prepare_distinct, tokens_per_step
from simulator.passes import rank_seconds, send_seconds
from simulator.pipeline import Ranks, RankSeconds, distinct_ranks, hidden_seconds, pipeline_seconds
from simulator.step_end import data_parallel


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
