"""The shape search: exact counts over arrays, limits that hold, a front that is one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from configs.compose import load
from configs.violation import ConfigError
from simulator.commands import values
from simulator.commands.shape import limits
from simulator.parameters import count_parameters
from simulator.plot_file import must_be_drawable
from simulator.shape import search_shapes, spread
from simulator.shape_plot import pareto_plot
from simulator.shape_space import Ranges, enumerate_shapes, shaped

SERVED = [
    "model=pangu_pro_moe",
    "hardware=ascend_910b_280t",
    "devices=4",
    "inference.weight_dtype=int8",
    "inference.compute_dtype=int8",
    "inference.kv_dtype=int8",
    "inference.latency_limit_ms=50",
    "inference.max_new_tokens=2048",
]
RANGES = Ranges(
    num_layers=[40, 48, 56],
    hidden_size=[4096, 5120, 6144],
    num_attention_heads=[32, 40, 48],
    num_query_groups=[8, 16],
    num_experts=[32, 60, 64],
    num_expert_groups=[8],
    moe_ffn_hidden_size=[1344, 1728, 2112],
    parameters=(60e9, 80e9),
)


@pytest.fixture(scope="module")
def result():
    return search_shapes(load(SERVED), RANGES, "inference", shortlist=5)


@pytest.mark.parametrize("model", ["pangu_pro_moe", "pangu_ultra_moe", "mixtral_8x7b"])
def test_counts_are_those_of_each_shape(model):
    config = load([f"model={model}", "moe.top_k=8", "moe.num_expert_groups=1"])
    ranges = replace(RANGES, num_expert_groups=[1], parameters=(0, np.inf))
    if config.model.attention == "mla":
        ranges = replace(ranges, num_query_groups=[1])
    columns, total, active, _, _ = enumerate_shapes(config, ranges)
    for index in range(0, len(total), 37):
        one = shaped(config, {name: int(column[index]) for name, column in columns.items()})
        count = count_parameters(one)
        assert (total[index], active[index]) == (count.total, count.active)


def test_every_shape_is_accounted_for():
    columns, total, _, rejected, candidates = enumerate_shapes(load(SERVED), RANGES)
    assert candidates == 3 * 3 * 3 * 2 * 3 * 3
    assert len(total) + sum(rejected.values()) == candidates
    assert rejected["experts do not split over the groups"] > 0  # 60 over 8
    assert np.all(columns["num_attention_heads"] % columns["num_query_groups"] == 0)
    assert total.min() >= 60e9
    assert total.max() <= 80e9


def test_limits_hold_and_the_front_is_one(result):
    assert result.own is not None
    assert result.own.parameters == pytest.approx(71.99e9, rel=1e-3)
    for shape in [*result.shapes, result.own]:
        assert shape.tpot_ms <= 50
        assert shape.memory_gib <= 64
        rate = shape.batch / shape.tpot_ms * 1e3 / 4
        assert shape.tokens_per_second_per_device == pytest.approx(rate)
    rates = [shape.tokens_per_second_per_device for shape in result.shapes]
    assert rates == sorted(rates, reverse=True)
    for shape in result.shapes:
        better = [
            other
            for other in result.shapes
            if other.tokens_per_second_per_device > shape.tokens_per_second_per_device
            and other.active >= shape.active
        ]
        assert (not better) == (shape in result.pareto)


def test_shortlist_is_spread_over_sizes():
    active = np.arange(80.0)
    rate = 100 - active
    chosen = spread(rate, active, 8)
    assert sorted(active[chosen] // 10) == list(range(8))
    assert set(spread(np.where(active < 40, rate, 0), active, 80)) == set(range(40))


def test_training_throughput_of_shapes():
    plan = ["model=pangu_pro_moe", "hardware=h200", "devices=8", "train.global_batch_size=8"]
    plan += ["train.seq_length=1024", "memory=none", "parallel.pipeline_model_parallel_size=1"]
    plan += ["parallel.context_parallel_size=1", "train.micro_batch_size=1"]
    small = replace(RANGES, num_layers=[4, 8], hidden_size=[4096], num_attention_heads=[32])
    small = replace(small, num_query_groups=[8], num_experts=[32], moe_ffn_hidden_size=[1344])
    small = replace(small, parameters=(0, np.inf))
    pinned = frozenset(line.partition("=")[0] for line in plan)
    config = load([*plan, "model.num_layers=8"])
    found = search_shapes(config, small, "training", pinned=pinned)
    layers = [shape.dimensions["num_layers"] for shape in found.shapes]
    assert layers == [4, 8]  # fewer layers are faster, and both are on the front
    assert found.pareto == found.shapes
    assert all(0 < shape.mfu < 1 for shape in found.shapes)


def test_ranges_of_the_command_line():
    assert values("--layers", "40:64:8") == [40, 48, 56, 64]
    assert values("--layers", "64,40") == [40, 64]
    assert limits("--parameters", "60:80") == (60e9, 80e9)
    for wrong in ("", "a", "1:2:3:4", "8:4", "0:4", "1:4:0"):
        with pytest.raises(ConfigError, match="--layers"):
            values("--layers", wrong)
    with pytest.raises(ConfigError, match="--parameters=80:60"):
        limits("--parameters", "80:60")


def test_impossible_searches_are_named():
    config = load(SERVED)
    with pytest.raises(ConfigError, match=r"none is left.*parameters outside the limits"):
        search_shapes(config, replace(RANGES, parameters=(1e9, 2e9)), "inference")
    with pytest.raises(ConfigError, match="memory"):
        search_shapes(load([*SERVED, "inference.latency_limit_ms=1"]), RANGES, "inference")
    with pytest.raises(ConfigError, match="no experts"):
        search_shapes(load([*SERVED, "model=pangu_ultra_dense"]), RANGES, "inference")


def test_plot(result, tmp_path, monkeypatch):
    pareto_plot(tmp_path / "front.png", load(SERVED), "inference", result)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--plot"):
        pareto_plot(tmp_path / "front.txt", load(SERVED), "inference", result)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib, which is not installed"):
        must_be_drawable(tmp_path / "front.png")


@pytest.mark.end_to_end
def test_command_line():
    few = ["--layers", "48", "--hidden", "4096,5120", "--heads", "40", "--kv-heads", "8"]
    few += ["--experts", "64", "--expert-width", "1344,1728"]
    command = [sys.executable, "-m", "simulator", "shape", *SERVED, *few]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["candidates"] == 4
    assert answer["ranking"][0]["tokens_per_second_per_device"] > 0
    done = subprocess.run([*command, "--hidden", "wide"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("--hidden=wide")
    assert "Traceback" not in done.stderr
