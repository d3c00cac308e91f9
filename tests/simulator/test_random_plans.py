"""What must hold of any plan: structures drawn from everything that a search would try."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from configs.compose import load
from configs.schema import Config
from simulator.candidates import candidates, enumerate_layouts, recompute_policies
from simulator.evaluate import Evaluation, evaluate
from simulator.hardware import Hardware, load_hardware
from simulator.layout import Layout

PLANS = 400  # of each case
CASES = [
    ("mixtral_8x7b", "h100", 64),
    ("pangu_pro_moe", "ascend_910b_376t", 256),
    ("deepseek_v3", "h100", 256),
    ("pangu_ultra_dense", "cloudmatrix384", 64),
]


@cache
def drawn(model: str, hardware: str, batch: int) -> tuple[Config, Layout]:
    """A configuration and `PLANS` layouts of 64 devices whose micro-batches can be halved."""
    overrides = [f"model={model}", f"hardware={hardware}", "devices=64", "train.seq_length=4096"]
    config = load([*overrides, f"train.global_batch_size={batch}"])
    names = ("schedule", "pipeline_layout", "overlap_expert_parallel")
    pinned = frozenset(f"parallel.{name}" for name in names)
    structures, _ = enumerate_layouts(config, pinned, everything=True)
    even = structures.num_microbatches % (2 * np.where(structures.vpp > 1, structures.pp, 1)) == 0
    places = np.flatnonzero(even)
    chosen = np.random.default_rng(batch).choice(places, min(PLANS, len(places)), replace=False)
    policies = recompute_policies(config, frozenset({"memory"}))
    return config, candidates(structures.take(chosen), policies, np.arange(len(chosen)))


def after(config: Config, layout: Layout) -> Evaluation:
    return evaluate(replace(config, devices=int(np.max(layout.devices))), layout)


def farthest(hardware: Hardware, layout: Layout, group: str) -> np.ndarray:
    """The level of links that a group reaches over: 0 for a group of one."""
    size = layout.size(group)
    reach = size * layout.stride(group)
    levels = [reach > link.devices for link in hardware.links if link.devices]
    return np.where(size > 1, 1 + np.sum(levels, axis=0), 0)


@pytest.mark.parametrize("case", CASES)
def test_twice_the_devices_are_not_slower(case):
    """With twice the replicas and half the micro-batches a step only takes longer under ZeRO 2 and
    3, which move gradients and weights with every micro-batch, and only where they now go over a
    slower link than before (or over one at all)."""
    config, layout = drawn(*case)
    hardware = load_hardware(config.hardware)
    twice = replace(layout, dp=2 * layout.dp, num_microbatches=layout.num_microbatches / 2)
    slower = after(config, twice).step_seconds > after(config, layout).step_seconds
    farther = np.zeros(slower.shape, dtype=bool)
    for group in ("dp_cp", "expert_dp"):
        farther |= farthest(hardware, twice, group) > farthest(hardware, layout, group)
    assert not np.any(slower & ~(farther & (layout.zero >= 2)))


@pytest.mark.parametrize("case", CASES)
def test_a_higher_stage_of_zero_needs_no_more_memory(case):
    """Where a rank holds more layers than the two that ZeRO-3 has in hand whole."""
    config, layout = drawn(*case)
    deep = layout.take(np.flatnonzero(config.model.num_layers >= 4 * layout.virtual_stages))
    peaks = []
    for zero in range(4):
        sharded = replace(deep, zero=np.full(deep.tp.shape, float(zero)))
        peaks.append(evaluate(config, sharded).peak_memory_bytes)
    for lower, higher in pairwise(peaks):
        assert np.all(higher <= lower * (1 + 1e-9))
