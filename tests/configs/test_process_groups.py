"""Our arithmetic of ranks against megatron-core's own generator of groups."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest

from configs.compose import load
from configs.process_groups import process_groups
from configs.schema import Config, ParallelConfig


@cache
def base() -> Config:
    return load([])


def layout(devices: int, tp: int, cp: int, pp: int, ep: int, etp: int) -> Config:
    sizes = ParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    return replace(base(), devices=devices, parallel=sizes)


def test_groups_are_those_of_megatron_core() -> None:
    generator = pytest.importorskip("megatron.core.parallel_state").RankGenerator
    order = "tp-cp-ep-dp-pp"
    compared = 0
    for tp, cp, pp, ep, etp in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 6), (1, 2)):
        if 48 % (tp * cp * pp) or 48 % (etp * ep * pp):
            continue
        config = layout(48, tp, cp, pp, ep, etp)
        ours = process_groups(config)
        dense = generator(tp=tp, ep=1, dp=48 // (tp * cp * pp), pp=pp, cp=cp, order=order)
        expert = generator(tp=etp, ep=ep, dp=48 // (etp * ep * pp), pp=pp, cp=1, order=order)
        for name in ("tp", "cp", "dp", "pp", "dp-cp"):
            assert ours[name] == dense.get_ranks(name), (config.parallel, name)
        for name, theirs in (("etp", "tp"), ("ep", "ep"), ("edp", "dp")):
            assert ours[name] == expert.get_ranks(theirs), (config.parallel, name)
        assert ours["pp"] == expert.get_ranks("pp")
        compared += 1
    assert compared > 80


def test_groups_by_hand() -> None:
    """Eight ranks, TP2 PP2, experts over EP4 in pipeline halves."""
    ours = process_groups(layout(8, tp=2, cp=1, pp=2, ep=4, etp=1))
    assert ours["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ours["dp"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert ours["pp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert ours["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ours["edp"] == [[rank] for rank in range(8)]


def test_every_rank_once_among_ten_thousand() -> None:
    ours = process_groups(layout(10240, tp=8, cp=2, pp=16, ep=32, etp=1))
    for name, groups in ours.items():
        ranks = sorted(rank for group in groups for rank in group)
        assert ranks == list(range(10240)), name
