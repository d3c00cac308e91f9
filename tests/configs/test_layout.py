"""Which layers a stage holds, against the rule said one slot after the other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from configs.compose import load
from configs.layout import layers_per_virtual_stage, mtp_stage, stage_of_mtp, stage_parts
from simulator.layout import deal_layers, from_config, stage_counts

SIZES = [
    (layers, pp, vpp)
    for layers, pp, vpp in itertools.product((1, 4, 7, 48, 61), (1, 2, 4, 8), (1, 2, 5))
    if layers >= pp * vpp // 2
]


def plan(layers: int, pp: int, vpp: int, *more: str):
    return load(
        [
            f"model.num_layers={layers}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"parallel.virtual_pipeline_model_parallel_size={vpp}",
            f"parallel.num_noop_layers={-layers % (pp * vpp)}",
            f"devices={pp}",
            *more,
        ]
    )


def one_after_the_other(layers: int, stages: int) -> list[int]:
    """A no-op layer takes a slot of the last stage that still has one, then of the first."""
    noop = -layers % stages
    counts = [(layers + noop) // stages] * stages
    for i in range(noop):
        left = [stage for stage in range(stages) if counts[stage]]
        counts[left[-1] if i % 2 == 0 else left[0]] -= 1
    return counts


@pytest.mark.parametrize(("layers", "pp", "vpp"), SIZES)
def test_no_op_layers_fill_the_ends(layers, pp, vpp):
    config = plan(layers, pp, vpp, "model.mtp_num_layers=1")
    counts = layers_per_virtual_stage(config)
    assert counts == one_after_the_other(layers, pp * vpp)
    layout = from_config(config)
    assert stage_counts(config.model, layout) == counts
    assert int(deal_layers(config.model, layout).mtp) == mtp_stage(config)


def test_what_a_stage_holds():
    config = plan(6, 4, 1, "model.mtp_num_layers=2", "parallel.pipeline_layout=[2,4,0,0]")
    assert stage_parts(config) == [
        ["embedding", "decoder", "decoder"],
        ["decoder"] * 4,
        ["mtp", "mtp"],
        ["loss"],
    ]
    beside = plan(8, 2, 1, "model.mtp_num_layers=1", "parallel.pipeline_layout=[8,0]")
    assert stage_parts(beside)[1] == ["mtp", "loss"]


def test_the_stage_of_mtp_of_many_layouts_at_once():
    stages, ranks, before = np.array([8, 8, 2, 4.0]), np.array([4, 4, 2, 4]), np.array([2, 0, 0, 0])
    assert stage_of_mtp(stages, ranks, before).tolist() == [7, 6, 1, 2]
